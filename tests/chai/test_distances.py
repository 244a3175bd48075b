"""Distances between heads, against loops in float64 over heads and tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from chai.clustering.distances import METRICS, head_costs, output_errors, output_factors
from chai.heads import repeat_kv
from chai.patching.model_info import find_blocks
from chai.patching.outputs import SKETCH_WIDTH, HeadOutputs, output_weight
from tests.models import HEADS, LAYERS, make_model

H, T, D = 5, 9, 3


def random_attention(seed: int = 0, rows: int = 2) -> torch.Tensor:
    """Causal attention ``[rows, H, T, T]``; the first two heads are equal, another sees the first token alone."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, H, T, T, generator=generator, dtype=torch.float64)
    scores[:, 1] = scores[:, 0]
    scores[:, 2, :, 0] += 60
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)


def entropy(row: torch.Tensor) -> float:
    return -sum(p * math.log(p) for p in row.tolist() if p > 0)


def cost_of(metric: str, one: torch.Tensor, other: torch.Tensor, product: torch.Tensor) -> float:
    """Cost of ``one`` ``[T, S]`` (of head h, with ``V_h W_O,h`` as ``product``) at the representative ``other``."""
    tokens, length = one.shape
    if metric == "attention":
        return float(sum((one[t, s] - other[t, s]) ** 2 for t in range(tokens) for s in range(length)))
    if metric == "cosine":
        return 1 - float((one * other).sum() / (one.norm() * other.norm()))
    if metric == "jensen_shannon":
        return sum(entropy((one[t] + other[t]) / 2) - (entropy(one[t]) + entropy(other[t])) / 2 for t in range(tokens))
    if metric == "sink_removed":
        total = 0.0
        for t in range(tokens):
            rest = [row[t, 1:] / max(float(row[t, 1:].sum()), 1e-6) for row in (one, other)]
            total += float((rest[0] - rest[1]).square().sum())
        return total
    return float(((other - one) @ product).square().sum())


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_that_of_a_loop(metric):
    """Costs of head h with representative r are at ``[h, r]``."""
    weights = random_attention()
    products = torch.randn(2, H, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = head_costs(metric, weights.float(), products.float())
    assert found.dtype == torch.float32 and found.shape == (2, H, H)
    for row, h, r in itertools.product(range(2), range(H), range(H)):
        expected = cost_of(metric, weights[row, h], weights[row, r], products[row, h])
        assert float(found[row, h, r]) == pytest.approx(expected, rel=2e-4, abs=2e-6), (row, h, r)
    symmetric = torch.allclose(found, found.transpose(1, 2), atol=1e-5)
    assert symmetric == (metric != "output")
    assert (found >= 0).all() and found[:, 0, 1].max() < 1e-6


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "cosine"])
def test_blocks_of_query_tokens_add_up(metric):
    weights, outputs = random_attention().float(), torch.randn(2, H, T, D)
    whole = head_costs(metric, weights, outputs)
    parts = [
        head_costs(metric, weights[:, :, begin : begin + 4, : begin + 4], outputs[:, :, : begin + 4])
        for begin in range(0, T, 4)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-4)
    padded = torch.cat([weights, torch.zeros(2, H, 3, T)], 2)  # tokens that are padding attend to nothing
    torch.testing.assert_close(head_costs(metric, padded, outputs), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_one_token_tells_no_heads_apart(metric):
    assert not head_costs(metric, torch.ones(1, H, 1, 1), torch.randn(1, H, 1, D)).any()


@pytest.mark.parametrize("width", [2, D, 7])
def test_factors_keep_lengths(width):
    """Also where W_O has fewer columns than a head has dimensions."""
    weight = torch.randn(width, H * D, generator=torch.Generator().manual_seed(0))
    factors, x = output_factors(weight, H), torch.randn(H, 4, D)
    for head in range(H):
        own = weight[:, head * D : (head + 1) * D]
        torch.testing.assert_close(factors[head] @ factors[head].T, own.T @ own, atol=1e-5, rtol=1e-4)
        lengths = (x[head].double() @ own.T.double()).norm(dim=1)
        torch.testing.assert_close((x[head] @ factors[head]).double().norm(dim=1), lengths, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "falcon", "opt", "gemma2"])
