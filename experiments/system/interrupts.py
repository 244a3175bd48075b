"""Signals that ask the process to stop: it saves its work, records the reason in the run's status, and exits.

SIGTERM and SIGUSR2 are what batch systems send before they kill a job. A handler that is already installed for one of
them (by a job launcher that requeues its job) is kept.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGUSR2)


class Interrupted(BaseException):
    """Raised when a signal asks the process to stop; like ``KeyboardInterrupt``, it is not an ``Exception``."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number  # exit code that shells report for a process ended by the signal
        super().__init__(f"interrupted by {signal.Signals(number).name}")


class _Received:
    """The signal that arrived, if any, and the number of active :func:`shielded` sections."""

    number: int | None = None
    shields: int = 0


def _handle(number: int, frame: FrameType | None) -> None:
    if _Received.number is None:  # else the process is ending already
        _Received.number = number
        if not _Received.shields:
            raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Interrupted` in the main thread for the caught signals that have no other handler."""
    main = threading.current_thread() is threading.main_thread()
    free = [number for number in CAUGHT if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in free:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
        if free:
            _Received.number = None


@contextmanager
def exit_when_interrupted() -> Iterator[None]:
    """On ctrl-c or a caught signal, print one line and exit with 130, or 128 and the signal's number."""
    try:
        with interruptible():
            yield
    except (KeyboardInterrupt, Interrupted) as error:
        reason, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else (str(error), error.code)
        print(f"{reason}: rerun the same command to resume", file=sys.stderr)
        raise SystemExit(code) from None


@contextmanager
def shielded() -> Iterator[None]:
    """Delay caught signals until the end of a short section."""
    _Received.shields += 1
    try:
        yield
    finally:
        _Received.shields -= 1
    raise_if_interrupted()


def raise_if_interrupted() -> None:
    """Raise :class:`Interrupted` for a signal that arrived where Python drops exceptions (callbacks, finalizers)."""
    if _Received.number is not None and not _Received.shields:
        raise Interrupted(_Received.number)


def interruption(error: BaseException) -> str | None:
    """Return why the work was stopped from outside, or ``None`` if the error is the work's own."""
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # Raised by submitit's own handler, after it has requeued the job or given up on it.
    if isinstance(error, SystemExit) or type(error).__name__ == "UncompletedJobError":
        return "interrupted by the job's end"
    return None
