"""A run's folder: its identity, its state, and files that are either whole or not there.

``<results_dir>/<experiment>/<model>/<method>/<task>/<run id>/`` holds ``config.yaml`` (before the work),
``status.json`` (running, then done or failed), ``result.json`` (last but one) and whatever the experiment adds.
See docs/results.md for the fields.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.runs.locks import RunLock
from experiments.system import interrupts

#: What a run's result doesn't depend on: where it ran and where its files were.
MACHINE_ONLY = (
    "device", "results_dir", "force", "logger", "model.device_map", "model.resources", "model.path", "model.predictor",
    "model.profile", "task.data_dir", "experiment.install", "experiment.checkpoint_every", "corpus.path",
)  # fmt: skip
#: Paths that count by what the files there hold, of a folder all of them or the one that is named here.
BY_CONTENT = {"method.predictor": None, "experiment.corpus": None, "method.profile": "profile.json"}
#: Seconds between two notes of a run's progress in its status.
PROGRESS_EVERY = 5.0
#: Bytes left below which a file system counts as full, for writers that don't say why they failed.
FULL = 1 << 16


class RunError(Exception):
    """A run can't go on, for a reason that one line tells: its status becomes ``failed``, the exit code 1."""


def run_identity(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration without what is only about the machine; what a path held counts, by fingerprint."""
    whole = OmegaConf.to_container(config, resolve=True)
    assert isinstance(whole, dict)
    for key in MACHINE_ONLY:
        node, last = _parent(whole, key)
        node.pop(last, None)
    for key, name in BY_CONTENT.items():
        node, last = _parent(whole, key)
        if node.get(last) is not None:
            path = Path(node[last])
            if name is not None:
                path = (path if path.is_dir() else path.parent) / name
            node[last] = content_digest(path) or node[last]
    # What an experiment doesn't have at all can't tell its runs apart.
    return {str(key): value for key, value in whole.items() if value is not None or key not in ("profile", "corpus")}


def _parent(whole: dict[Any, Any], key: str) -> tuple[dict[Any, Any], str]:
    """Where a dotted key is found: the dictionary and its last part."""
    *parents, last = key.split(".")
    node: Any = whole
    for parent in parents:
        node = node.get(parent) or {}
    return node, last


def content_digest(path: Path) -> str | None:
    """Twelve hexadecimal digits for a file, or for the files of a folder; ``None`` where there are none."""
    files = [path] if path.is_file() else sorted(entry for entry in path.glob("*") if entry.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() if file != path else b"")
        with open(file, "rb") as handle:
            while block := handle.read(1 << 20):
                total.update(block)
    return total.hexdigest()[:12] if files else None


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that name a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def run_id(config: DictConfig) -> str:
    """The same for the same run, on any machine."""
    return digest(run_identity(config))


def settings_id(config: DictConfig) -> str:
    """The same for runs that differ in their method alone: what may be compared with each other."""
    identity = run_identity(config)
    identity.pop("method", None)
    return digest(identity)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place in one step.

    Raises:
        OSError: it can't be written. On a full disk this is what's raised, whatever ``write`` makes of that.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except Exception as error:
        if getattr(error, "errno", None) is None and is_full(path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_full(folder: Path) -> bool:
    """Whether the file system of a folder has no room left."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < FULL


def overwrite(path: Path, text: str) -> None:
    """Replace a small file's text where it lies, in one write: a full disk has no room for another file.

    The text is filled up with blanks to the old length, for cutting it short would be a second step.
    """
    with open(path, "r+b") as handle:
        text = text.rstrip("\n").ljust(os.fstat(handle.fileno()).st_size - 1) + "\n"
        os.pwrite(handle.fileno(), text.encode(), 0)
        os.fsync(handle.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or ``None`` where there is none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class RunFolder:
    """One run on disk.

    ``start`` before the work; then ``finish`` with the result, or ``fail``; :mod:`experiments.runs.experiment` does
    that for all experiments. A process that dies in between leaves ``running``, no ``result.json`` and no lock, and the
    next start of the same configuration goes on or does the work again.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.id = run_id(config)
        names = (config.experiment.name, config.model.name, config.method.name, config.task.name)
        self.path = Path(config.results_dir).joinpath(*map(str, names), self.id)
        self._lock = RunLock(self.path)
        self._progress: dict[str, Any] = {}
        self._noted = 0.0

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a run that is done."""
        return read_json(self.path / "result.json") if self.is_done else None

    @property
    def is_done(self) -> bool:
        """Whether the status says done and the result is there."""
        status = read_json(self.path / "status.json")
        return status is not None and status.get("state") == "done" and (self.path / "result.json").exists()

    def claim(self) -> None:
        """Take the run for this process, until ``release`` or the process's end; ``start`` does it, too.

        Raises:
            Held: another process works on it.
            RunError: the folder can't be written.
        """
        try:
            self._lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from None

    def release(self) -> None:
        """Let other processes have the run."""
        self._lock.release()

    def start(self, *, keep: tuple[str, ...] = ()) -> None:
        """Make the folder, drop what an earlier start left (but ``keep``, for resuming), write the configuration.

        Raises:
            Held: another process works on it.
            RunError: the folder can't be written.
        """
        self.claim()
        self._progress, self._noted = {}, time.monotonic()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The status goes first: where nothing can be written, an old result stays what it was, whole and done.
            self._status("running")
            # A result may never stand beside a configuration or samples that aren't its own.
            (self.path / "result.json").unlink(missing_ok=True)
            for entry in self.path.iterdir():
                if entry.name not in ("status.json", *keep):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            text = OmegaConf.to_yaml(self.config, resolve=True)
            write_atomically(self.path / "config.yaml", lambda temporary: temporary.write_text(text))
        except OSError as error:
            raise self._unwritable(error) from None

    def progress(self, done: int, total: int) -> None:
        """Note how far the work is: in the status every few seconds, if that can be written. Cheap: call it often.

        Raises:
            Interrupted: a signal asked the process to stop.
        """
        interrupts.check()
        self._progress = {"progress": {"done": done, "total": total}}
        if time.monotonic() - self._noted >= PROGRESS_EVERY:
            self._noted = time.monotonic()
            with suppress(OSError):  # what the work itself can't write is what counts
                self._status("running")

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, then the status: whoever reads ``done`` finds the result whole."""
        with interrupts.shielded():
            write_json(self.path / "result.json", result)
            self._progress = {}
            self._status("done")

    def fail(self, reason: str) -> None:
        """Record why the run ended; a folder that can't be written has no better place for the reason.

        Raises:
            OSError: the status can't be written, not even over the old one.
        """
        with interrupts.shielded():
            (self.path / "result.json").unlink(missing_ok=True)
            self._status("failed", error=reason)

    def _status(self, state: str, **more: Any) -> None:
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

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"can't write the run's folder {self.path}: {error.strerror or error}")


def versions() -> dict[str, str]:
    """Versions of everything that can move a number; of the project itself the commit as well."""
    from importlib.metadata import PackageNotFoundError, version

    from experiments.runs.code import describe

    found = {"python": platform.python_version(), "code": str(describe())}
    for package in ("chai-lab", "torch", "transformers", "lm-eval", "datasets", "scikit-learn", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
