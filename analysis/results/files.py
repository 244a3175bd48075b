"""Read the files of a run; one that is missing or corrupt gives a reason to skip the run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import yaml
from safetensors import SafetensorError

T = TypeVar("T")
#: The same as yaml.safe_load, in C where available: a results folder has hundreds of configurations.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: Errors of a parser that mean that the file is corrupt.
CORRUPT = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
    yaml.YAMLError, csv.Error, pa.ArrowException, SafetensorError,
)  # fmt: skip


class SkippedRun(Exception):
    """Raised when a run, or a file of the paper's numbers, cannot be used; the message is the reason."""


def read_file(path: Path, parse: Callable[[Path], T]) -> T:
    """Return what a parser makes of a file (SkippedRun: the file is missing, unreadable or corrupt)."""
    try:
        return parse(path)
    except FileNotFoundError:
        raise SkippedRun(f"no {path.name}") from None
    except CORRUPT:
        raise SkippedRun(f"{path.name} is corrupt") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises as :func:`read_file` does."""
    return read_file(path, lambda path: _mapping(json.loads(path.read_text())))


def read_yaml(path: Path, sections: Iterable[str]) -> dict[str, Any]:
    """Read a YAML mapping that must have mappings as sections; raises as :func:`read_file` does."""
    config = read_file(path, lambda path: _mapping(yaml.load(path.read_text(), Loader)))
    if not all(isinstance(config.get(name), dict) for name in sections):
        raise SkippedRun(f"{path.name} is corrupt")
    return config


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def read_table(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """Read a parquet file (SkippedRun: it is missing, corrupt, or lacks some of the columns)."""
    table = read_file(path, pd.read_parquet)
    require(path.name, columns, table)
    return table


def read_csv(path: Path) -> list[dict[str, str]]:
    """Parse a CSV file with a header; for :func:`read_file`."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def require(file: str, names: Iterable[str], available: Container[str]) -> None:
    """Raise :class:`SkippedRun` unless a file has all these fields, columns or arrays."""
    missing = [name for name in names if name not in available]
    if missing:
        raise SkippedRun(f"{file} has no {', '.join(missing)}")
