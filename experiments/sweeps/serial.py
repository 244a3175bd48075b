"""``hydra/launcher=basic``: one job after the other in this process, with its lines and tables as they come."""

from __future__ import annotations

import shutil

from experiments.cli import attempt
from experiments.sweeps.job import note_outcome
from experiments.sweeps.record import Planned, Sweep
from experiments.system.console import say
from experiments.system.processes import is_main_process


def prepare(planned: list[Planned]) -> Serial:
    """The launcher; it has no settings."""
    return Serial(planned)


class Serial:
    """Runs jobs here. What is done already is gone through as well, for its rows in the tables."""

    def __init__(self, planned: list[Planned]) -> None:
        self.planned = planned

    def __call__(self, sweep: Sweep, todo: list[int]) -> int:
        """Run the jobs; a failing one doesn't stop the others; returns the worst exit code."""
        codes = []
        for index, one in enumerate(self.planned):
            one.config.logger.group = one.config.logger.group or sweep.path.name
            say(f"[{index + 1}/{len(self.planned)}] {' '.join(one.job.overrides)}")
            code, error = attempt(one.config)
            codes.append(code)
            if index in todo and is_main_process():
                note_outcome(sweep, index, code, error)
        if set(codes) == {2} and is_main_process():  # nothing was run, so nothing is to stay: not even the record of it
            shutil.rmtree(sweep.path, ignore_errors=True)
        return max(codes, default=0)
