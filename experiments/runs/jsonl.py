"""JSONL files that users give: task items, corpora."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError


def read_lines(path: Path, shuffle_seed: int | None = None) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines of a text file with their numbers, in their order or in a random one.

    Raises:
        RunError: The file cannot be read.
    """
    try:
        if shuffle_seed is not None:
            yield from _shuffled_lines(path, shuffle_seed)
            return
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _shuffled_lines(path: Path, seed: int) -> Iterator[tuple[int, str]]:
    """Shuffle the positions of the lines, not the lines: a corpus may be larger than the memory."""
    lines, position = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                lines.append((number, position))
            position += len(line)
        random.Random(seed).shuffle(lines)
        for number, position in lines:
            file.seek(position)
            yield number, file.readline().decode("utf-8").strip()


def read_jsonl(path: Path, columns: Sequence[str], shuffle_seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; a RunError if a line is not a JSON object with these columns."""
    return (row for _, row in read_numbered(path, columns, shuffle_seed))


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a JSONL file, with their line numbers, whose values fit into the columns of a table.

    Raises:
        RunError: As :func:`read_jsonl`; one of ``columns`` is null, or a key has values of several types.
    """
    rows = list(read_numbered(path, columns))
    first: dict[str, tuple[str, int]] = {}
    for number, row in rows:
        if nulls := [column for column in columns if row[column] is None]:
            raise RunError(f"{path}, line {number}: '{nulls[0]}' is null; valid: a value in every line")
        for key, value in row.items():
            if (kind := _kind(value)) is None:
                continue
            expected, where = first.setdefault(key, (kind, number))
            if kind != expected:
                raise RunError(
                    f"{path}, line {number}: '{key}' is {kind} ({json.dumps(value)[:40]}), in line {where} {expected}; "
                    "valid: one type in all lines"
                )
    return rows


def _kind(value: object) -> str | None:
    """Return the type of a JSON value in words; ``None`` for null."""
    if value is None:
        return None
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object"}
    if not isinstance(value, list):
        return kinds[type(value)]
    inner = next(filter(None, map(_kind, value)), None)
    return f"a list of {inner.removeprefix('a ')}" if inner else None


def read_numbered(
    path: Path, columns: Sequence[str], shuffle_seed: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file with their line numbers, as :func:`read_jsonl` does."""
    for number, line in read_lines(path, shuffle_seed):
        where = f"{path}, line {number},"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{where} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise RunError(f"{where} is not a JSON object")
        if missing := [column for column in columns if column not in row]:
            raise RunError(f"{where} has no {', '.join(missing)}; expected columns: {', '.join(columns)}")
        yield number, row
