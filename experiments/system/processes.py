"""What ``torchrun`` or ``accelerate launch`` has put into the environment of a process; needs no torch."""

from __future__ import annotations

import os


def processes() -> int:
    """How many processes a launcher has started of this program."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def leads() -> bool:
    """Whether this process speaks for all of them."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"
