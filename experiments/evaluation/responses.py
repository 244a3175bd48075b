"""Responses of a scoring in progress, saved batch by batch, so that a rerun resumes after the last saved batch.

The file has a JSON line for each batch; its first line records what responses depend on beyond the configuration. A
batch is restored or scored again as a whole, so results equal those of an uninterrupted scoring bit by bit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config.schema import REPOSITORY

FILE = "answers.jsonl"
WORKER_FILE = "answers.rank{}.jsonl"
SYNC_EVERY = 30.0  # seconds of responses that a power failure may cost; a killed process costs none

#: A request as lm-eval encodes it: its strings, the tokens of the context, those of the continuation.
Request = tuple[Any, list[int], list[int]]
#: A log-likelihood in nats, and True if the continuation is the greedy one; or a generated text.
Response = tuple[float, bool] | str


def response_file(rank: int) -> str:
    """Return the name of a process's file: ``answers.jsonl`` of rank 0, ``answers.rank1.jsonl``, ..."""
    return FILE if rank == 0 else WORKER_FILE.format(rank)


def worker_files(folder: Path, world_size: int) -> list[str]:
    """Return the names of the files that processes other than rank 0 write, or left in an earlier attempt."""
    earlier = (path.name for path in folder.glob(WORKER_FILE.format("*")))
    return sorted({*earlier, *(response_file(rank) for rank in range(1, world_size))})


@dataclass
class BatchResponses:
    """Responses of a batch."""

    responses: list[Any]  # a Response for each request
    cache_stats: dict[str, Any]  # of the batch's KV cache, JSON-like
    seconds: float  # that scoring took


class SavedResponses:
    """Scored batches of a run on disk, discarded if ``about``, what else they depend on (JSON-like), has changed."""

    def __init__(self, path: Path, about: dict[str, Any], others: Sequence[Path] = ()) -> None:
        self.path = path
        self.restored = 0  # requested responses that an earlier attempt had saved
        self.seconds = 0.0  # that their scoring took
        self._batches: dict[str, BatchResponses] = {}
        self._synced = time.monotonic()
        about = json.loads(json.dumps(about))
        for other in others:
            self._read(other, about)
        valid_bytes, self.discarded = self._read(path, about)  # discarded: keys of about that have changed
        # Cut off what a dying process left behind the last complete line.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._descriptor, valid_bytes)
        if not valid_bytes:
            self._append({"about": about})

    def find(self, key: str) -> BatchResponses | None:
        """Return the saved responses of a batch, and count them as restored."""
        batch = self._batches.get(key)
        if batch is not None:
            self.restored += len(batch.responses)
            self.seconds += batch.seconds
        return batch

    def add(self, key: str, batch: BatchResponses) -> None:
        """Save a batch; an OSError if it cannot be written, and the file stays as it was."""
        self._append({"batch": key, "answers": batch.responses, "held": batch.cache_stats, "seconds": batch.seconds})

    def close(self) -> None:
        """Close the file; an OSError if a network file system could not write what it had accepted."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _read(self, path: Path, about: dict[str, Any]) -> tuple[int, list[str]]:
        """Restore a file's batches; return the bytes of its valid lines, and what has changed if none is valid."""
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0, []
        valid_bytes = 0
        for line in lines:
            try:
                record = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if not valid_bytes:
                    saved = record["about"]
                    changed = sorted(key for key in about.keys() | saved.keys() if about.get(key) != saved.get(key))
                    if changed:
                        return 0, changed
                else:
                    responses = [_read_response(answer) for answer in record["answers"]]
                    self._batches[record["batch"]] = BatchResponses(responses, record["held"], record["seconds"])
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            valid_bytes += len(line)
        return valid_bytes, []

    def _append(self, record: dict[str, Any]) -> None:
        """Append a line; remove it again if it cannot be written completely."""
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


def _read_response(answer: Any) -> Response:
    """Return a response as it was before it was written as JSON."""
    if isinstance(answer, str):
        return answer
    nats, greedy = answer
    return float(nats), bool(greedy)


def make_batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Return the positions of the requests that lm-eval scores in one forward pass, batch by batch, longest first."""
    # Requests of the same tokens but for the last one share a row.
    rows: dict[tuple[int, ...], list[int]] = {}
    for position, (_, context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(position)

    def order(row: list[int]) -> tuple[int, tuple[int, ...]]:
        # The request with the longest continuation decides.
        _, context, continuation = requests[max(row, key=lambda position: len(requests[position][2]))]
        return -len(context) - len(continuation), (*context, *continuation)

    ordered = sorted(rows.values(), key=order)
    starts = range(0, len(ordered), batch_size)
    return [[position for row in ordered[start : start + batch_size] for position in row] for start in starts]


def batch_key(requests: Sequence[Request]) -> str:
    """Return a digest of all tokens of a batch."""
    total = hashlib.sha256()
    for _, context, continuation in requests:
        total.update(array("q", [len(context), len(continuation), *context, *continuation]).tobytes())
    return total.hexdigest()[:16]


def text_key(arguments: Sequence[Any]) -> str:
    """Return a digest of the prompts of a batch and of their settings (JSON-like)."""
    return hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_digest() -> str:
    """Return a digest of the code that responses depend on: the library, and how it is called."""
    total = hashlib.sha256()
    for path in sorted((REPOSITORY / "chai").rglob("*.py")):
        total.update(path.read_bytes())
    for name in ("responses", "lm", "tasks", "samples", "perplexity", "passkey"):
        total.update((REPOSITORY / "experiments" / "evaluation" / f"{name}.py").read_bytes())
    return total.hexdigest()[:16]
