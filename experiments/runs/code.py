"""Version of the code that a run uses, and snapshots of it for jobs that start later than they were launched."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.config.schema import REPOSITORY
from experiments.runs.files import read_json, write_json

#: Parts of the repository that a job needs.
PARTS = ("run.py", "pyproject.toml", "conf", "chai", "experiments")
RECORD = "code.json"
PACKAGES = ("chai-attention", "torch", "transformers", "lm-eval", "datasets", "scikit-learn", "numpy")


@dataclass(frozen=True)
class Code:
    """A version of the code; ``commit`` and ``dirty`` (files differ from it) are ``None`` without git."""

    commit: str | None
    dirty: bool | None
    digest: str  # of the files' names and contents

    def __str__(self) -> str:
        return f"{self.commit[:12]}{'+changes' if self.dirty else ''}" if self.commit else self.digest


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a number; of the project itself, the commit as well."""
    from importlib.metadata import PackageNotFoundError, version  # here: slow, and --help does not need it

    found = {"python": platform.python_version(), "code": str(current_code())}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def current_code() -> Code:
    """Return the version of the running code: as recorded in a snapshot, else of the working tree."""
    recorded = read_json(REPOSITORY / RECORD)
    if recorded is not None:
        return Code(**recorded)
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", *PARTS)
    total = hashlib.sha256()
    for name in _files():
        total.update(f"{name}\0".encode() + hashlib.sha256((REPOSITORY / name).read_bytes()).digest())
    dirty = bool(changes) if changes is not None else None
    return Code(commit.strip() if commit else None, dirty, total.hexdigest()[:12])


def snapshot(folder: Path) -> Code:
    """Copy the code to ``folder``: all files that git does not ignore, or all files without git."""
    code = current_code()
    # numba's compiled code beside its source is valid as long as the source's time and size are the same (copy2).
    compiled = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("chai/**/__pycache__/*.nb[ic]")]
    for name in [*_files(), *compiled]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    write_json(folder / RECORD, asdict(code))
    return code


def _files() -> list[str]:
    """Return the files of ``PARTS``, relative to the repository."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    if listed:
        names = set(listed.split("\0"))
    else:
        paths = [path for part in PARTS for path in (REPOSITORY / part, *(REPOSITORY / part).rglob("*"))]
        names = {str(path.relative_to(REPOSITORY)) for path in paths if "__pycache__" not in path.parts}
    return sorted(name for name in names if (REPOSITORY / name).is_file())  # git lists deleted files as well


def _git(*arguments: str) -> str | None:
    """Return git's output for the repository; ``None`` without git, or if the repository is not under git."""
    if not (REPOSITORY / ".git").exists():  # an enclosing repository's commit would be misleading
        return None
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
