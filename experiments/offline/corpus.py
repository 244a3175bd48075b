"""Text to look at heads with: the embedded model's own, a local file, or a data set of the hub, read as a stream."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from experiments.config.schema import CorpusConfig
from experiments.runs.folder import RunError


def texts(corpus: CorpusConfig, seed: int, skip: int = 0) -> Iterator[str]:
    """The corpus's texts in its own order, always the same.

    Args:
        corpus: where from.
        seed: of the embedded generator.
        skip: texts to leave out at the start.

    Raises:
        RunError: there is no such file, line or data set.
    """
    if corpus.path is not None:
        return itertools.islice(_lines(Path(corpus.path), corpus.column), skip, None)
    if corpus.hub_id is not None:
        return _from_hub(corpus, skip)
    return _generated(seed, skip)


def source(corpus: CorpusConfig) -> str:
    """Where the texts come from, for people; no path of this machine."""
    if corpus.path is not None:
        return Path(corpus.path).name
    if corpus.hub_id is not None:
        return "/".join(filter(None, (corpus.hub_id, corpus.subset, corpus.split)))
    return "experiments/microworld/documents.py"


def _lines(path: Path, column: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if path.suffix != ".jsonl":
                    yield line.strip()
                    continue
                try:
                    text = json.loads(line)[column]
                except (ValueError, TypeError, KeyError):
                    raise RunError(f"{path}, line {number}, is no JSON object with a '{column}'") from None
                if not isinstance(text, str):
                    raise RunError(f"{path}, line {number}: '{column}' is no text")
                yield text
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"can't read the corpus {path}: {reason}") from None


def _from_hub(corpus: CorpusConfig, skip: int) -> Iterator[str]:
    from datasets import load_dataset

    try:
        stream = load_dataset(
            corpus.hub_id, corpus.subset, split=corpus.split, revision=corpus.revision, streaming=True
        )
        for row in stream.skip(skip):
            yield row[corpus.column]
    except Exception as error:  # the hub, the network and the file formats fail in many unrelated types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"can't read the corpus {source(corpus)} from the hub: {reason[0]} (offline: corpus.path=FILE.jsonl)"
        ) from None


def _generated(seed: int, skip: int) -> Iterator[str]:
    from experiments.microworld.documents import document

    for number in itertools.count(skip):
        yield " ".join(text for text, _ in document(random.Random(f"{seed}-{number}"), phase=1))
