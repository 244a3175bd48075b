"""Real texts on every machine: the documentation and the source code that come with Python."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from experiments.runs.folder import RunError


def read_python_texts(kind: str) -> Iterator[str]:
    """Yield the texts of a kind (:data:`experiments.config.schema.PYTHON_TEXTS`), by name.

    ``docs``: the topics of the language reference; ``code``: the top-level modules of the standard library;
    ``packages``: the modules inside its packages, by file name, so that the packages alternate. No text is in two.
    """
    if kind == "docs":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise RunError("this Python has no pydoc_data, which corpus=python_docs reads") from None
        yield from (topics[name] for name in sorted(topics))
        return
    for path in _modules(kind):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield text


def _modules(kind: str) -> list[Path]:
    """Return the library's top-level modules, or those of its packages; installed packages are not among them."""
    folder = Path(sysconfig.get_path("stdlib"))
    if kind == "code":  # without what the build or the distribution wrote
        return sorted(
            path for path in folder.glob("*.py") if not path.name.startswith(("_sysconfigdata", "sitecustomize"))
        )
    found = [path for path in folder.glob("*/*.py") if path.parent.name in sys.stdlib_module_names - {"pydoc_data"}]
    return sorted(found, key=lambda path: (path.name, path.parent.name))
