"""Operations of each method against torch's counter: on the model itself, or on a slow loop over tokens and heads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma3ForCausalLM,
    GPTJConfig,
    MambaConfig,
    MptConfig,
    PhiConfig,
)

import chai.patching.projections
from chai.cache import cache_bytes
from chai.flops import LayerFlops, clustered_prompt_flops, prompt_flops
from chai.methods import Chai, Dejavu, Mha, Random, Spatten
from chai.methods.dejavu import num_kept
from chai.offline.predictor import Predictor, model_shape
from chai.patching.model_info import layer_shape, logit_weights
from tests.models import HEADS, LAYERS, make_batch, make_model, make_nested_model

TOKENS = 12


PLAIN = [Mha(), Random(clusters=[HEADS, 4, 2]), Chai(clusters=4), Chai(clusters=[HEADS, 4, 2], tokens=3)]
#: Other choices of representatives may read more key heads than so many representatives need.
GROUPED = [Mha(), Chai(clusters=4, group_aware=True), Chai(clusters=[HEADS, 4, 2], tokens=3, group_aware=True)]


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in ("llama", "opt", "gpt_neox") for method in PLAIN]
    + [("mistral", method) for method in GROUPED]
    + [(family, PLAIN[3]) for family in ("gpt2", "falcon", "falcon_multi_query")]
    + [(family, GROUPED[2]) for family in ("gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe", "olmo2")],
)
@torch.no_grad()
def test_a_model_that_reads_token_by_token_does_what_is_counted(monkeypatch, family, method):
    """Token by token, nothing is computed that causality hides, so the count is exact."""
    monkeypatch.setattr(chai.patching.projections, "OVERHEAD", 0)  # slices are taken however small
    model = make_model(family)
    model.set_attn_implementation("eager")
    ids = make_batch([TOKENS])["input_ids"]
    with (
        sdpa_kernel(SDPBackend.MATH),
        method(model),
        FlopCounterMode(display=False) as counter,
    ):  # others aren't counted
        cache = method.new_cache(model)
        for place in range(TOKENS):
            model(ids[:, place : place + 1], past_key_values=cache)
    size, first = layer_shape(model).head_dim, method.warmup_tokens
    clustered = sum(k < HEADS for k in method.heads_kept(model.config))
    features = clustered * HEADS * 2 * size * first**2  # scores once more, to find the membership
    logits = (TOKENS - 1) * 2 * logit_weights(model)  # of each token, of which the last one's count
    assert counter.get_total_flops() == method.prompt_flops(model, TOKENS) + features + logits


@pytest.mark.parametrize(
    "config", [BloomConfig, GPTJConfig, MptConfig, PhiConfig], ids=lambda config: config.model_type
)
@torch.no_grad()
def test_multi_head_attention_is_counted_in_other_families(config):
    """All matrices of the layers, and the attention, as torch's counter finds them on a causal prompt's tokens."""
    names = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
    names = {config.attribute_map.get(name, name): value for name, value in names.items()}
    model = AutoModelForCausalLM.from_config(config(**names, **({"rotary_dim": 4} if config is GPTJConfig else {})))
    model.config._attn_implementation = "eager"
    method, ids = Mha(), torch.arange(1, 9)[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cache = method.new_cache(model)
        for place in range(8):
            model(ids[:, place : place + 1], past_key_values=cache)
    assert counter.get_total_flops() == method.prompt_flops(model, 8) + 7 * 2 * logit_weights(model)
    assert method.expected_cache_bytes(model, cache) == cache_bytes(cache)


def test_a_text_model_inside_of_another_counts_as_it_does_alone():
    whole, method = make_nested_model(), Mha()
    text = Gemma3ForCausalLM(whole.config.get_text_config())
    method.check(whole.config)
    assert method.heads_kept(whole.config) == [HEADS] * LAYERS
    assert method.prompt_flops(whole, 8) == method.prompt_flops(text, 8)
    assert method.decode_bytes(whole, 8, 2) == method.decode_bytes(text, 8, 2)
    cache = method.new_cache(whole)
    with torch.no_grad(), method(whole):
        for token in range(12):  # more than the window
            whole(torch.tensor([[token]]), past_key_values=cache)
    assert method.expected_cache_bytes(whole, cache) == cache_bytes(cache)
    with pytest.raises(ValueError, match="model family 'gemma3' is not supported"):
        Chai(clusters=2).check(whole.config)


def test_latent_attention_and_models_without_attention():
    """What cannot be counted is none; what has no heads is refused."""
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    config = DeepseekV3Config(
        **sizes, vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    assert Mha().prompt_flops(model, 8) is None
    assert math.isnan(Mha().prefill_flops(model, 8)) and math.isnan(Mha().decode_bytes(model, 8, 1))
    with pytest.raises(ValueError, match="family 'mamba' has no attention heads"):
        Mha().check(MambaConfig())


@pytest.mark.parametrize("family", ["llama", "opt", "mistral", "gpt_neox", "gemma2", "gpt2", "mixtral"])
def test_all_heads_are_multi_head_attention(family):
    model = make_model(family)
    tokens = 2048  # more than the model has positions
    expected = clustered_prompt_flops(layer_shape(model), [HEADS] * LAYERS, tokens) + 2 * logit_weights(model)
    idle = Spatten(tokens=1.0, heads=1.0, values=1.0)
    for method in (Mha(), Chai(clusters=HEADS), Random(clusters=HEADS), Dejavu("oracle", sparsity=0.0), idle):
        assert method.prompt_flops(model, 2048) == expected


def test_before_the_membership_is_known_all_heads_count():
    model = make_model("llama")
    early, late = Chai(clusters=2), Chai(clusters=2, tokens=30)
    assert early.prompt_flops(model, 5) == Mha().prompt_flops(model, 5)
    assert early.prompt_flops(model, 20) < late.prompt_flops(model, 20) == Mha().prompt_flops(model, 20)


@dataclass
class Kept:
    """What a token gets: its heads' indices for scores, values and outputs, its neurons, its shares of the tokens."""

    scores: list[int]
    values: list[int]
    outputs: list[int]
    neurons: list[int]
    read: float = 1.0  # share of the values of the tokens that it sees
    seen: float = 1.0  # share of the tokens up to it that it sees
    projected: list[int] = field(default_factory=list)  # heads whose keys and values later tokens need, besides its own


