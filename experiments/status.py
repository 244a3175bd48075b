"""``python -m experiments.status``: the state of every run that exists or was launched, from what is on disk.

Imports neither torch nor libraries built on it, so that it starts at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from experiments.config.schema import REPOSITORY, ConfigError, unknown_name
from experiments.runs.files import read_json
from experiments.runs.state import STATES, RunState, is_done, run_state
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
KEYS = ("experiment", "model", "method", "task", "state", "sweep")
COLOURS = {"done": "green", "running": "cyan", "queued": "blue", "died": "red", "failed": "red", "missing": "yellow"}
UNFINISHED = ("failed", "died", "missing")
REFRESH_S = 2.0


@dataclass
class Row:
    """One run."""

    sweep: Sweep  # the last one with it, or one named "none"
    job: Job  # of that sweep
    name: str  # its folder, relative to the results folder
    state: RunState

    @property
    def parts(self) -> dict[str, str]:
        """Values that filters and columns refer to."""
        values = [*self.name.split("/")[:4], self.state.state, self.sweep.path.name]
        return dict(zip(KEYS, values, strict=True))


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m experiments.status", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filters", nargs="*", metavar="KEY=NAME")
    parser.add_argument("--failed", action="store_true", help="only runs that failed or died")
    parser.add_argument("--rerun", action="store_true", help="print the commands that rerun what is not done")
    parser.add_argument("--launch", action="store_true", help="with --rerun: launch them")
    parser.add_argument("--watch", action="store_true", help="update the table until all runs have ended")
    options = parser.parse_args(arguments)
    try:
        if options.launch and not options.rerun:
            raise ConfigError("--launch goes with --rerun")
        filters = parse_filters(options.filters)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results_dir = Path(filters.pop("results_dir", ["results"])[0])
    if options.watch and not options.rerun:
        return watch(results_dir, filters, failed=options.failed)
    rows = select_rows(results_dir, filters, failed=options.failed)
    if options.rerun:
        return launch_again(rows) if options.launch else print_commands(rows)
    console.print(render_table(rows, results_dir))
    return 0


def parse_filters(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each filter; raise a ConfigError for an unknown filter or state."""
    filters: dict[str, list[str]] = {}
    valid = (*KEYS, "results_dir")
    for word in words:
        key, _, values = word.partition("=")
        if not values:
            raise ConfigError(f"cannot read {word}; expected KEY=NAME, with one of {', '.join(valid)}")
        if key not in valid:
            raise ConfigError(unknown_name("filter", key, valid))
        filters[key] = values.split(",")
    for state in filters.get("state", []):
        if state not in STATES:
            raise ConfigError(unknown_name("state", state, STATES))
    return filters


def collect_rows(results_dir: Path) -> list[Row]:
    """Return a row per run: first those started without a sweep, then those of sweeps, each by its last sweep."""
    latest: dict[str, tuple[Sweep, int]] = {}
    for sweep in read_sweeps(results_dir):
        for index, job in enumerate(sweep.jobs):
            # A sweep that submitted nothing for a run does not replace the sweep that did.
            idle = sweep.launcher == "slurm" and job.slurm_id is None and not sweep.outcome_path(index).exists()
            for name in [name for name in job.runs if not (idle and name in latest)]:
                latest.pop(name, None)  # the last entries are of the last sweep
                latest[name] = sweep, index
    # Ask Slurm only for the jobs of runs that are not done.
    ids = [sweep.jobs[index].slurm_id for name, (sweep, index) in latest.items() if not is_done(results_dir / name)]
    slurm = job_states(filter(None, ids), timeout_s=5.0) or {}
    names = sorted("/".join(path.parts[-6:-1]) for path in results_dir.glob("*/*/*/*/*/status.json"))
    none = Sweep(results_dir / FOLDER / "none", "basic", [])
    rows = [Row(none, Job([], [name]), name, run_state(results_dir / name)) for name in names if name not in latest]
    for name, (sweep, index) in latest.items():
        job, outcome = sweep.jobs[index], read_json(sweep.outcome_path(index))
        # A job of a sweep on this machine is waiting while its client is alive and has not started it.
        waiting = sweep.launcher != "slurm" and outcome is None and sweep.is_client_alive()
        job_state = slurm.get(job.slurm_id) if job.slurm_id else "PENDING" if waiting else None
        rows.append(Row(sweep, job, name, run_state(results_dir / name, outcome, job_state)))
    return rows


