"""Shared by the command lines of tables, figures and report: one-line errors, exit codes, skipped runs."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors take one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        sys.exit(fail(message))


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command line and exit with the code that it returns."""
    try:
        sys.exit(main())
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`). Python flushes standard output at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def fail(message: str, code: int = 2) -> int:
    """Print a one-line error to standard error; return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def unknown(kind: str, name: str, valid: Sequence[str]) -> str:
    """Return e.g. ``unknown table 'tabel2' (did you mean 'table2'?); valid: table1, table2``."""
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown {kind} '{name}'{hint}; valid: {', '.join(valid)}"


def check_names(kind: str, names: Sequence[str], valid: Sequence[str]) -> str | None:
    """Return the message for no names or an unknown one; ``None`` if all are valid."""
    if not names:
        return f"no {kind} named; valid: {', '.join(valid)}"
    return next((unknown(kind, name, valid) for name in names if name not in valid), None)


def report_skipped(skipped: Mapping[Path, str]) -> None:
    """Print a line for each folder that is skipped."""
    for folder, reason in skipped.items():
        print(f"left out: {folder}: {reason}", file=sys.stderr)
