"""The arithmetic of layers and models against torch's own counter and against live caches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chai.flops import clustered_prompt_flops, decode_entries
from chai.methods import Chai
from chai.patching.model_info import layer_shape, logit_weights
from tests.models import HEADS, LAYERS, make_batch, make_model


@pytest.mark.parametrize("family", ["llama", "opt", "mistral", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_operations_of_a_prompt_are_those_counted(family):
    """Eager attention multiplies whole squares; ours counts what causality leaves of them."""
    model, tokens = make_model(family), 24
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(make_batch([tokens])["input_ids"], logits_to_keep=1)
    shape = layer_shape(model)
    hidden = LAYERS * 2 * shape.head_dim * 2 * shape.num_heads * (tokens * tokens - tokens * (tokens + 1) // 2)
    expected = clustered_prompt_flops(shape, [HEADS] * LAYERS, tokens) + 2 * logit_weights(model) + hidden
    rotary = LAYERS * 0 if family == "opt" else counter.get_total_flops() - expected  # angles: positions x frequencies
    assert 0 <= rotary <= 2 * tokens * shape.head_dim
    assert counter.get_total_flops() == expected + rotary


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_entries_of_the_cache_are_those_that_live(family):
    model = make_model(family)
    method = Chai(clusters=[HEADS, 4, 2], group_aware=True)
    with method(model):
        cache = method.new_cache(model)
        model(make_batch([20])["input_ids"], past_key_values=cache)
    shape = layer_shape(model)
    assert cache.nbytes == 4 * sum(shape.cache_entries(20, k) for k in (HEADS, 4, 2))
    weights = sum(shape.weights(k) for k in (HEADS, 4, 2)) + logit_weights(model)
    assert decode_entries(shape, [HEADS, 4, 2], 20, 1) + logit_weights(model) == cache.nbytes // 4 + weights
    assert method.decode_bytes(model, 20, 1) == cache.nbytes + 4 * weights
    assert method.decode_bytes(model, 20, 3) == 3 * cache.nbytes + 4 * weights
    assert method.expected_cache_bytes(model, cache) == cache.nbytes


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_shared_values_cost_what_multi_head_attention_of_so_many_heads_does(family):
    """Half the heads, half of all that is theirs; all heads, the same as ever."""
    model = make_model(family)
    own, shared = layer_shape(model), layer_shape(model, shares_values=True)
    attention = model.model.layers[0].self_attn
    three = sum(getattr(attention, name).weight.numel() for name in ("q_proj", "k_proj", "v_proj"))
    assert shared.weights(HEADS) - shared.weights(HEADS // 2) == three // 2
    assert shared.attention_flops(9, HEADS // 2) == shared.attention_flops(9, HEADS) // 2
    assert shared.cache_entries(9, HEADS // 2) == own.cache_entries(9, HEADS) // 2
    assert shared.prefill_flops(9, HEADS) == own.prefill_flops(9, HEADS)
    assert decode_entries(shared, [HEADS], 9, 2) == decode_entries(own, [HEADS], 9, 2)


@pytest.mark.parametrize("shares_values", [False, True])
def test_fewer_clusters_never_cost_more(shares_values):
    shape = layer_shape(make_model("mistral"), shares_values)
    for cost in (shape.weights, lambda k: shape.prefill_flops(50, k), lambda k: decode_entries(shape, [k], 50, 2)):
        costs = [cost(k) for k in range(1, HEADS + 1)]
        assert costs == sorted(costs) and costs[0] < costs[-1]
