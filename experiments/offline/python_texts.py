"""Real texts on every machine: the documentation and the source code that come with Python."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from experiments.runs.folder import RunError

KINDS = ("docs", "code")


def read_python_texts(kind: str) -> Iterator[str]:
    """Yield the topics of the language reference (``docs``), or the library's top-level modules (``code``), by name."""
    if kind == "docs":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise RunError("this Python has no pydoc_data, which corpus=python_docs reads") from None
        yield from (topics[name] for name in sorted(topics))
        return
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield text
