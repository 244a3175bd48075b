"""Every finished run below the results folder: what ran, where, with what, and when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from analysis.saved import Results, Run

#: Folders of a results folder that hold no runs.
NOT_RUNS = ("paper", "figures", "report", "sweeps")
LIBRARIES = ("torch", "transformers", "lm-eval")


def all_runs(results: Results) -> list[Run]:
    """Finished runs of every experiment, the newest first; the others go to ``results.left_out``."""
    root = results.root
    names = sorted(path.name for path in root.glob("*") if path.is_dir() and path.name not in NOT_RUNS)
    runs = [run for name in names for run in results.runs(name)]
    return sorted(runs, key=lambda run: (-run.updated, str(run.folder)))


def experiment(run: Run, root: Path) -> str:
    """The experiment that a run is of, by its folder."""
    return run.folder.relative_to(root).parts[0]


def finished(run: Run) -> str:
    """When, in UTC; empty where it isn't recorded."""
    return f"{datetime.fromtimestamp(run.updated, timezone.utc):%Y-%m-%d %H:%M}" if run.updated else ""


def code(run: Run) -> str:
    """The commit of the code, shortened, or a digest of it without git; empty where neither is recorded."""
    return str((run.result.get("versions") or {}).get("code", ""))


def versions(run: Run) -> str:
    """Of the project and of the libraries that numbers depend on the most."""
    there = run.result.get("versions") or {}
    names = ("chai-lab", *LIBRARIES)
    return ", ".join(f"{name} {there[name]}" for name in names if there.get(name))


def all_versions(runs: Sequence[Run]) -> str:
    """Every version of a run, in words."""
    there = [run.result.get("versions") or {} for run in runs]
    return ", ".join(sorted({f"{name} {number}" for one in there for name, number in one.items()}))
