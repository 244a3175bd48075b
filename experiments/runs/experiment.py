"""The template of all experiments: check a configuration, skip what is complete, run, record how it ended.

A failed run never stops the other runs of a sweep; a signal or ctrl-c ends the process, with the run's state saved.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from omegaconf import DictConfig
from transformers import PreTrainedConfig

from chai.loading import ModelError, load_config
from chai.methods import load_method
from chai.methods.base import Method
from experiments.config.remedies import with_remedy
from experiments.config.schema import ConfigError
from experiments.config.validate import check_clusters, to_dataclass
from experiments.runs.code import versions
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.identity import check_profile
from experiments.runs.locks import RunLocked
from experiments.runs.model import model_source
from experiments.runs.resolve import resolve_runs
from experiments.runs.tracking import track
from experiments.system.console import log_error, log_info
from experiments.system.distributed import DistributedError
from experiments.system.interrupts import interruption
from experiments.system.processes import is_main_process

#: Errors of the file system rather than of the program.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG)

Names = tuple[str, ...]  # of files in the run's folder
OptionsT = TypeVar("OptionsT")


class Outcome(Enum):
    """How a run ended, as seen by this process."""

    DONE = "done"
    FAILED = "failed"
    LOCKED = "locked"  # another process works on it, which is not a failure

    @property
    def code(self) -> int:
        """Exit code of the process."""
        return int(self is Outcome.FAILED)


class Run(Generic[OptionsT]):
    """One run with its options; the model's architecture and the method are made on first use."""

    def __init__(self, folder: RunFolder, options: OptionsT) -> None:
        self.folder, self.options, self.config = folder, options, folder.config
        self.source = model_source(folder.config)

    @cached_property
    def architecture(self) -> PreTrainedConfig:
        """Configuration of the model; a ModelError if it cannot be loaded."""
        return load_config(self.source)

    @cached_property
    def method(self) -> Method:
        """Configured method."""
        return build_method(self.config)


def run_single(
    config: DictConfig,
    options_type: type[OptionsT],
    *,
    check: Callable[[Run[OptionsT]], object],
    work: Callable[[Run[OptionsT]], dict[str, Any]],
    show: Callable[[Path, OptionsT], object],
    section: str = "experiment",
    keep: Names = (),
    until_done: Names = (),
) -> int:
    """Do an experiment that is a single run, unless it is complete; return the exit code.

    ``check`` raises a ConfigError for what the model cannot run with, before anything is written; ``work`` returns the
    run's part of ``result.json``; ``show`` prints the outcome. :func:`run_lifecycle` describes the other parameters.
    """
    options = to_dataclass(options_type, config[section], section)
    (folder,) = checked_folders(config)
    if not needs_work(folder):
        show(folder.path, options)
        return 0
    run = Run(folder, options)
    try:
        check(run)
    except ModelError as error:
        return mark_failed([folder], with_remedy(error)).code
    outcome = run_lifecycle(folder, lambda: work(run), keep=keep, until_done=until_done)
    if outcome is Outcome.DONE:
        show(folder.path, options)
    return outcome.code


def checked_folders(config: DictConfig) -> list[RunFolder]:
    """Return the folders of a configuration's runs; refuse missing cluster counts and another model's head profile."""
    singles = resolve_runs(config)
    for single in singles:
        check_clusters(single)
        check_profile(single)
    return [RunFolder(single) for single in singles]


def require_minimum(options: object, **minimums: int) -> None:
    """Raise a ValueError that names the first option below its minimum."""
    for name, minimum in minimums.items():
        if getattr(options, name) < minimum:
            raise ValueError(f"{name} is {getattr(options, name)}; valid: {minimum} or more")


def needs_work(folder: RunFolder) -> bool:
    """Return False for a complete run that is not forced, and log that it is skipped."""
    if folder.is_done and not folder.config.force:
        log_info(f"already complete: {folder.path} (force=true to rerun)")
        return False
    return True


