"""Kernels of a layer against the same functions in plain torch, and these against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from chai.engine import plain
from chai.kernels import layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def close(found, wanted):
    """Equal but for the order of a sum in fp32, which may round differently in half precision.

    Triton's interpreter cuts bfloat16 off where a GPU rounds to nearest.
    """
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2.5e-2, torch.float16: 2e-3}[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# RMS norm.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 100), (3, 1, 33)])
@pytest.mark.parametrize("operations", [plain, layer])
def test_the_norm_is_that_of_the_model(dtype, shape, operations):
    x, y = torch.randn(2, *shape).to(dtype)
    norm = LlamaRMSNorm(shape[-1], EPS).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    weight = norm.weight.detach()
    with torch.no_grad():
        total, found = operations.rms_norm(x, weight, EPS, y)
        close(total, x + y)
        close(found, norm(x + y))
        same, found = operations.rms_norm(x[:, -1:], weight, EPS)  # not contiguous
        assert torch.equal(same, x[:, -1:])
        close(found, norm(x[:, -1:]))


# Rotary embedding and cache.


def tables(capacity, size, dtype):
    """Cosines and sines of the places, ``[S, D / 2]``."""
    angles = torch.arange(capacity)[:, None] * 100.0 ** -torch.linspace(0, 1, size // 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


CASES = {
    "prompt": {"q_len": 5, "position": 0},
    "one token": {"q_len": 1, "position": 7},
    "padding": {"q_len": 9, "position": 0, "starts": [0, 4], "skip": 3},
    "skip": {"q_len": 6, "position": 0, "skip": 4},
    "long": {"q_len": 19, "position": 0, "starts": [3, 0], "skip": 2},
    "padded token": {"q_len": 1, "position": 12, "starts": [5, 0]},
    "picked": {"q_len": 3, "position": 2, "picked": True},
    "norm": {"q_len": 4, "position": 0, "norm": True, "picked": True},
}


def arguments(dtype, size, q_len, position, starts=None, skip=0, picked=False, norm=False):
    """Arguments of ``rotate_and_store`` for two rows; the sources are parts of one product, as in a layer."""
    query, key, value = torch.randn(2, q_len, 3 + 2 + 2, size).to(dtype).split([3, 2, 2], 2)
    options = {"starts": None if starts is None else torch.tensor(starts, dtype=torch.int32), "skip": skip, "eps": EPS}
    counts = (2, 1, 1) if picked else (3, 2, 2)
    if picked:
        options["query_heads"] = torch.tensor([[2, 0], [1, 2]])
        options["key_heads"], options["value_heads"] = torch.tensor([[1], [0]]), torch.tensor([[0], [1]])
    if norm:
        options["query_norm"], options["key_norm"] = torch.rand(2, size).to(dtype) + 0.5
    keys, values = (torch.randn(2, count, 24, size).to(dtype) for count in counts[1:])
    place = torch.tensor([position], dtype=torch.int32)
    return (query, key, value, keys, values, *tables(24, size, dtype), place), options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rotation_and_cache_are_those_of_plain_torch(case, dtype):
    size = {"long": 16, "prompt": 8, "skip": 80, "norm": 24}.get(case, 12)
    given, options = arguments(dtype, size, **CASES[case])
    caches = [tensor.clone() for tensor in given[3:5]]
    wanted = plain.rotate_and_store(*given[:3], *caches, *given[5:], **options)
    found = layer.rotate_and_store(*given, **options)
    assert found.transpose(1, 2).is_contiguous()
    for one, other in zip((found, *given[3:5]), (wanted, *caches), strict=True):
        close(one, other)


@pytest.mark.parametrize("case", CASES)
def test_plain_rotation_is_that_of_transformers(case):
    """Token by token and head by head, in fp32."""
    settings = CASES[case]
    given, options = arguments(torch.float32, 16, **settings)
    query, key, value, keys, values, cos, sin, _ = given
    before, count = (keys.clone(), values.clone()), settings["q_len"]
    found = plain.rotate_and_store(*given, **options)
    starts, skip = settings.get("starts", [0, 0]), settings.get("skip", 0)

    def rotate(states, name, turn):
        if settings.get("norm"):
            norm = LlamaRMSNorm(16, EPS)
            norm.weight.data = options[f"{name}_norm"]
            states = norm(states)
        both = [table[turn].repeat(2)[None, None] for table in (cos, sin)]
        return apply_rotary_pos_emb(states.view(1, 1, 1, 16), states.view(1, 1, 1, 16), *both)[0].view(16)

    def heads(name, row, total):
        return options[f"{name}_heads"][row].tolist() if settings.get("picked") else range(total)

    for row in range(2):
        for token in range(count):
            place = settings["position"] + token
            turn = max(0, place - starts[row])
            kept = starts[row] <= place < starts[row] + skip
            for slot, head in enumerate(heads("query", row, 3)):
                close(found[row, slot, token], rotate(query[row, token, head], "query", turn))
            for slot, head in enumerate(heads("key", row, 2)):
                new = before[0][row, slot, place] if kept else rotate(key[row, token, head], "key", turn)
                close(keys[row, slot, place], new)
            for slot, head in enumerate(heads("value", row, 2)):
                new = before[1][row, slot, place] if kept else value[row, token, head]
                assert torch.equal(values[row, slot, place], new)
    places = torch.arange(settings["position"], settings["position"] + count)
    untouched = torch.ones(24, dtype=torch.bool)
    untouched[places] = False
    assert torch.equal(keys[:, :, untouched], before[0][:, :, untouched])
    assert torch.equal(values[:, :, untouched], before[1][:, :, untouched])


@pytest.mark.parametrize("operations", [plain, layer])
@pytest.mark.parametrize("picked", [False, True])
def test_warm_up_tokens_are_stored_from_each_start_on(operations, picked):
    """What would lie behind the end is lost, and nothing else is written."""
    key, value = torch.randn(2, 2, 3, 5, 12)
    heads = torch.tensor([[2], [1]]) if picked else None
    stored = 1 if picked else 3
    keys, values = torch.randn(2, stored, 16, 12), torch.randn(2, 3, 16, 12)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    for row, start in enumerate((4, 11)):
        for slot in range(stored):
            wanted_keys[row, slot, start : start + 5] = key[row, int(heads[row, 0]) if picked else slot]
        wanted_values[row, :, start : start + 5] = value[row]
    operations.store_tokens(key, value, keys, values, torch.tensor([4, 11], dtype=torch.int32), heads)
    assert torch.equal(keys, wanted_keys) and torch.equal(values, wanted_values)
    before = keys[:, :, :14].clone()
    operations.store_tokens(key, value, keys, values, torch.tensor([14, 15], dtype=torch.int32), heads)
    assert torch.equal(keys[:, :, :14], before)


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_any_number_of_warm_up_tokens_is_stored(tokens):
    key, value = torch.randn(2, 2, 3, tokens, 12)
    starts = torch.tensor([4, 0], dtype=torch.int32)
    found, wanted = ([torch.zeros(2, 3, 48, 12) for _ in range(2)] for _ in range(2))
    layer.store_tokens(key, value, *found, starts)
    plain.store_tokens(key, value, *wanted, starts)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.any()


# Activation.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("neurons", [8, 33, 1100])
def test_the_gated_activation(dtype, kind, neurons):
    product = 4 * torch.randn(2, 3, 2 * neurons)
    product[0, 0, :2] = torch.tensor([200.0, -200.0])
    product = product.to(dtype)
    gate, up = product.double().chunk(2, -1)
    active = gate.sigmoid() * gate if kind == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    wanted = (active * up).to(dtype)
    for operations in (plain, layer):
        close(operations.gated_activation(product, kind), wanted)
