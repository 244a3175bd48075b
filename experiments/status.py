"""``python -m experiments.status``: what became of every run that was asked for, from what is on disk.

Imports neither torch nor the libraries above it, so that it answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.config.schema import ConfigError, unknown
from experiments.runs.folder import read_json
from experiments.runs.state import STATES, RunState, run_state
from experiments.sweeps.record import FOLDER, Job, Sweep, read_sweeps
from experiments.sweeps.squeue import job_states
from experiments.system.console import console

DESCRIPTION = """\
Every run in results/ or that a sweep asked for, and what became of it: done, running, queued (Slurm's queue, or
a local sweep's), died (its process is gone without a word), failed with the reason, missing.

Filters are KEY=NAME[,NAME]: experiment, model, method, task, state, sweep (its folder's name, or last). results_dir=D
looks there.
"""
KEYS = ("experiment", "model", "method", "task", "state", "sweep", "results_dir")
COLOURS = {"done": "green", "running": "cyan", "queued": "blue", "died": "red", "failed": "red", "missing": "yellow"}
REFRESH_S = 2.0


@dataclass
class Row:
    """One run: the sweep that last asked for it (``none`` if none did), its job there, its folder's name, its state."""

    sweep: Sweep
    job: Job
    name: str
    state: RunState

    @property
    def parts(self) -> dict[str, str]:
        """What filters and columns go by."""
        experiment, model, method, task, _ = self.name.split("/")
        own = {"experiment": experiment, "model": model, "method": method, "task": task}
        return {**own, "state": self.state.state, "sweep": self.sweep.path.name}


def main(arguments: list[str]) -> int:
    """Print the table, or what it is asked for; returns the exit code."""
    try:
        options, filters = parse(arguments)
        results_dir = Path(filters.pop("results_dir", ["results"])[0])
        rows = list(chosen(collect(results_dir), filters, failed=options.failed))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.rerun:
        return rerun(rows, launch=options.launch)
    if options.watch:
        return watch(results_dir, filters, failed=options.failed)
    console.print(report(rows, results_dir))
    return 0


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """The options, and for each filter its values.

    Raises:
        ConfigError: a filter that there isn't.
    """
    parser = argparse.ArgumentParser(
        "python -m experiments.status", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filters", nargs="*", metavar="KEY=NAME")
    parser.add_argument("--failed", action="store_true", help="only what failed or died")
    parser.add_argument("--rerun", action="store_true", help="print the commands that do again what isn't done")
    parser.add_argument("--launch", action="store_true", help="with --rerun: launch them")
    parser.add_argument("--watch", action="store_true", help="go on showing it until all have ended")
    options = parser.parse_args(arguments)
    if options.launch and not options.rerun:
        raise ConfigError("--launch goes with --rerun")
    filters: dict[str, list[str]] = {}
    for word in options.filters:
        key, found, values = word.partition("=")
        if not found or not values:
            raise ConfigError(f"can't read {word}; expected KEY=NAME, with one of {', '.join(KEYS)}")
        if key not in KEYS:
            raise ConfigError(unknown("filter", key, list(KEYS)))
        filters[key] = values.split(",")
    for state in filters.get("state", []):
        if state not in STATES:
            raise ConfigError(unknown("state", state, list(STATES)))
    return options, filters


def collect(results_dir: Path) -> list[Row]:
    """A row for each run that a sweep asked for, by the last that did; before them those that were started alone."""
    latest: dict[str, tuple[Sweep, int]] = {}
    for sweep in read_sweeps(results_dir):
        for index, job in enumerate(sweep.jobs):
            for name in job.runs:
                known = latest.pop(name, None)
                # A sweep that had nothing to launch for a run knows less of it than the one that did.
                idle = job.slurm_id is None and not sweep.outcome_path(index).exists() and sweep.launcher == "slurm"
                latest[name] = known if known is not None and idle else (sweep, index)
    found = {name: run_state(results_dir / name) for name in latest}
    undone = [sweep.jobs[index] for name, (sweep, index) in latest.items() if found[name].state != "done"]
    slurm = job_states([job.slurm_id for job in undone if job.slurm_id], timeout_s=5.0) or {}
    rows = alone(results_dir, latest)
    for name, (sweep, index) in latest.items():
        job, state = sweep.jobs[index], found[name]
        if state.state != "done":
            outcome = read_json(sweep.outcome_path(index))
            known_state = slurm.get(job.slurm_id) if job.slurm_id else local_state(sweep, outcome)
            state = run_state(results_dir / name, outcome, known_state)
        rows.append(Row(sweep, job, name, state))
    return rows


def alone(results_dir: Path, asked: Collection[str]) -> list[Row]:
    """A row for each run's folder that no sweep asked for."""
    folders = [path.parent for path in results_dir.glob("*/*/*/*/*/status.json")]
    names = sorted("/".join(folder.parts[-5:]) for folder in folders)
    none = Sweep(results_dir / FOLDER / "none", "basic", [])
    return [Row(none, Job([], [name]), name, run_state(results_dir / name)) for name in names if name not in asked]


def local_state(sweep: Sweep, outcome: dict[str, object] | None) -> str | None:
    """``PENDING`` for a job of a sweep on this machine that its client hasn't come to yet."""
    return "PENDING" if sweep.launcher != "slurm" and outcome is None and sweep.client_lives() else None


def chosen(rows: list[Row], filters: dict[str, list[str]], *, failed: bool) -> Iterator[Row]:
    """The rows that fit all filters."""
    last = rows[-1].sweep.path.name if rows else ""
    for row in rows:
        if failed and row.state.state not in ("failed", "died"):
            continue
        wanted = {key: [last if value == "last" else value for value in values] for key, values in filters.items()}
        if all(row.parts[key] in values for key, values in wanted.items()):
            yield row


def report(rows: list[Row], results_dir: Path) -> Group:
    """The table, with what it adds up to below."""
    if not rows:
        return Group(Text(f"no run in {results_dir} fits"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("Experiment", "Model", "Method", "Task"):
        table.add_column(column, overflow="fold")
    table.add_column("Run", no_wrap=True)
    table.add_column("State", no_wrap=True)
    table.add_column("Time", justify="right", no_wrap=True)
    table.add_column("Left", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    kinds = Kinds(rows)
    for row in sorted(rows, key=lambda row: row.name):
        experiment, model, method, task, run = row.name.split("/")
        state = row.state
        left = kinds.left(row)
        table.add_row(
            experiment, model, method, task, run,
            Text(state.state, style=COLOURS[state.state]),
            duration(state.seconds) if state.state != "queued" else "",
            f"~{duration(left)}" if left else "",
            Text(_note(row)),
        )  # fmt: skip
    return Group(table, Text(summary(rows, kinds)))


def _note(row: Row) -> str:
    state = row.state
    if state.state == "running" and state.progress is not None:
        done, total = state.progress
        return f"{done} of {total}" + (f" ({100 * done // total} %)" if total else "")
    if state.state == "queued":
        return " ".join(part for part in (state.reason, f"job {row.job.slurm_id}" if row.job.slurm_id else "") if part)
    return state.reason


class Kinds:
    """How long runs of a kind take, by those that are done."""

    def __init__(self, rows: list[Row]) -> None:
        self.known: dict[tuple[str, ...], list[float]] = {}
        for row in rows:
            if row.state.state == "done" and row.state.seconds is not None:
                for kind in self.of(row):
                    self.known.setdefault(kind, []).append(row.state.seconds)

    @staticmethod
    def of(row: Row) -> list[tuple[str, ...]]:
        """A run's kinds, the closest first."""
        experiment, model, method, task, _ = row.name.split("/")
        return [(experiment, model, task, method), (experiment, model, task), (experiment, model)]

    def left(self, row: Row) -> float | None:
        """Seconds of work left in a run; 0 if it is done, ``None`` if nothing tells."""
        state = row.state
        if state.state == "done":
            return 0.0
        spent = state.seconds or 0.0 if state.state == "running" else 0.0
        if state.state == "running" and state.progress and state.progress[0]:
            done, total = state.progress
            return spent * (total - done) / done
        whole = next((mean(self.known[kind]) for kind in self.of(row) if kind in self.known), None)
        return None if whole is None else max(whole - spent, 0.0)


def summary(rows: list[Row], kinds: Kinds) -> str:
    """One line: how many runs in each state, and about how long until all are done."""
    states = [row.state.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    text = f"{len(rows)} runs: {counts}."
    pending = [row for row in rows if row.state.state in ("running", "queued")]
    known = [seconds for row in pending if (seconds := kinds.left(row)) is not None]
    if pending and known:
        at_once = max(states.count("running"), 1)
        total = mean(known) * len(pending) / at_once
        text += f" About {duration(max(total, max(known)))} left, {at_once} at a time."
    undone = [state for state in states if state in ("failed", "died", "missing")]
    if undone:
        text += f"\n--rerun prints the commands for the {len(undone)} that have ended undone."
    return text


def duration(seconds: float | None) -> str:
    """``42 s``, ``12 min``, ``3 h 05 min``."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def rerun(rows: list[Row], *, launch: bool) -> int:
    """Print, or launch, the commands of jobs with runs that have ended undone; returns the exit code."""
    jobs: dict[tuple[str, ...], Sweep] = {}
    for row in rows:
        if row.state.state in ("failed", "died", "missing"):
            if not row.job.overrides:
                print(f"{row.name} was started alone: give its command again", file=sys.stderr)
                continue
            jobs[tuple(row.job.overrides)] = row.sweep
    if not launch:
        for overrides, sweep in jobs.items():
            place = "" if sweep.cwd == os.getcwd() else f"cd {shlex.quote(sweep.cwd)} && "
            print(f"{place}python {shlex.quote(run_py(sweep))} -m {shlex.join(overrides)}")
        return 0
    from experiments.sweeps.launch import launch as launch_jobs

    code = 0
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for overrides, sweep in jobs.items():
        groups.setdefault((sweep.cwd, sweep.launcher), []).append(list(overrides))
    for (cwd, _), commands in groups.items():
        os.chdir(cwd)
        try:
            code = max(code, launch_jobs(commands))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            code = max(code, 2)
    return code


def run_py(sweep: Sweep) -> str:
    """How ``run.py`` is named from where a sweep was launched."""
    from experiments.config.schema import REPOSITORY

    return "run.py" if Path(sweep.cwd) == REPOSITORY else str(REPOSITORY / "run.py")


def watch(results_dir: Path, filters: dict[str, list[str]], *, failed: bool) -> int:
    """Show the table anew every few seconds until nothing runs or waits; returns the exit code."""
    try:
        with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="visible") as live:
            while True:
                rows = list(chosen(collect(results_dir), filters, failed=failed))
                live.update(report(rows, results_dir), refresh=True)
                if not any(row.state.state in ("running", "queued") for row in rows):
                    return 0
                time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
