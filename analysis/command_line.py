"""What the command lines of tables, figures and the report share: mistakes in one line, and what was left out."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with two."""
        complain(message)
        sys.exit(2)


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of its command line."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader has seen enough (| head); Python's own flush at exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def complain(message: str) -> None:
    """One line about what went wrong, to standard error."""
    print(f"error: {message}", file=sys.stderr)


def unknown(what: str, name: str, valid: Sequence[str]) -> str:
    """``unknown table 'tabel2' (did you mean 'table2'?); valid: table1, table2``."""
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown {what} '{name}'{hint}; valid: {', '.join(valid)}"


def tell_left_out(left_out: Mapping[Path, str], told: set[Path]) -> None:
    """A line for each run's folder that couldn't be used.

    Args:
        left_out: folders, and why.
        told: those of which it was said already; added to.
    """
    for folder, reason in left_out.items():
        if folder not in told:
            print(f"left out: {folder}: {reason}", file=sys.stderr)
            told.add(folder)
