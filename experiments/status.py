"""``python -m experiments.status``: the state of every run that exists or was launched, from what is on disk.

Imports neither torch nor the libraries above it, so that it answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.config.schema import REPOSITORY, ConfigError, unknown_name
from experiments.runs.files import read_json
from experiments.runs.state import STATES, RunState, run_state
from experiments.sweeps.launch import launch
from experiments.sweeps.record import FOLDER, Job, Sweep, read_sweeps
from experiments.sweeps.squeue import job_states
from experiments.system.console import console

DESCRIPTION = """\
List every run in results/ or of a sweep with its state: done, running, queued (in Slurm's queue, or waiting in a local
sweep), died (its process is gone without recording a reason), failed with the reason, missing.

Filters are KEY=NAME[,NAME]: experiment, model, method, task, state, sweep (its folder's name, or last). results_dir=D
lists the runs there.
"""
KEYS = ("experiment", "model", "method", "task", "state", "sweep", "results_dir")
COLOURS = {"done": "green", "running": "cyan", "queued": "blue", "died": "red", "failed": "red", "missing": "yellow"}
UNFINISHED = ("failed", "died", "missing")
REFRESH_S = 2.0


@dataclass
class Row:
    """One run: the last sweep with it (``none`` if there is none), its job there, its folder's name, its state."""

    sweep: Sweep
    job: Job
    name: str
    state: RunState

    @property
    def parts(self) -> dict[str, str]:
        """Values that filters and columns refer to."""
        experiment, model, method, task, run = self.name.split("/")
        names = {"experiment": experiment, "model": model, "method": method, "task": task, "run": run}
        return {**names, "state": self.state.state, "sweep": self.sweep.path.name}


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    try:
        options, filters = parse_arguments(arguments)
        results_dir = Path(filters.pop("results_dir", ["results"])[0])
        rows = select_rows(collect_rows(results_dir), filters, failed=options.failed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.rerun:
        return launch_again(rows) if options.launch else print_commands(rows)
    if options.watch:
        return watch(results_dir, filters, failed=options.failed)
    console.print(render_table(rows, results_dir))
    return 0


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Return the options, and the values of each filter.

    Raises:
        ConfigError: unknown filter or state.
    """
    parser = argparse.ArgumentParser(
        "python -m experiments.status", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filters", nargs="*", metavar="KEY=NAME")
    parser.add_argument("--failed", action="store_true", help="only runs that failed or died")
    parser.add_argument("--rerun", action="store_true", help="print the commands that rerun what is not done")
    parser.add_argument("--launch", action="store_true", help="with --rerun: launch them")
    parser.add_argument("--watch", action="store_true", help="update the table until all runs have ended")
    options = parser.parse_args(arguments)
    if options.launch and not options.rerun:
        raise ConfigError("--launch goes with --rerun")
    filters: dict[str, list[str]] = {}
    for word in options.filters:
        key, _, values = word.partition("=")
        if not values:
            raise ConfigError(f"cannot read {word}; expected KEY=NAME, with one of {', '.join(KEYS)}")
        if key not in KEYS:
            raise ConfigError(unknown_name("filter", key, KEYS))
        filters[key] = values.split(",")
    for state in filters.get("state", []):
        if state not in STATES:
            raise ConfigError(unknown_name("state", state, STATES))
    return options, filters


def collect_rows(results_dir: Path) -> list[Row]:
    """Return a row per run: first those started without a sweep, then those of sweeps, each by its last sweep."""
    latest: dict[str, tuple[Sweep, int]] = {}
    for sweep in read_sweeps(results_dir):
        for index, job in enumerate(sweep.jobs):
            for name in job.runs:
                known = latest.pop(name, None)
                # A sweep that submitted nothing for a run knows less of it than the sweep that did.
                idle = job.slurm_id is None and not sweep.outcome_path(index).exists() and sweep.launcher == "slurm"
                latest[name] = known if known is not None and idle else (sweep, index)
    states = {name: run_state(results_dir / name) for name in latest}
    # Ask Slurm only for the jobs of runs that are not done.
    undone = [sweep.jobs[index] for name, (sweep, index) in latest.items() if states[name].state != "done"]
    slurm = job_states([job.slurm_id for job in undone if job.slurm_id], timeout_s=5.0) or {}
    rows = _rows_without_sweep(results_dir, latest)
    for name, (sweep, index) in latest.items():
        job, state = sweep.jobs[index], states[name]
        if state.state != "done":
            outcome = read_json(sweep.outcome_path(index))
            # A job of a sweep on this machine is waiting while its client is alive and has not started it.
            waiting = sweep.launcher != "slurm" and outcome is None and sweep.is_client_alive()
            job_state = slurm.get(job.slurm_id) if job.slurm_id else "PENDING" if waiting else None
            state = run_state(results_dir / name, outcome, job_state)
        rows.append(Row(sweep, job, name, state))
    return rows


def _rows_without_sweep(results_dir: Path, launched: Collection[str]) -> list[Row]:
    """Return a row per run folder that no sweep has launched."""
    folders = [path.parent for path in results_dir.glob("*/*/*/*/*/status.json")]
    names = sorted("/".join(folder.parts[-5:]) for folder in folders)
    none = Sweep(results_dir / FOLDER / "none", "basic", [])
    return [Row(none, Job([], [name]), name, run_state(results_dir / name)) for name in names if name not in launched]


def select_rows(rows: list[Row], filters: dict[str, list[str]], *, failed: bool) -> list[Row]:
    """Return the rows that match all filters; the filter value ``last`` is the last sweep."""
    last = rows[-1].sweep.path.name if rows else ""
    wanted = {key: [last if value == "last" else value for value in values] for key, values in filters.items()}
    if failed:
        rows = [row for row in rows if row.state.state in ("failed", "died")]
    return [row for row in rows if all(row.parts[key] in values for key, values in wanted.items())]


def render_table(rows: list[Row], results_dir: Path) -> Group:
    """Return the table with a summary below."""
    if not rows:
        return Group(Text(f"no run in {results_dir} matches"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("Experiment", "Model", "Method", "Task"):
        table.add_column(column, overflow="fold")
    table.add_column("Run", no_wrap=True)
    table.add_column("State", no_wrap=True)
    table.add_column("Time", justify="right", no_wrap=True)
    table.add_column("Left", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    durations = Durations(rows)
    for row in sorted(rows, key=lambda row: row.name):
        state, left = row.state, durations.seconds_left(row)
        table.add_row(
            *row.name.split("/"),
            Text(state.state, style=COLOURS[state.state]),
            format_duration(state.seconds) if state.state != "queued" else "",
            f"~{format_duration(left)}" if left else "",
            Text(_note(row)),
        )
    return Group(table, Text(_summary(rows, durations)))


def _note(row: Row) -> str:
    """Return the progress of a running run, the job of a queued one, else the reason."""
    state = row.state
    if state.state == "running" and state.progress is not None:
        done, total = state.progress
        return f"{done} of {total}" + (f" ({100 * done // total} %)" if total else "")
    if state.state == "queued" and row.job.slurm_id:
        return f"{state.reason} job {row.job.slurm_id}".strip()
    return state.reason


class Durations:
    """Durations of finished runs, from which those of similar runs are estimated."""

    def __init__(self, rows: list[Row]) -> None:
        self.known: dict[tuple[str, ...], list[float]] = {}
        for row in rows:
            if row.state.state == "done" and row.state.seconds is not None:
                for kind in self._kinds(row):
                    self.known.setdefault(kind, []).append(row.state.seconds)

    @staticmethod
    def _kinds(row: Row) -> list[tuple[str, ...]]:
        """Return the kinds of similar runs, most similar first."""
        experiment, model, method, task, _ = row.name.split("/")
        return [(experiment, model, task, method), (experiment, model, task), (experiment, model)]

    def seconds_left(self, row: Row) -> float | None:
        """Return the estimated seconds until a run is done, or ``None`` without a basis for an estimate."""
        state = row.state
        if state.state == "done":
            return 0.0
        spent = state.seconds or 0.0 if state.state == "running" else 0.0
        # Extrapolate from the run's own progress, else from similar runs.
        if state.state == "running" and state.progress and state.progress[0]:
            done, total = state.progress
            return spent * (total - done) / done
        whole = next((mean(self.known[kind]) for kind in self._kinds(row) if kind in self.known), None)
        return None if whole is None else max(whole - spent, 0.0)


def _summary(rows: list[Row], durations: Durations) -> str:
    """Return the number of runs in each state, and the estimated time until all are done."""
    states = [row.state.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    text = f"{len(rows)} runs: {counts}."
    pending = [row for row in rows if row.state.state in ("running", "queued")]
    known = [seconds for row in pending if (seconds := durations.seconds_left(row)) is not None]
    if known:
        at_once = max(states.count("running"), 1)
        total = mean(known) * len(pending) / at_once
        text += f" About {format_duration(max(total, max(known)))} left, {at_once} at a time."
    if unfinished := sum(state in UNFINISHED for state in states):
        text += f"\n--rerun prints the commands for the {unfinished} that have ended unfinished."
    return text


def format_duration(seconds: float | None) -> str:
    """Return ``42 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _unfinished_jobs(rows: list[Row]) -> dict[tuple[str, ...], Sweep]:
    """Return the overrides of the jobs with runs that have ended unfinished, and their sweeps."""
    jobs: dict[tuple[str, ...], Sweep] = {}
    for row in rows:
        if row.state.state not in UNFINISHED:
            continue
        if row.job.overrides:
            jobs[tuple(row.job.overrides)] = row.sweep
        else:
            print(f"{row.name} was started without a sweep: rerun its command", file=sys.stderr)
    return jobs


def print_commands(rows: list[Row]) -> int:
    """Print the commands that rerun unfinished jobs; return the exit code."""
    for overrides, sweep in _unfinished_jobs(rows).items():
        change = "" if sweep.cwd == os.getcwd() else f"cd {shlex.quote(sweep.cwd)} && "
        program = "run.py" if Path(sweep.cwd) == REPOSITORY else str(REPOSITORY / "run.py")
        print(f"{change}python {shlex.quote(program)} -m {shlex.join(overrides)}")
    return 0


def launch_again(rows: list[Row]) -> int:
    """Launch unfinished jobs again, each with its launcher and from its folder; return the worst exit code."""
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for overrides, sweep in _unfinished_jobs(rows).items():
        groups.setdefault((sweep.cwd, sweep.launcher), []).append(list(overrides))
    code = 0
    for (cwd, _), sweeps in groups.items():
        os.chdir(cwd)
        try:
            code = max(code, launch(sweeps))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            code = max(code, 2)
    return code


def watch(results_dir: Path, filters: dict[str, list[str]], *, failed: bool) -> int:
    """Update the table every few seconds until no run is running or queued; return the exit code."""
    try:
        with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="visible") as live:
            while True:
                rows = select_rows(collect_rows(results_dir), filters, failed=failed)
                live.update(render_table(rows, results_dir), refresh=True)
                if not any(row.state.state in ("running", "queued") for row in rows):
                    return 0
                time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
