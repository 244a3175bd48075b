"""Signals that ask a process to stop end its work in order: what was reached is kept, and the run's status says why.

SIGTERM and SIGUSR2 are what batch systems send before they kill a job. Wherever somebody else already handles one of
them (a job launcher that queues its job again), that handler stays.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGUSR2)


class Interrupted(BaseException):
    """A signal asked the process to stop. Like ``KeyboardInterrupt``, nothing that handles errors swallows it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"interrupted by {signal.Signals(number).name}")

    @property
    def code(self) -> int:
        """The exit code that shells give a process which the signal ended."""
        return 128 + self.number


class _Received:
    """The signal that arrived, if any, and how many sections are to be finished before it counts."""

    number: int | None = None
    shields: int = 0


def _handle(number: int, frame: FrameType | None) -> None:
    if _Received.number is None:  # else the process is on its way out already
        _Received.number = number
        if not _Received.shields:
            raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, the caught signals raise :class:`Interrupted` in the main thread, unless somebody else handles them.

    Does nothing in another thread, or within itself.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in CAUGHT:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _Received.number = None


@contextmanager
def shielded() -> Iterator[None]:
    """A short section that a caught signal doesn't cut in two: it counts at the section's end."""
    _Received.shields += 1
    try:
        yield
    finally:
        _Received.shields -= 1
    check()


def check() -> None:
    """Stop here if a signal has arrived; for one that arrived where Python drops exceptions (callbacks, finalizers).

    Raises:
        Interrupted: a signal has arrived.
    """
    if _Received.number is not None and not _Received.shields:
        raise Interrupted(_Received.number)


def interruption(error: BaseException) -> str | None:
    """Why the work was stopped from outside, one line; ``None`` where the error is the work's own."""
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # What submitit's own handler raises: to leave after the job is queued again, or because it can't be any more.
    if isinstance(error, SystemExit) or type(error).__name__ == "UncompletedJobError":
        return "interrupted by the job's end"
    return None
