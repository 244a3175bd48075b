"""Number and rank of the processes that ``torchrun`` or ``accelerate launch`` started; needs no torch."""

from __future__ import annotations

import os


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def is_main_process() -> bool:
    """Return True in the process that owns the run folders and prints (rank 0)."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"