def multiply_by_hand(layer, kept: list[Kept], predictors=()) -> None:
    """A LLaMA layer's products for one token after another, with just the rows and columns that each token gets."""
    attention, mlp, size = layer.self_attn, layer.mlp, layer.self_attn.head_dim
    query, key, value = (
        getattr(attention, name).weight.unflatten(0, (-1, size)) for name in ("q_proj", "k_proj", "v_proj")
    )
    output = attention.o_proj.weight.unflatten(1, (-1, size))
    keys, values = torch.zeros(HEADS, len(kept), size), torch.zeros(HEADS, len(kept), size)
    for place, own in enumerate(kept):
        hidden = torch.randn(1, attention.q_proj.in_features)
        for network in predictors:
            network(hidden)
        outputs = torch.zeros(HEADS, size)
        seen = math.ceil(own.seen * (place + 1) - 1e-9)
        read = math.ceil(own.read * seen - 1e-9)
        for head in {*own.scores, *own.projected}:
            keys[head, place] = hidden @ key[head].T
        for head in own.scores:
            (hidden @ query[head].T) @ keys[head, :seen].T
        for head in {*own.values, *own.projected}:
            values[head, place] = hidden @ value[head].T
        for head in own.values:
            outputs[head] = torch.rand(1, read) @ values[head, :read]
        for head in own.outputs:
            outputs[None, head] @ output[:, head].T
        hidden @ mlp.gate_proj.weight[own.neurons].T
        (hidden @ mlp.up_proj.weight[own.neurons].T) @ mlp.down_proj.weight[:, own.neurons].T


def counted(layers, kept: list[list[Kept]], predictors=()) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for index, layer in enumerate(layers):
            multiply_by_hand(layer, kept[index], [network[str(index)] for network in predictors])
    return counter.get_total_flops()


def drawn(count: int, of: int) -> list[int]:
    return torch.randperm(of)[:count].tolist()


def test_shared_values():
    class Shared(Random):
        shares_values = True

    model, everything = make_model("llama"), list(range(HEADS))
    neurons = list(range(model.config.intermediate_size))
    kept = [[Kept(own, own, everything, neurons)] * TOKENS for own in (everything, [1, 3, 4, 5], [0, 7])]
    method = Shared(clusters=[HEADS, 4, 2])
    assert method.prompt_flops(model, TOKENS) == counted(model.model.layers, kept) + 2 * logit_weights(model)
    assert method.prompt_flops(model, TOKENS) < Random(clusters=[HEADS, 4, 2]).prompt_flops(model, TOKENS)


