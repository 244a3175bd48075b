"""``hydra/launcher=basic``: one job after the other in this process, with its messages and tables as they come."""

from __future__ import annotations

import shutil

from experiments.execute import run_config
from experiments.sweeps.job import record_outcome
from experiments.sweeps.plan import PlannedJob
from experiments.sweeps.record import Sweep
from experiments.system.console import log_info, logged_errors
from experiments.system.processes import is_main_process


class SerialLauncher:
    """Run jobs in this process; jobs that are done are included, for their rows in the tables."""

    needs_snapshot = False

    def __init__(self, planned: list[PlannedJob]) -> None:
        self.planned = planned

    def run(self, sweep: Sweep, todo: list[int]) -> int:
        """Run the jobs, even if one fails; return the worst exit code."""
        codes = []
        for index, one in enumerate(self.planned):
            one.config.logger.group = one.config.logger.group or sweep.path.name
            log_info(f"[{index + 1}/{len(self.planned)}] {' '.join(one.job.overrides)}")
            codes.append(run_config(one.config))
            if index in todo and is_main_process():
                error = logged_errors[-1] if codes[-1] and logged_errors else None
                record_outcome(sweep, index, codes[-1], error)
        if set(codes) == {2} and is_main_process():  # nothing was run: leave nothing behind, not even the record
            shutil.rmtree(sweep.path, ignore_errors=True)
        return max(codes, default=0)
