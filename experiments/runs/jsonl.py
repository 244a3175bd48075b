"""JSONL files that users give: task items, corpora."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines of a text file with their numbers; a RunError if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; a RunError if a line is not a JSON object with these columns."""
    for number, line in read_lines(path):
        where = f"{path}, line {number},"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{where} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise RunError(f"{where} is not a JSON object")
        if missing := [column for column in columns if column not in row]:
            raise RunError(f"{where} has no {', '.join(missing)}; expected columns: {', '.join(columns)}")
        yield row