@pytest.mark.parametrize(("sparsity", "mlp_sparsity"), [(0.5, 0.0), (0.3, 0.4), (0.0, 0.7)])
def test_contextual_sparsity_with_its_predictors(tmp_path, sparsity, mlp_sparsity):
    model = make_model("llama")
    neurons = model.config.intermediate_size
    predictor = Predictor(model_shape(model.config), 6, neurons, 10)
    predictor.save(tmp_path, lambda path, fill: fill(path))
    method = Dejavu(str(tmp_path), sparsity, mlp_sparsity)
    kept = []
    for _ in range(LAYERS):
        chosen = [drawn(num_kept(HEADS, sparsity), HEADS) for _ in range(TOKENS)]
        kept.append([Kept(own, own, own, drawn(num_kept(neurons, mlp_sparsity), neurons)) for own in chosen])
    asked = [network for network, share in ((predictor.heads, sparsity), (predictor.neurons, mlp_sparsity)) if share]
    expected = counted(model.model.layers, kept, asked) + 2 * logit_weights(model)
    assert method.prompt_flops(model, TOKENS) == expected
    oracle = counted(model.model.layers, kept) + 2 * logit_weights(model)
    assert Dejavu("oracle", sparsity, mlp_sparsity).prompt_flops(model, TOKENS) == oracle


def test_dense_layers_need_no_predictor(tmp_path):
    model, everything = make_model("llama"), list(range(HEADS))
    neurons = model.config.intermediate_size
    every_neuron = list(range(neurons))
    predictor = Predictor(model_shape(model.config), 6, neurons, 10)
    predictor.save(tmp_path, lambda path, fill: fill(path))
    method = Dejavu(str(tmp_path), 0.5, 0.4, dense_layers=1, dense_mlp_layers=[1])
    kept, asked = [], []
    for layer in range(LAYERS):
        chosen = [everything if layer == 0 else drawn(HEADS // 2, HEADS) for _ in range(TOKENS)]
        active = [every_neuron if layer == 1 else drawn(num_kept(neurons, 0.4), neurons) for _ in range(TOKENS)]
        kept.append([Kept(own, own, own, few) for own, few in zip(chosen, active, strict=True)])
        asked.append([predictor.heads[str(layer)]] * (layer != 0) + [predictor.neurons[str(layer)]] * (layer != 1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for layer, tokens, networks in zip(model.model.layers, kept, asked, strict=True):
            multiply_by_hand(layer, tokens, networks)
    assert method.prompt_flops(model, TOKENS) == counter.get_total_flops() + 2 * logit_weights(model)


def test_cascade_pruning_per_row():
    """All tokens run, with the keys and values of all heads for later tokens; each sees a share, in its own heads."""
    model = make_model("llama")
    neurons, everything = list(range(model.config.intermediate_size)), list(range(HEADS))
    method = Spatten(0.4, 0.5, 0.6, 0.3, 0.3, pruning="per_row")
    kept = []
    for seen, left in ((1.0, 8), (0.7, 6), (0.4, 4)):
        own = [drawn(left, HEADS) for _ in range(TOKENS)]
        kept.append([Kept(heads, heads, heads, neurons, 0.6, seen, everything) for heads in own])
    expected = counted(model.model.layers, kept) + 2 * logit_weights(model)
    assert method.prompt_flops(model, TOKENS) == expected
    assert Mha().prompt_flops(model, TOKENS) > expected > replace(method, pruning="global").prompt_flops(model, TOKENS)


def test_cascade_pruning():
    model = make_model("llama")
    neurons = list(range(model.config.intermediate_size))
    method = Spatten(tokens=0.4, heads=0.5, values=0.6, unpruned_tokens=0.3, unpruned_heads=0.3)
    tokens, heads = [12, 9, 5], [8, 6, 4]  # shares 1, 0.7, 0.4 and 1, 0.75, 0.5, rounded up
    kept = []
    for count, left in zip(tokens, heads, strict=True):
        own = drawn(left, HEADS)
        kept.append([Kept(own, own, own, neurons, read=0.6)] * count)
    expected = counted(model.model.layers, kept) + 2 * logit_weights(model)
    assert method.prompt_flops(model, TOKENS) == expected


def test_grouped_queries_need_as_many_key_heads_as_their_heads_do():
    shape = layer_shape(make_model("mistral"))
    assert (shape.num_heads, shape.num_kv_heads) == (8, 4)
    costs = [prompt_flops(shape, [LayerFlops(kept, kept, kept)], 1) for kept in (8, 7, 6)]
    one = 2 * (shape.query_weights + shape.output_weights) // 8 + 4 * shape.head_dim
    assert costs[0] - costs[1] == one  # the seventh and eighth read the same key head
    assert costs[1] - costs[2] == one + 2 * (shape.key_weights + shape.value_weights) // 4
