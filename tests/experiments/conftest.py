"""What tests of the experiments share: a small model and small data, made here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.evaluation.responses import SavedResponses
from experiments.microworld.items import write_tasks
from experiments.microworld.tokenizer import build_tokenizer, vocabulary


@dataclass
class Saves:
    """Batches that were saved; after ``limit`` of them (``None``: never) the next one is interrupted."""

    count: int = 0
    limit: int | None = None


@pytest.fixture
def saves(monkeypatch) -> Saves:
    """Count the batches that a scoring saves."""
    add, saves = SavedResponses.add, Saves()

    def counting(self, key, batch):
        if saves.count == saves.limit:
            raise KeyboardInterrupt
        saves.count += 1
        add(self, key, batch)

    monkeypatch.setattr(SavedResponses, "add", counting)
    return saves


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A random model with the embedded model's tokenizer, and a few items of each task."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder / "small")
    build_tokenizer().save_pretrained(folder / "small")
    write_tasks(folder / "data", count=12)
    return folder
