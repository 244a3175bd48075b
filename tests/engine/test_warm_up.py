"""The chain of warm-up tokens: where it begins, and what the prompt waits for."""

from __future__ import annotations

import pytest
import torch

import chai
from chai.engine import attention, plain
from chai.engine.warm_up import WarmUp
from chai.methods import Chai
from tests.engine.requests import expected
from tests.models import HEADS, make_batch, make_model


def watch(monkeypatch, log, owner, name, note):
    own = getattr(owner, name)

    def run(*args, **kwargs):
        log.append(note(*args, **kwargs))
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, run)


def test_the_prompt_waits_for_the_clusters_and_the_cache_alone(monkeypatch):
    """In each layer, the event of the prompt comes before the chain's attention and MLP."""
    log = []
    watch(monkeypatch, log, WarmUp, "_mark_ready", lambda *_: "ready")
    watch(monkeypatch, log, plain, "store_tokens", lambda *_: "stored")
    watch(monkeypatch, log, attention, "warm_up_attention", lambda *_: "attention")
    with chai.Engine(make_model("llama"), Chai(clusters=2)) as engine:
        engine.prefill(make_batch([9])["input_ids"])
    assert log == ["stored", "ready", "attention"] * 2 + ["stored", "ready"]


@pytest.mark.parametrize(
    ("counts", "lengths", "chain"),
    [
        ([HEADS, HEADS, 2], [9], [2]),
        ([HEADS, 3, HEADS], [9, 6], [1, 2]),  # warm-up tokens never become those of the clustered layers
        ([HEADS, HEADS, 2], [9, 5], [2]),
        ([HEADS, HEADS, 2], [9, 4], [0, 1, 2]),  # the prompt has no state of the fifth token
        ([HEADS, HEADS, 2], [5, 5], [0, 1, 2]),  # nothing but warm-up tokens
        ([3, HEADS, 2], [9], [0, 1, 2]),
    ],
)
def test_the_chain_begins_at_the_first_layer_with_clusters(monkeypatch, counts, lengths, chain):
    model, batch, log = make_model("llama"), make_batch(lengths), []
    watch(monkeypatch, log, WarmUp, "advance", lambda self, layer, *_, **__: layer.index)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with chai.Engine(model, Chai(clusters=counts), len(lengths)) as engine:
        engine.prefill(ids, mask)
        assert log == chain
        found = engine.generate(ids, 6, attention_mask=mask)
    assert torch.equal(found, expected(model, Chai(clusters=counts), batch, 6))
