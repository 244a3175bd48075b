"""Every family under every clustering method, in every way of running: equal to the stock model.

One head of each layer has the queries and keys of another (for CHAI-QKV its values, too). With a cluster for these two
and one for every other head, the result must be that of the untouched model to the rounding of the type.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai.methods import Chai, ChaiOutput, ChaiQkv, ChaiStatic, Random
from chai.methods.base import Method
from chai.offline.head_profile import FORMAT, HeadProfile, model_shape
from chai.patching.model_info import find_blocks
from tests.chai.planted import PLANTED, planted_model
from tests.models import FAMILIES, HEADS, LAYERS, make_batch, relative_error

METHODS = ("chai", "chai_static", "chai_output", "chai_qkv", "random")
#: Relative difference of logits that rounding explains.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: Calls: the lengths of the sequences (different ones are padded on the left), and options of ``generate``.
FORWARD = {"batch": [12, 12, 12], "left padding": [11, 14, 7]}
GENERATE = {
    "generate": ([9, 3], {}),
    "beams": ([9, 9], {"num_beams": 2}),
    "chunked prefill": ([9, 9], {"prefill_chunk_size": 4}),
}
NEW_TOKENS = 4
#: Ways to generate with each type. The type is that of the products, not of what beams and chunks do to a cache.
GENERATED = {torch.float32: tuple(GENERATE), torch.bfloat16: ("generate",), torch.float16: ()}


def build(name: str, model: PreTrainedModel, folder: Path) -> Method:
    """The method with one cluster for the planted heads and one for every other head."""
    if name not in ("chai_static", "chai_output"):
        return {"chai": Chai, "chai_qkv": ChaiQkv, "random": Random}[name](clusters=HEADS - 1)
    representatives = np.full((LAYERS, HEADS), -1)
    representatives[:, : HEADS - 1] = torch.cat([clusters.representatives for clusters in PLANTED]).numpy()
    assignment = torch.cat([clusters.assignment for clusters in PLANTED]).numpy()
    arrays = {
        "clusters": np.full(LAYERS, HEADS - 1),
        "assignment": assignment,
        "representatives": representatives,
        "cost_output": (assignment[:, :, None] != assignment[:, None]).astype(np.float32),
    }
    about = {"model": {"name": "planted", **model_shape(model.config)}, "corpus": {"samples": 1, "tokens": 1}}
    HeadProfile({"format": FORMAT, **about}, arrays).save(folder)
    if name == "chai_output":  # with the errors of the request's own tokens
        return ChaiOutput(profile=str(folder), prior=1.0)
    return ChaiStatic(profile=str(folder))


@cache
def stock(family: str, values: bool, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The planted model, and what it gives untouched: logits of real tokens, or sequences and their scores."""
    model = planted_model(family, values=values).to(dtype)
    logits = {name: forward(model, name) for name in FORWARD}
    return model, logits | {name: generate(model, name) for name in GENERATED[dtype]}


def forward(model: PreTrainedModel, name: str) -> Tensor:
    """Logits of the real tokens, ``[N, vocabulary]``."""
    batch = make_batch(FORWARD[name])
    return model(**batch).logits[batch["attention_mask"].bool()]


def generate(model: PreTrainedModel, name: str, **options: object) -> tuple[Tensor, Tensor | None]:
    """Prompts and their continuations without sampling, and of beams the log-probabilities of the continuations."""
    lengths, own = GENERATE[name]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **own, **options}
    found = model.generate(**make_batch(lengths), **options, return_dict_in_generate=True, output_scores=True)
    mean = found.get("sequences_scores")
    return found.sequences, None if mean is None else mean * NEW_TOKENS


def log_likelihood(model: PreTrainedModel, name: str, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Of the new tokens, ``[B, NEW_TOKENS]``: their log-probability, and by how much another one would be better."""
    mask = torch.nn.functional.pad(make_batch(GENERATE[name][0])["attention_mask"], (0, NEW_TOKENS), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    scores = model(sequences, attention_mask=mask, position_ids=positions).logits.float().log_softmax(-1)
    scores = scores[:, -NEW_TOKENS - 1 : -1]
    chosen = scores.gather(2, sequences[:, -NEW_TOKENS:, None])[..., 0]
    return chosen, scores.amax(-1) - chosen


def check_sequences(model: PreTrainedModel, name: str, actual: Tensor, scores: Tensor | None, expected: Tensor) -> None:
    """The same tokens in fp32; in half precision, where ties fall either way, tokens as good by the stock model.

    Beams have the log-probabilities that the stock model gives them: their rows of the cache were never exchanged.
    """
    if model.dtype == torch.float32:
        assert torch.equal(actual, expected), name
    likelihood, missed = log_likelihood(model, name, actual)
    slack = 10 * TOLERANCE[model.dtype]
    if scores is None:
        assert float(missed.max()) < slack, name
    else:
        assert float((scores.float() - likelihood.sum(1)).abs().max()) < slack, name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equal_heads_change_nothing(family, name, tmp_path, record_property):
    for dtype, tolerance in TOLERANCE.items():
        model, expected = stock(family, name == "chai_qkv", dtype)
        method = build(name, model, tmp_path)
        for mode in FORWARD:
            with method(model):
                logits = forward(model, mode)
            assert logits.dtype == dtype
            assert relative_error(logits, expected[mode]) < tolerance, (dtype, mode)
        for mode in GENERATED[dtype]:
            with method(model):
                sequences, scores = generate(model, mode)
            check_sequences(model, mode, sequences, scores, expected[mode][0])
    record_property("matrix_cases", sum(len(FORWARD) + len(modes) for modes in GENERATED.values()))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_a_cache(family, name, tmp_path, record_property):
    types = [dtype for dtype, modes in GENERATED.items() if "generate" in modes]
    record_property("matrix_cases", len(types))
    for dtype in types:
        model, expected = stock(family, name == "chai_qkv", dtype)
        with build(name, model, tmp_path)(model):
            assert model(**make_batch([9]), use_cache=False).past_key_values is None
            sequences, _ = generate(model, "generate", use_cache=False)
        check_sequences(model, "generate", sequences, None, expected["generate"][0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_other_clusters_change_something(family):
    """The oracle can fail: with the planted heads apart and two others joined, the logits are visibly others."""
    model, expected = stock(family, False, torch.float32)
    with Random(clusters=HEADS - 1, seed=1)(model):
        assert relative_error(forward(model, "batch"), expected["batch"]) > 1e-3


@torch.no_grad()
def test_norms_of_other_heads_change_something():
    """The oracle sees a norm that is applied to the wrong head (StableLM has one of each head)."""
    model, expected = planted_model("stablelm", values=False), stock("stablelm", False, torch.float32)[1]
    with Random(clusters=HEADS - 1)(model):
        assert relative_error(forward(model, "batch"), expected["batch"]) < 1e-5
        for block in find_blocks(model):
            for kind in "qk":
                norm = getattr(block.attention, f"{kind}_layernorm")
                norm.norms = torch.nn.ModuleList([*norm.norms[1:], norm.norms[0]])
        assert relative_error(forward(model, "batch"), expected["batch"]) > 1e-3