@torch.no_grad()
def test_errors_of_the_output_are_those_of_the_output_projection(family):
    """``|(A_r - A_h) V_h W_O,h|^2`` as the difference of the projection's output when head h attends as r does."""
    model = make_model(family)
    blocks = find_blocks(model)
    assert isinstance(blocks[0].output, Conv1D) == (family == "gpt2")
    kv_heads = getattr(model.config, "num_key_value_heads", None) or HEADS
    weights = torch.randn(LAYERS, 2, HEADS, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    values = torch.randn(LAYERS, 2, kv_heads, T, 8)
    outputs = HeadOutputs(model)(range(LAYERS), values)
    found = head_costs("output", weights, outputs)
    repeated = repeat_kv(values, HEADS, dim=2)
    for layer in range(LAYERS):
        heads = weights[layer] @ repeated[layer]  # [2, H, T, D]
        project = blocks[layer].output
        before = project(heads.transpose(1, 2).flatten(2))
        for h, r in itertools.product(range(HEADS), range(HEADS)):
            changed = heads.clone()
            changed[:, h] = weights[layer, :, r] @ repeated[layer, :, h]
            error = (project(changed.transpose(1, 2).flatten(2)) - before).square().sum((1, 2))
            torch.testing.assert_close(found[layer, :, h, r], error, atol=1e-4, rtol=2e-3)


@torch.no_grad()
def test_a_sketch_keeps_products():
    """A narrow W_O is exact, a wide one in the mean of many seeds; the same seed gives the same projection."""
    model = make_model("llama")
    values = torch.randn(2, HEADS, T, 8)
    weight = output_weight(find_blocks(model)[1].output)
    blocks = weight.unflatten(1, (HEADS, 8)).permute(1, 2, 0)
    torch.testing.assert_close(HeadOutputs(model).sketch(1, values, 0), values @ blocks)
    wide = torch.nn.Linear(64, 3 * SKETCH_WIDTH, bias=False)
    for layer in model.model.layers:
        layer.self_attn.o_proj = wide
    outputs, width = HeadOutputs(model), SKETCH_WIDTH
    exact = (values @ wide.weight.unflatten(1, (HEADS, 8)).permute(1, 2, 0)).flatten(1, 2)
    products, sketched = exact @ exact.mT, torch.zeros(2, HEADS * T, HEADS * T)
    for seed in range(60):
        one = outputs.sketch(1, values, seed)
        assert one.shape == (2, HEADS, T, width)
        sketched += one.flatten(1, 2) @ one.flatten(1, 2).mT / 60
    scale = exact.square().sum(-1).max()
    assert float((sketched - products).abs().max()) < 0.1 * scale
    assert torch.equal(outputs.sketch(1, values, 3), outputs.sketch(1, values, 3))
    assert not torch.equal(outputs.sketch(1, values, 3), outputs.sketch(2, values, 3))


def test_errors_of_pairs_have_the_representative_last():
    weights, outputs = random_attention(), torch.randn(2, H, T, D, dtype=torch.float64)
    errors = output_errors(weights, outputs)
    assert errors.shape == (2, H * H, T, D)
    for h, r in itertools.product(range(H), range(H)):
        expected = (weights[:, r] - weights[:, h]) @ outputs[:, h]
        torch.testing.assert_close(errors[:, h * H + r], expected)


@pytest.mark.parametrize("replaced", ["module", "int8"])
def test_a_quantized_output_projection_is_refused_in_one_line(replaced):
    model = make_model("llama")
    projection = model.model.layers[1].self_attn.o_proj
    if replaced == "module":
        model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(projection)
    else:
        projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"output projection is a \w+; valid: a linear layer that is not quantized"):
        HeadOutputs(model)
