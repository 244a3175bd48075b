"""Text of the offline phase: the embedded model's own, a local file, or a data set of the hub, read as a stream."""

from __future__ import annotations

import itertools
import platform
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiments.config.schema import CorpusConfig
from experiments.microworld.documents import document
from experiments.offline.python_texts import read_python_texts
from experiments.runs.folder import RunError
from experiments.runs.jsonl import read_jsonl, read_lines

#: Texts of a hub stream from which the next one is drawn, if the order is random.
SHUFFLE_BUFFER = 10_000
#: So many texts in a row that are too short end a search for longer ones.
MOST_SHORT = 10_000
#: Batch number ``index`` as token ids ``[batch_size, length]``.
Batches = Callable[[int], Tensor]


def read_texts(corpus: CorpusConfig, seed: int, skip: int = 0) -> Iterator[str]:
    """Yield the texts of a corpus after the first ``skip``; a RunError if it is unreadable.

    Seed 0 reads a file or a data set of the hub in its own order, any other seed in a random order that is always the
    same. All texts of a file are shuffled; of a stream, its files and a window of :data:`SHUFFLE_BUFFER` texts. The
    embedded generator makes other texts for each seed.
    """
    shuffle_seed = seed if is_shuffled(corpus, seed) else None
    if corpus.path is not None:
        return itertools.islice(_read_file(Path(corpus.path), corpus.column, shuffle_seed), skip, None)
    if corpus.python is not None:
        return itertools.islice(read_python_texts(corpus.python), skip, None)
    if corpus.hub_id is not None:
        return _read_hub(corpus, skip, shuffle_seed)
    documents = (document(random.Random(f"{seed}-{number}"), phase=1) for number in itertools.count(skip))
    return (" ".join(text for text, _ in pieces) for pieces in documents)


def long_texts(
    corpus: CorpusConfig, seed: int, skip: int, tokenizer: PreTrainedTokenizerBase, least: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of texts read so far and the token ids of each text of ``least`` tokens or more.

    It ends with the corpus, or after :data:`MOST_SHORT` shorter texts in a row: the embedded generator has no end.
    """
    short = 0
    for read, text in enumerate(read_texts(corpus, seed, skip), skip + 1):
        ids = tokenizer(text)["input_ids"]
        if len(ids) >= least:
            short = 0
            yield read, ids
        elif (short := short + 1) == MOST_SHORT:
            return


def is_shuffled(corpus: CorpusConfig, seed: int) -> bool:
    """Return whether the texts are read in a random order: those of a file or of the hub, unless the seed is 0."""
    return seed != 0 and (corpus.path is not None or corpus.hub_id is not None)


def describe_source(corpus: CorpusConfig) -> str:
    """Return a readable source of the texts, without any path of this machine."""
    if corpus.path is not None:
        return Path(corpus.path).name
    if corpus.python is not None:
        return f"Python {platform.python_version()}, {corpus.python}"
    if corpus.hub_id is not None:
        return "/".join(filter(None, (corpus.hub_id, corpus.subset, corpus.split)))
    return "experiments/microworld/documents.py"


def _read_file(path: Path, column: str, shuffle_seed: int | None) -> Iterator[str]:
    if path.suffix != ".jsonl":
        yield from (line for _, line in read_lines(path, shuffle_seed))
        return
    for number, row in enumerate(read_jsonl(path, [column], shuffle_seed), 1):
        if not isinstance(row[column], str):
            raise RunError(f"{path}, text {number}: '{column}' is not a string")
        yield row[column]


def _read_hub(corpus: CorpusConfig, skip: int, shuffle_seed: int | None) -> Iterator[str]:
    from datasets import load_dataset

    try:
        stream = load_dataset(
            corpus.hub_id, corpus.subset, split=corpus.split, revision=corpus.revision, streaming=True
        )
        if shuffle_seed is not None:
            stream = stream.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        for row in stream.skip(skip):
            yield row[corpus.column]
    except Exception as error:  # the hub, the network and the file formats fail in many unrelated types
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()
        raise RunError(
            f"cannot read the corpus {describe_source(corpus)} from the hub: {reason[0]} "
            "(offline: corpus.path=FILE.jsonl)"
        ) from None


def file_batches(
    path: Path, column: str, tokenizer: PreTrainedTokenizerBase, seed: int, batch_size: int, length: int, held_out: int
) -> tuple[Batches, Batches]:
    """Cut the texts of a JSONL file into endless training batches, shuffled, and ``held_out`` other batches."""
    stream: list[int] = []
    for row in read_jsonl(path, [column]):
        stream += tokenizer(str(row[column])).input_ids
    sequences = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    num_held_out = held_out * batch_size
    if len(sequences) < num_held_out + batch_size:
        raise RunError(
            f"{path} has {len(stream)} tokens; required are {(num_held_out + batch_size) * length}: "
            f"{held_out} held-out batches and one to train on, of {batch_size} x {length}"
        )
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    aside, rest = order[:num_held_out], order[num_held_out:]

    def batch(positions: list[int], index: int) -> Tensor:
        return sequences[[positions[(index * batch_size + item) % len(positions)] for item in range(batch_size)]]

    return lambda index: batch(rest, index), lambda index: batch(aside, index)
