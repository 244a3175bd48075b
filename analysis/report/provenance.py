"""List every finished run below the results folder, with its code, libraries and time."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.results.runs import Results, Run, RunQuery

#: Folders of a results folder that hold no runs.
NOT_RUNS = ("paper", "figures", "report", "sweeps")
#: Packages that numbers depend on the most; older runs name the project chai-lab.
PACKAGES = ("chai-attention", "chai-lab", "torch", "transformers", "lm-eval")


def all_runs(results: Results) -> list[Run]:
    """Return finished runs of every experiment, the newest first."""
    names = sorted(path.name for path in results.root.glob("*") if path.is_dir() and path.name not in NOT_RUNS)
    runs = [run for name in names for run in results.runs(RunQuery(name))]
    return sorted(runs, key=lambda run: (-run.updated, str(run.folder)))


def versions(run: Run) -> str:
    """Return the versions of the project and of the most important libraries."""
    return ", ".join(f"{name} {run.versions[name]}" for name in PACKAGES if run.versions.get(name))


def all_versions(runs: Sequence[Run]) -> str:
    """Return every version that the runs have recorded."""
    return ", ".join(sorted({f"{name} {number}" for run in runs for name, number in run.versions.items()}))
