"""Token sequences to train on, from a text column of a JSONL file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiments.runs.folder import RunError
from experiments.runs.jsonl import read_jsonl

#: Batch number ``index`` as token ids ``[batch_size, length]``.
Batches = Callable[[int], Tensor]


def file_batches(
    path: Path, column: str, tokenizer: PreTrainedTokenizerBase, seed: int, batch_size: int, length: int, held_out: int
) -> tuple[Batches, Batches]:
    """Join the texts of a JSONL file and cut them into sequences, in an order drawn from the seed, over and over.

    Returns:
        training batches, and ``held_out`` batches that are excluded from them.
    """
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
