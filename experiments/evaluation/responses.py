"""Answers of a scoring in progress, saved batch by batch, so that the next start of the same run goes on from there.

A JSON line for each batch of requests, appended as it is answered. The first line says what the answers depend on
beyond the run's configuration; where that isn't the same any more, they are left aside. A batch is known by the tokens
of its requests: it is either answered again as a whole, with the same neighbours and padding, or not at all, so numbers
are those of a scoring without a stop, to the last bit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.config.schema import REPOSITORY

FILE = "answers.jsonl"
SYNC_EVERY = 30.0  # seconds of answers that a machine's power cut may cost; a killed process costs none

#: A request as lm-eval encodes it: its strings, the tokens of the context, those of the continuation.
Request = tuple[Any, list[int], list[int]]


@dataclass
class Answered:
    """A batch that is answered.

    Attributes:
        answers: of each request: log-likelihood in nats, and whether the continuation is what the model would write.
        held: the batch's part of the ledger of bytes.
        seconds: it took.
    """

    answers: list[tuple[float, bool]]
    held: dict[str, Any]
    seconds: float


class Answers:
    """The answered batches of a run, on disk.

    Args:
        path: of the file, which needn't exist.
        others: files of processes that answer for the same run; what is there by now is known as well.
        about: what the answers depend on beyond the run's identity, JSON-like.

    Attributes:
        restored: requests that an earlier start answered, of those asked for again.
        seconds: they took then.
        left_aside: which parts of ``about`` differ from those of answers that were there, and are of no use.
    """

    def __init__(self, path: Path, about: dict[str, Any], others: Sequence[Path] = ()) -> None:
        self.path = path
        self.restored = 0
        self.seconds = 0.0
        self.left_aside: list[str] = []
        self._batches: dict[str, Answered] = {}
        self._descriptor: int | None = None
        self._synced = time.monotonic()
        about = json.loads(json.dumps(about))
        for other in others:
            self._read(other, about)
        self._open(about)

    def find(self, key: str) -> Answered | None:
        """The answers to a batch by its key, if an earlier start had them."""
        found = self._batches.get(key)
        if found is not None:
            self.restored += len(found.answers)
            self.seconds += found.seconds
        return found

    def add(self, key: str, batch: Answered) -> None:
        """Save a batch that was just answered.

        Raises:
            OSError: it can't be written; what was there stays whole.
        """
        self._append({"batch": key, **asdict(batch)})

    def close(self) -> None:
        """Let go of the file.

        Raises:
            OSError: a network file system couldn't write what it had taken.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _open(self, about: dict[str, Any]) -> None:
        whole, self.left_aside = self._read(self.path, about)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._descriptor, whole)  # what a dying process left behind the last whole line
        if not whole:
            self._append({"about": about})

    def _read(self, path: Path, about: dict[str, Any]) -> tuple[int, list[str]]:
        """Take in what is there; returns how many bytes of it are whole lines of use, and what makes it of none."""
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0, []
        whole = 0
        for line in lines:
            try:
                record = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if not whole:
                    there = record["about"]
                    differs = sorted(key for key in about.keys() | there.keys() if about.get(key) != there.get(key))
                    if differs:
                        return 0, differs
                else:
                    answers = [(float(nats), bool(greedy)) for nats, greedy in record["answers"]]
                    self._batches[record["batch"]] = Answered(answers, record["held"], record["seconds"])
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            whole += len(line)
        return whole, []

    def _append(self, record: dict[str, Any]) -> None:
        """Add a line; one that can't be written whole is taken back."""
        assert self._descriptor is not None
        data = json.dumps(record).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            if time.monotonic() - self._synced > SYNC_EVERY:
                os.fsync(self._descriptor)
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise OSError(error.errno or errno.EIO, error.strerror, str(self.path)) from None


def batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Which requests lm-eval answers in one forward pass: their positions, batch by batch, longest first.

    Requests of the same tokens, but for the last one, share a row, whose length is that of the one with the longest
    continuation.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for position, (_, context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(position)

    def order(row: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, continuation = requests[max(row, key=lambda position: len(requests[position][2]))]
        return -len(context) - len(continuation), (*context, *continuation)

    ordered = sorted(rows.values(), key=order)
    return [[position for row in ordered[at : at + size] for position in row] for at in range(0, len(ordered), size)]


def batch_key(requests: Sequence[Request]) -> str:
    """What a batch is known by: a digest of all its tokens."""
    total = hashlib.sha256()
    for _, context, continuation in requests:
        total.update(array("q", [len(context), len(continuation), *context, *continuation]).tobytes())
    return total.hexdigest()[:16]


def code_digest() -> str:
    """A digest of the code that answers depend on: the library, and how it is asked."""
    total = hashlib.sha256()
    for path in sorted((REPOSITORY / "chai").rglob("*.py")):
        total.update(path.read_bytes())
    for name in ("responses", "lm", "tasks"):
        total.update((REPOSITORY / "experiments" / "evaluation" / f"{name}.py").read_bytes())
    return total.hexdigest()[:16]
