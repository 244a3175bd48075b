"""Atomic files, JSON, and digests of contents."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Free bytes below which a file system counts as full, for writers whose errors have no errno.
FULL = 1 << 16
BLOCK = 1 << 20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place in one step.

    Raises:
        OSError: the file cannot be written. On a full disk this replaces whatever ``write`` raised.
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
    """Return whether the file system of a folder has no room left."""
    try:
        return shutil.disk_usage(folder).free < FULL
    except OSError:
        return False


def overwrite(path: Path, text: str) -> None:
    """Replace a small file's text in place, in one write: a full disk has no room for another file.

    The text is padded with blanks to the old length, since truncating would be a second step.
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
    """Read the JSON object in a file; ``None`` if there is none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits that identify a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def content_digest(path: Path, digits: int = 12) -> str | None:
    """Return hexadecimal digits that identify a file, or the files in a folder; ``None`` if there are none."""
    files = [path] if path.is_file() else sorted(entry for entry in path.glob("*") if entry.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() if file != path else b"")
        with open(file, "rb") as handle:
            while block := handle.read(BLOCK):
                total.update(block)
    return total.hexdigest()[:digits] if files else None
