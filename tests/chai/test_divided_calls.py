"""What dividing a call relies on: no cache for the caller, causal masks, positions, frequencies by the length."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chai.methods import Chai, ChaiQkv, Random, Spatten
from chai.methods.base import Method
from chai.patching.model_info import sliding_windows
from tests.chai.planted import plant, planted_model
from tests.models import FAMILIES, HEADS, SHAPE, make_batch, make_model, relative_error

METHODS = {
    "all_heads": Chai(clusters=HEADS),
    "chai": Chai(clusters=[HEADS, 3, 2]),
    "chai_qkv": ChaiQkv(clusters=[HEADS, 3, 2]),
    "random": Random(clusters=3),
    "spatten": Spatten(),
}
OPTIONS = {"max_new_tokens": 8, "do_sample": False}


def skip_if_refused(method: Method, model: PreTrainedModel) -> None:
    """Skip a family that SpAtten refuses (tests/chai/test_spatten.py verifies that it does)."""
    if isinstance(method, Spatten) and any(sliding_windows(model.config)):
        pytest.skip("token pruning refuses sliding windows")


# Without a cache.


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, name) for family in FAMILIES for name in ("chai", "spatten")]
    + [("llama", name) for name in METHODS if name not in ("chai", "spatten")],
)
@torch.no_grad()
def test_generate_gives_the_same_text_without_a_cache(family, method):
    model, method = make_model(family), METHODS[method]
    skip_if_refused(method, model)
    with method(model):
        for lengths, beams in (([12], 1), ([12, 3, 7], 2)):
            batch = make_batch(lengths)
            expected = model.generate(**batch, **OPTIONS, num_beams=beams)
            found = model.generate(**batch, **OPTIONS, num_beams=beams, use_cache=False)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["chai", "spatten"])
@torch.no_grad()
def test_no_cache_is_returned_that_the_caller_does_not_want(method):
    model, method, ids = make_model("llama"), METHODS[method], make_batch([12])["input_ids"]
    with method(model):
        output = model(ids, use_cache=False)
        assert output.past_key_values is None and "past_key_values" not in output
        assert not any(isinstance(item, Cache) for item in model(ids, use_cache=False, return_dict=False))
        assert isinstance(model(ids).past_key_values, Cache)
        cache = DynamicCache(config=model.config)  # as the stock model: one that is passed is used and returned
        assert model(ids, past_key_values=cache, use_cache=False).past_key_values is cache
        assert cache.get_seq_length() == 12
        model.config.use_cache = False
        assert model(ids).past_key_values is None


@torch.no_grad()
def test_a_call_after_a_generation_without_a_cache_has_a_context_of_its_own():
    """The prompt length of generate() belongs to its own calls alone."""
    model, method, ids = make_model("llama"), Spatten(), make_batch([20])["input_ids"]
    with method(model):
        expected = model(ids).logits
        model.generate(ids[:, :4], **OPTIONS, use_cache=False)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert "prepare_inputs_for_generation" not in model.__dict__


# Masks and positions.


def causal_mask(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@pytest.mark.parametrize(
    "method", [Chai(clusters=HEADS - 1), Spatten(tokens=1.0, heads=1.0, values=0.999)], ids=["chai", "spatten"]
)
@torch.no_grad()
def test_what_is_not_causal_is_refused(method):
    model, ids = planted_model("llama", values=False), make_batch([20])["input_ids"]
    prefix = causal_mask(20)
    prefix[..., :8, :8] = True
    packed = torch.arange(10).repeat(2)[None]
    with method(model):
        for mask in (prefix, torch.zeros(1, 1, 20, 20).masked_fill(~prefix, torch.finfo(torch.float32).min)):
            with pytest.raises(ValueError, match="lets tokens attend to later ones .*valid: a causal mask"):
                model(ids, attention_mask=mask)
        for use_cache in (True, False):
            with pytest.raises(ValueError, match="position_ids do not count up by one .*valid: one sequence in each"):
                model(ids, position_ids=packed, use_cache=use_cache)
        with pytest.raises(ValueError, match="is_causal=False"):
            model(ids, is_causal=False)
    with pytest.raises(ValueError, match="is_causal=False"):
        model.config.is_causal = False
        with method(model):
            model(ids)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral_sliding", "gpt_neox"])
@torch.no_grad()
def test_masks_of_the_caller_that_are_causal_are_exact(family):
    """Two sequences in one row, kept apart by the mask; and a mask of numbers."""
    model, ids = planted_model(family, values=False), make_batch([20])["input_ids"]
    apart = causal_mask(20)
    apart[..., 10:, :10] = False
    numbers = torch.zeros(1, 1, 20, 20).masked_fill(~apart, torch.finfo(torch.float32).min)
    for mask in (causal_mask(20), apart, numbers):
        arguments = {"attention_mask": mask, "position_ids": torch.arange(10).repeat(2)[None]}
        expected = model(ids, **arguments).logits
        with Chai(clusters=HEADS - 1)(model):
            assert relative_error(model(ids, **arguments).logits, expected) < 1e-5


# Frequencies that depend on the length.

ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def rope_model(kind: str) -> LlamaForCausalLM:
    """A new model, for these frequencies also depend on the calls before."""
    shape = {**SHAPE, "max_position_embeddings": 16 if kind == "dynamic" else 64}
    torch.manual_seed(0)
    parameters = {"rope_theta": 10_000.0, **copy.deepcopy(ROPES[kind])}
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=parameters))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(4.0)
    return plant(model.eval(), values=False)


@pytest.mark.parametrize("lengths", [[40], [40, 3, 21], [12]], ids=["long", "padded", "growing"])
@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_a_divided_prompt_has_the_frequencies_of_the_whole(kind, lengths):
    batch, method = make_batch(lengths), Chai(clusters=HEADS - 1)
    real = batch["attention_mask"].bool()
    stock, model = rope_model(kind), rope_model(kind)
    expected = stock(**batch).logits[real]
    with method(model):
        assert relative_error(model(**batch).logits[real], expected) < 1e-5
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}):
        stock, model = rope_model(kind), rope_model(kind)
        expected = stock.generate(**batch, max_new_tokens=20, do_sample=False, **options)
        with method(model):
            assert torch.equal(model.generate(**batch, max_new_tokens=20, do_sample=False, **options), expected)


# Messages.


@pytest.mark.parametrize("method", [Chai(clusters=3), Spatten()], ids=["chai", "spatten"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_is_refused_in_one_line(family, method):
    model, ids = make_model(family), make_batch([12])["input_ids"]
    skip_if_refused(method, model)
    for part in model.modules():
        if isinstance(part, nn.Dropout):  # which the methods refuse in training
            part.p = 0.0
    model.gradient_checkpointing_enable()
    with method(model):
        model(ids)  # evaluation has none
        model.train()
        with pytest.raises(ValueError, match="gradient checkpointing .*valid: model.gradient_checkpointing_disable"):
            model(ids)
        model.gradient_checkpointing_disable()
        model(ids, labels=ids).loss.backward()


def test_an_offloaded_cache_is_named():
    model, ids = make_model("llama"), make_batch([12])["input_ids"]
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # its constructor needs an accelerator
    with Chai(clusters=3)(model), pytest.raises(ValueError, match="an offloaded cache: pass no cache"):
        model(ids, past_key_values=cache)
