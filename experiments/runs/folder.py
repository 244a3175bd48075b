"""A run's folder ``<results_dir>/<experiment>/<model>/<method>/<task>/<run id>/``; see docs/results.md for the fields.

It holds ``config.yaml`` (written before the work), ``status.json`` (running, then done or failed), ``result.json``
(written just before the status says done) and the experiment's own files.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.runs.files import overwrite, read_json, write_atomically, write_json
from experiments.runs.identity import run_id
from experiments.runs.locks import RunLock
from experiments.runs.state import is_done
from experiments.system import interrupts

#: Seconds between two updates of a run's progress in its status.
PROGRESS_EVERY = 5.0


class RunError(Exception):
    """Raised when a run cannot continue; becomes its status ``failed`` with this one line, and exit code 1."""


class RunFolder:
    """One run on disk: call ``start`` before the work, then ``finish`` with the result or ``fail``.

    A process that dies in between leaves the state ``running``, no ``result.json`` and no lock; the next start of the
    same configuration resumes or repeats the work.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.id = run_id(config)
        names = (config.experiment.name, config.model.name, config.method.name, config.task.name)
        self.path = Path(config.results_dir).joinpath(*map(str, names), self.id)
        self._lock = RunLock(self.path)
        self._progress: dict[str, Any] = {}
        self._updated = 0.0

    @property
    def is_done(self) -> bool:
        """True if the status says done and the result exists."""
        return is_done(self.path)

    def claim(self) -> None:
        """Lock the run until ``release`` or the end of this process; raise RunLocked if another one works on it."""
        with self._writing():
            self._lock.acquire()

    def release(self) -> None:
        """Unlock the run."""
        self._lock.release()

    def start(self, *, keep: tuple[str, ...] = ()) -> None:
        """Claim and create the folder, delete an earlier attempt's files except ``keep``, write the configuration."""
        self.claim()
        self._progress, self._updated = {}, time.monotonic()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            # Write the status first: if nothing can be written, an old result stays complete.
            self._write_status("running")
            # Delete the result next: it never stands beside another attempt's configuration or samples.
            (self.path / "result.json").unlink(missing_ok=True)
            for entry in self.path.iterdir():
                if entry.name not in ("status.json", *keep):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            text = OmegaConf.to_yaml(self.config, resolve=True)
            write_atomically(self.path / "config.yaml", lambda temporary: temporary.write_text(text))

    def progress(self, done: int, total: int) -> None:
        """Record the progress, at most every few seconds; raise Interrupted if a signal asked the process to stop."""
        interrupts.raise_if_interrupted()
        self._progress = {"progress": {"done": done, "total": total}}
        if time.monotonic() - self._updated >= PROGRESS_EVERY:
            self._updated = time.monotonic()
            with suppress(OSError):  # only a failure to write the work itself matters
                self._write_status("running")

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, then the status, so that ``done`` implies a complete result."""
        with interrupts.shielded():
            write_json(self.path / "result.json", result)
            self._progress = {}
            self._write_status("done")

    def fail(self, reason: str) -> None:
        """Record why the run ended; raise OSError if the status cannot be written, not even over the old one."""
        with interrupts.shielded():
            (self.path / "result.json").unlink(missing_ok=True)
            self._write_status("failed", error=reason)

    def _write_status(self, state: str, **more: Any) -> None:
        path, now = self.path / "status.json", time.time()
        before = read_json(path) or {}
        started = before.get("started") if state != "running" or self._progress else now
        status = {"state": state, "run_id": self.id, "started": started, "updated": now, **self._progress}
        status |= {"pid": os.getpid(), "host": socket.gethostname(), **more}
        try:
            write_json(path, status)
        except OSError:
            if state != "failed":
                raise
            overwrite(path, json.dumps(status))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"cannot write the run's folder {self.path}: {error.strerror or error}") from None
