"""A run from its claim to its end, whatever that is: the same for all experiments.

One process works on a run. It ends done or failed, and its status says why; a failure never stops the other runs of a
sweep. A signal or ctrl-c ends the process, with the run's state saved for the next start.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch

from chai.models import ModelError
from experiments.config.schema import ConfigError
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.locks import LockOwner, RunLocked
from experiments.runs.tracking import track
from experiments.system.console import log_error, log_info
from experiments.system.interrupts import interruption

#: What a file system answers where nothing is wrong with the program.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG)


class Ending(Enum):
    """How a run ended, as far as this process knows."""

    DONE = "done"
    FAILED = "failed"
    ELSEWHERE = "elsewhere"  # another process works on it, which is no failure

    @property
    def code(self) -> int:
        """The exit code."""
        return int(self is Ending.FAILED)


def record(
    folder: RunFolder,
    work: Callable[[], dict[str, Any]],
    *,
    keep: tuple[str, ...] = (),
    until_done: tuple[str, ...] = (),
) -> Ending:
    """Do the work of a run between its start and its end.

    Args:
        folder: of the run.
        work: returns the result.
        keep: files of an earlier start to go on from, unless the run is forced.
        until_done: more of these, which are dropped once the run is done.

    Raises:
        ConfigError: from ``work``; the run is failed.
        BaseException: what stops the process (ctrl-c, a signal); the run's status says so.
    """
    try:
        folder.claim()
    except RunLocked as locked:
        tell(folder, locked.owner)
        return Ending.ELSEWHERE
    except RunError as error:
        log_error(str(error))
        return Ending.FAILED
    try:
        if folder.is_done and not folder.config.force:
            log_info(f"done meanwhile: {folder.path}")
            return Ending.DONE
        reason = _attempt(folder, work, () if folder.config.force else (*keep, *until_done))
        if reason is not None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # of what the failed work held; the next run may need it
            log_error(reason + _fail(folder, reason))
            track(folder)
            return Ending.FAILED
        for name in until_done:
            (folder.path / name).unlink(missing_ok=True)
        track(folder)
        return Ending.DONE
    finally:
        folder.release()


def _attempt(folder: RunFolder, work: Callable[[], dict[str, Any]], keep: tuple[str, ...]) -> str | None:
    """Start, work, finish; returns why that failed, or ``None``."""
    try:
        folder.start(keep=keep)
        folder.finish(work())
        return None
    except ConfigError:
        _fail(folder, "wrong configuration")
        raise
    except BaseException as error:
        stopped = interruption(error)
        if stopped is not None:
            _fail(folder, stopped)
        if stopped is not None or not isinstance(error, Exception):
            raise
        if known_reason(error) is None:  # not foreseen, so its traceback is worth having
            traceback.print_exc()
        return describe(error)


def give_up(folders: Sequence[RunFolder], reason: str) -> list[Ending]:
    """Record one reason as the end of runs that can't be started; returns how each ended.

    A run that is done (``force=true``, but no model to do it with) keeps its result, one that another process works on
    is that one's, and what an unfinished one can go on from stays.
    """
    added = ""
    for folder in folders:
        try:
            folder.claim()
            if folder.is_done:
                continue
            if not folder.path.exists():
                folder.start()
            added = added or _fail(folder, reason)
        except RunLocked:
            continue
        except RunError as error:
            added = added or f" ({error})"
        finally:
            folder.release()
    log_error(reason + added)
    return [Ending.FAILED] * len(folders)


def tell(folder: RunFolder, holder: LockOwner) -> None:
    """Say who works on a run."""
    log_info(f"left to {holder}, which works on it: {folder.path}")


def describe(error: Exception) -> str:
    """One line for any failure."""
    return known_reason(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"


def known_reason(error: Exception) -> str | None:
    """One line for a failure that isn't the program's: of model or run, memory, disk. ``None`` for any other."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, (RunError, ModelError)):
        return str(error)
    short = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or short:
        return f"out of memory (a smaller batch_size takes less): {first or 'no more is said'}"
    if isinstance(error, OSError) and error.errno in DISK:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    return None


def _fail(folder: RunFolder, reason: str) -> str:
    """Record a failure; returns what to add to its one line where that isn't possible.

    A run that is done hasn't been started again yet, or was stopped just after its end: it stays done.
    """
    if folder.is_done:
        return ""
    try:
        folder.fail(reason)
    except OSError as error:
        return f" (and the status can't be written: {error.strerror or error})"
    return ""
