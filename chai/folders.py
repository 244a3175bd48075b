"""Folders of the user. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return a folder of what can be computed again: below ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is ignored, as the XDG specification demands
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "chai-attention" / name
