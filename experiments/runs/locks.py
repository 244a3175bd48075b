"""One process at a time for a run: a lock that dies with its holder, on local and network file systems.

The kernel's lock (``flock``) on ``<results_dir>/.locks/<run id>.lock`` ends with the process, however it ends. The file
itself stays: whoever deletes the file of a held lock breaks it. Where a file system refuses locks, a lease stands in:
a file with host and process, refreshed while its holder lives, which others take over once it isn't.
Neither torch nor a run's configuration is needed to ask who works on a run.
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
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

FOLDER = ".locks"
PATIENCE = 1.0  # seconds: somebody who only asks (`holder`) has the lock for an instant
LEASE = 60.0  # seconds without a refresh, seen by whoever waits, after which a lease is taken over
REFUSED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without locks answers


@dataclass(frozen=True)
class Holder:
    """The process that works on a run; what isn't known is ``None``.

    Attributes:
        host: name of its machine.
        pid: its number there.
        since: when it began, seconds since 1970.
    """

    host: str | None = None
    pid: int | None = None
    since: float | None = None

    def __str__(self) -> str:
        """``process 4711 on node3, since 2026-11-26 14:03``."""
        since = f", since {datetime.fromtimestamp(self.since):%Y-%m-%d %H:%M}" if self.since else ""
        return f"process {self.pid or 'unknown'} on {self.host or 'an unknown host'}{since}"


class Held(Exception):
    """Another process works on the run, which is no failure.

    Args:
        holder: who.
    """

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        super().__init__(str(holder))


class RunLock:
    """The lock of a run.

    Args:
        folder: of the run, which needn't exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.path = lock_path(folder)
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Take the lock, unless it is this object's already.

        Raises:
            Held: another process has it.
            OSError: its file can't be written.
        """
        if self._lock is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock: BaseFileLock = FileLock(self.path, fallback_to_soft=False, on_acquired=_sign)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise Held(_signature(self.path)) from None
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            lock = self._lease()
        self._lock = lock

    def release(self) -> None:
        """Let go; does nothing where nothing is held."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):  # a file system that is gone has no lock left
                lock.release()

    def _lease(self) -> BaseFileLock:
        """Take the lease; one that is being refreshed is another's, one that isn't is waited out."""
        path = self.path.with_suffix(".lease")
        lease = SoftFileLease(path, lease_duration=LEASE)
        seen = _modified(path)
        try:
            lease.acquire(
                timeout=2 * LEASE, poll_interval=LEASE / 60, cancel_check=lambda: _modified(path) not in (seen, None)
            )
        except Timeout:
            raise Held(_leaseholder(path)) from None
        return lease


def lock_path(folder: Path) -> Path:
    """Where the lock of a run's folder is: beside everything that a run's start clears away."""
    results = folder.parents[4]  # <results_dir>/<experiment>/<model>/<method>/<task>/<run id>
    return results / FOLDER / f"{folder.name}.lock"


def is_locked(folder: Path) -> Holder | None:
    """Who works on the run of this folder, or ``None``; creates and changes nothing.

    A lease on another machine tells the living from the dead by its age alone: its holder counts for two minutes more.
    """
    path = lock_path(folder)
    lease = path.with_suffix(".lease")
    refreshed = _modified(lease)
    if refreshed is not None and abs(time.time() - refreshed) < 2 * LEASE:
        found = _leaseholder(lease)
        here = found.host == socket.gethostname()
        return None if here and found.pid and not psutil.pid_exists(found.pid) else found
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _signature(path)
    except OSError:
        return None  # no locks here: the lease tells
    finally:
        os.close(descriptor)
    return None


def _sign(descriptor: int) -> None:
    """Write down who has the lock; it holds without that, on a full disk."""
    text = json.dumps(asdict(Holder(socket.gethostname(), os.getpid(), time.time()))) + "\n"
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _signature(path: Path) -> Holder:
    """Who has written itself down."""
    try:
        found: Any = json.loads(path.read_text())
        return Holder(found["host"], found["pid"], found["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return Holder()


def _leaseholder(path: Path) -> Holder:
    """Who has a lease."""
    owner = SoftFileLease(path, lease_duration=LEASE).owner
    return Holder(owner.hostname, owner.pid) if owner else Holder()


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
