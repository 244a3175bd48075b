"""Token sequences to learn from: the embedded world's documents, or a text column of a JSONL file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiments.evaluation.tasks import read_rows
from experiments.microworld import training
from experiments.runs.folder import RunError

#: Batch number ``index`` as token ids ``[batch_size, length]``.
Batches = Callable[[int], Tensor]


def world_batches(seed: int, batch_size: int, length: int) -> Batches:
    """An endless stream of the documents that the embedded model was trained on (its second phase)."""
    return lambda index: training.make_batch(seed, index, 1, batch_size, length)[0]


def file_batches(
    path: Path, column: str, tokenizer: PreTrainedTokenizerBase, seed: int, batch_size: int, length: int, held_out: int
) -> tuple[Batches, Batches]:
    """The texts of a file, joined and cut into sequences, in an order drawn from the seed, over and over.

    Args:
        path: of a JSONL file.
        column: that holds the text.
        tokenizer: of the model.
        seed: of the order.
        batch_size: sequences in a batch.
        length: tokens in a sequence.
        held_out: batches to keep aside.

    Returns:
        batches to train on, and those kept aside.

    Raises:
        RunError: the file can't be read, has no such column, or too little text.
    """
    stream: list[int] = []
    for row in read_rows(path, [column]):
        stream += tokenizer(str(row[column])).input_ids
    sequences = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    aside = held_out * batch_size
    if len(sequences) < aside + batch_size:
        raise RunError(
            f"{path} has {len(stream)} tokens; needed are {(aside + batch_size) * length}: "
            f"{held_out} held-out batches and one to train on, of {batch_size} x {length}"
        )
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    first, rest = order[:aside], order[aside:]

    def take(places: list[int], index: int) -> Tensor:
        return sequences[[places[(index * batch_size + item) % len(places)] for item in range(batch_size)]]

    return lambda index: take(rest, index), lambda index: take(first, index)
