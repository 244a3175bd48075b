"""The code that a run is done with: which commit, and a copy for jobs that start later than they were launched."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.config.schema import REPOSITORY
from experiments.runs.folder import read_json, write_json

#: What a job needs of the repository.
PARTS = ("run.py", "pyproject.toml", "conf", "chai", "experiments", "analysis")
RECORD = "code.json"


@dataclass(frozen=True)
class Code:
    """Identifies code: ``commit`` and ``dirty`` (files differ from it) are ``None`` without git."""

    commit: str | None
    dirty: bool | None
    digest: str  # of the files' names and contents

    def __str__(self) -> str:
        return f"{self.commit[:12]}{'+changes' if self.dirty else ''}" if self.commit else self.digest


def describe() -> Code:
    """The code that runs here: of a snapshot what was recorded with it, else what the working tree has now."""
    recorded = read_json(REPOSITORY / RECORD)
    if recorded is not None:
        return Code(**recorded)
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", *PARTS)
    return Code(commit.strip() if commit else None, bool(changes) if changes is not None else None, _digest(_files()))


def snapshot(folder: Path) -> Code:
    """Copy the code to ``folder``: what git tracks and what it doesn't ignore; all of it where there is no git.

    Raises:
        OSError: it can't be written.
    """
    code = describe()
    for name in [*_files(), *_compiled()]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    write_json(folder / RECORD, asdict(code))
    return code


def _files() -> list[str]:
    """The files of ``PARTS``, relative to the repository."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    if listed:
        names = set(listed.split("\0")) - {""}
    else:
        roots = [REPOSITORY / part for part in PARTS]
        paths = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
        names = {str(path.relative_to(REPOSITORY)) for path in paths if "__pycache__" not in path.parts}
    return sorted(name for name in names if (REPOSITORY / name).is_file())  # git lists what was deleted as well


def _compiled() -> list[str]:
    """Machine code that numba keeps beside its source, and takes as long as the source's time and size are the same."""
    return [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("chai/**/__pycache__/*.nb[ic]")]


def _digest(names: list[str]) -> str:
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name}\0".encode() + hashlib.sha256((REPOSITORY / name).read_bytes()).digest())
    return total.hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    """What git says of the repository; ``None`` without git, or where the repository isn't its own."""
    try:
        if not (REPOSITORY / ".git").exists():  # inside of someone else's repository its commit would mislead
            return None
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