def select_rows(results_dir: Path, filters: dict[str, list[str]], *, failed: bool) -> list[Row]:
    """Return the rows that match all filters; the filter value ``last`` is the last sweep."""
    rows = collect_rows(results_dir)
    last = rows[-1].sweep.path.name if rows else ""
    wanted = {key: [last if value == "last" else value for value in values] for key, values in filters.items()}
    if failed:
        rows = [row for row in rows if row.state.state in ("failed", "died")]
    return [row for row in rows if all(row.parts[key] in values for key, values in wanted.items())]


def render_table(rows: list[Row], results_dir: Path) -> Group:
    """Return the table with a summary below."""
    if not rows:
        return Group(Text(f"no run in {results_dir} matches"))
    table = Table(
        *(Column(name, overflow="fold") for name in ("Experiment", "Model", "Method", "Task")),
        *(Column(name, no_wrap=True) for name in ("Run", "State")),
        *(Column(name, no_wrap=True, justify="right") for name in ("Time", "Left")),
        Column(overflow="fold"),
        box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False,
    )  # fmt: skip
    left = estimate_left(rows)
    for row in sorted(rows, key=lambda row: row.name):
        state = row.state
        table.add_row(
            *row.name.split("/"),
            Text(state.state, style=COLOURS[state.state]),
            format_duration(state.seconds) if state.state != "queued" else "",
            f"~{format_duration(left[row.name])}" if left.get(row.name) else "",
            Text(_note(row)),
        )
    return Group(table, Text(_summary(rows, left)))


def _note(row: Row) -> str:
    """Return the progress of a running run, the job of a queued one, else the reason."""
    state = row.state
    if state.state == "running" and state.progress is not None:
        done, total = state.progress
        return f"{done} of {total}" + (f" ({100 * done // total} %)" if total else "")
    if state.state == "queued" and row.job.slurm_id:
        return f"{state.reason} job {row.job.slurm_id}".strip()
    return state.reason


def estimate_left(rows: list[Row]) -> dict[str, float]:
    """Return the estimated seconds until each run is done, from its progress or from similar runs that are done."""

    def kinds(row: Row) -> list[tuple[str, ...]]:
        experiment, model, method, task, _ = row.name.split("/")
        return [(experiment, model, task, method), (experiment, model, task), (experiment, model)]

    durations: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        for kind in kinds(row):
            if row.state.state == "done" and row.state.seconds is not None:
                durations[kind].append(row.state.seconds)
    left = {}
    for row in rows:
        running, (done, total) = row.state.state == "running", row.state.progress or (0, 0)
        spent = row.state.seconds or 0.0 if running else 0.0
        similar = next((mean(durations[kind]) for kind in kinds(row) if kind in durations), None)
        if running and done:
            left[row.name] = spent * (total - done) / done
        elif similar is not None and row.state.state != "done":
            left[row.name] = max(similar - spent, 0.0)
    return left


def _summary(rows: list[Row], left: dict[str, float]) -> str:
    """Return the number of runs in each state, and the estimated time until all are done."""
    states = [row.state.state for row in rows]
    text = f"{len(rows)} runs: {', '.join(f'{states.count(state)} {state}' for state in STATES if state in states)}."
    pending = [row.name for row in rows if row.state.state in ("running", "queued")]
    known = [left[name] for name in pending if name in left]
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
        if row.state.state in UNFINISHED:
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
    groups: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    for overrides, sweep in _unfinished_jobs(rows).items():
        groups[sweep.cwd, sweep.launcher].append(list(overrides))
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
                rows = select_rows(results_dir, filters, failed=failed)
                live.update(render_table(rows, results_dir), refresh=True)
                if not any(row.state.state in ("running", "queued") for row in rows):
                    return 0
                time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
