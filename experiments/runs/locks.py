"""Locks that let one process at a time work on a run: the kernel's (``flock``) on ``.locks/<run id>.lock``.

They end with the process, however it ends; the file stays, since deleting the file of a held lock breaks it. If a file
system refuses locks, a lease is used: a file that its owner refreshes, and that others take over when it no longer is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

FOLDER = ".locks"
PATIENCE = 1.0  # seconds: a process that only looks at the lock (`lock_owner`) holds it for an instant
LEASE = 60.0  # seconds without a refresh, as seen by a waiting process, after which a lease is taken over
REFUSED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a file system without locks


@dataclass(frozen=True)
class LockOwner:
    """The process that works on a run; unknown attributes are ``None``."""

    host: str | None = None
    pid: int | None = None
    since: float | None = None  # start of its work, seconds since 1970

    def __str__(self) -> str:
        """Return ``process 4711 on node3, since 2026-11-26 14:03``."""
        since = f", since {datetime.fromtimestamp(self.since):%Y-%m-%d %H:%M}" if self.since else ""
        return f"process {self.pid or 'unknown'} on {self.host or 'an unknown host'}{since}"


class RunLocked(Exception):
    """Raised when another process works on the run, which is not a failure."""

    def __init__(self, owner: LockOwner) -> None:
        super().__init__(owner)
        self.owner = owner


class RunLock:
    """The lock of the run with this folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.path = lock_path(folder)
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Acquire the lock, unless this object has it already; raise RunLocked if another process has it."""
        if self._lock is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock: BaseFileLock = FileLock(self.path, fallback_to_soft=False, on_acquired=_write_owner)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise RunLocked(_read_owner(self.path)) from None
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            lock = self._acquire_lease()
        self._lock = lock

    def release(self) -> None:
        """Release the lock, if this object has it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):  # a file system that is gone has no lock left
                lock.release()

    def _acquire_lease(self) -> BaseFileLock:
        """Acquire the lease: give up as soon as it is refreshed, take it over once it has expired."""
        path = self.path.with_suffix(".lease")
        lease, seen = SoftFileLease(path, lease_duration=LEASE), _modified(path)

        def refreshed() -> bool:
            return _modified(path) not in (seen, None)

        try:
            lease.acquire(timeout=2 * LEASE, poll_interval=LEASE / 60, cancel_check=refreshed)
        except Timeout:
            raise RunLocked(_lease_owner(path)) from None
        return lease


def lock_path(folder: Path) -> Path:
    """Return the path of a run's lock, which is outside the folder that a run's start clears."""
    results = folder.parents[4]  # <results_dir>/<experiment>/<model>/<method>/<task>/<run id>
    return results / FOLDER / f"{folder.name}.lock"


def lock_owner(folder: Path) -> LockOwner | None:
    """Return the process that works on the run of this folder, or ``None``, without changing anything.

    A lease of another machine can be judged only by its age: its owner counts for two minutes more.
    """
    path = lock_path(folder)
    lease = path.with_suffix(".lease")
    refreshed = _modified(lease)
    if refreshed is not None and abs(time.time() - refreshed) < 2 * LEASE:
        owner = _lease_owner(lease)
        local = owner.host == socket.gethostname()
        return None if local and owner.pid and not psutil.pid_exists(owner.pid) else owner
    try:
        with open(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(path)
    except OSError:
        pass  # no lock, or no locks on this file system, and there is no lease
    return None


def _write_owner(descriptor: int) -> None:
    """Write the lock's owner to its file; on a full disk the lock holds without it."""
    text = json.dumps(asdict(LockOwner(socket.gethostname(), os.getpid(), time.time()))) + "\n"
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _read_owner(path: Path) -> LockOwner:
    try:
        return LockOwner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return LockOwner()


def _lease_owner(path: Path) -> LockOwner:
    owner = SoftFileLease(path, lease_duration=LEASE).owner
    return LockOwner(owner.hostname, owner.pid) if owner else LockOwner()


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