def build_method(config: DictConfig) -> Method:
    """Return the configured method, or raise a ConfigError for its hyper-parameters."""
    return to_dataclass(load_method(config.method.name), config.method, "method")


def check_method(method: Method, architecture: PreTrainedConfig) -> None:
    """Raise a ConfigError for a method that cannot run on such a model; log its note on the model."""
    try:
        method.check(architecture)
    except ValueError as error:
        raise ConfigError(f"method: {with_remedy(error)}") from None
    if note := method.note(architecture):
        log_info(note)


def run_lifecycle(
    folder: RunFolder, work: Callable[[], dict[str, Any]], *, keep: Names = (), until_done: Names = ()
) -> Outcome:
    """Lock a run, do its work and record how it ended; re-raise a ConfigError and what stops the process.

    ``keep`` and ``until_done`` are files of an earlier attempt to resume from, unless the run is forced; the second
    are deleted once the run is done.
    """
    try:
        folder.claim()
    except RunLocked as held:
        log_info(f"skipping: locked by {held.owner}: {folder.path}")
        return Outcome.LOCKED
    except RunError as error:
        log_error(str(error))
        return Outcome.FAILED
    try:
        if folder.is_done and not folder.config.force:
            log_info(f"completed by another process: {folder.path}")
            return Outcome.DONE
        failure = ""
        try:
            folder.start(keep=() if folder.config.force else (*keep, *until_done))
            folder.finish(common_fields(folder) | work())
        except BaseException as error:
            failure = _failure_reason(folder, error)
        if failure:
            # Only now is the memory of the failed work free; the next run may need it.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log_error(failure + _write_failure(folder, failure))
        else:
            for name in until_done:
                (folder.path / name).unlink(missing_ok=True)
        track(folder)
        return Outcome.FAILED if failure else Outcome.DONE
    finally:
        folder.release()


def common_fields(folder: RunFolder) -> dict[str, Any]:
    """Return the fields that ``result.json`` has in every experiment."""
    config = folder.config
    names = {section: config[section].name for section in ("experiment", "method", "model", "task")}
    return {**names, "seed": config.seed, "run_id": folder.id, "versions": versions()}


def mark_failed(folders: Sequence[RunFolder], reason: str) -> Outcome:
    """Record one reason as the end of runs that cannot be started; complete and locked ones stay as they are."""
    note = ""
    for folder in folders if is_main_process() else ():
        try:
            folder.claim()
            if folder.is_done:
                continue
            if not folder.path.exists():
                folder.start()
            note = note or _write_failure(folder, reason)
        except RunLocked:
            continue
        except RunError as error:
            note = note or f" ({error})"
        finally:
            folder.release()
    log_error(reason + note)
    return Outcome.FAILED


def describe_error(error: Exception) -> str:
    """Return any failure as one line."""
    return expected_reason(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"


def expected_reason(error: Exception) -> str | None:
    """Return one line for a failure of model, run, memory or disk; ``None`` for one of the program."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, (RunError, ModelError, DistributedError)):
        return with_remedy(error)
    cpu_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or cpu_memory:
        return f"out of memory (a smaller batch_size takes less): {first or 'no details available'}"
    if isinstance(error, OSError) and error.errno in DISK:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    return None


def _failure_reason(folder: RunFolder, error: BaseException) -> str:
    """Return why a run failed; record and re-raise what ends the process or is the configuration's fault."""
    stopped = "wrong configuration" if isinstance(error, ConfigError) else interruption(error)
    if stopped is not None:
        _write_failure(folder, stopped)
    if stopped is not None or not isinstance(error, Exception):
        raise error
    if expected_reason(error) is None:
        traceback.print_exc()
    return describe_error(error)


def _write_failure(folder: RunFolder, reason: str) -> str:
    """Record a failure; return what to add to the message where that is not possible."""
    if folder.is_done:  # not started again yet, or stopped just after its end: it stays done
        return ""
    try:
        folder.fail(reason)
    except OSError as error:
        return f" (and the status cannot be written: {error.strerror or error})"
    return ""
