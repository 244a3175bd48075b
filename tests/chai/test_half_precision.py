"""Half precision on a CPU, with and without instructions for it: as near to fp32 as the model alone is."""

from __future__ import annotations

import pytest
import torch

import chai.attention.dispatch
from chai import cpu
from chai.methods import Chai, ChaiQkv, Dejavu, Random, Spatten
from chai.patching.model_info import find_blocks
from tests.chai.planted import planted_model, rows
from tests.models import HEADS, make_batch, make_model, relative_error

#: Exact with a planted pair of heads, so that no choice of clusters or tokens hides behind rounding.
EXACT = {
    "chai": Chai(clusters=HEADS - 1),
    "group_aware": Chai(clusters=HEADS - 1, group_aware=True),
    "chai_qkv": ChaiQkv(clusters=HEADS),
    "spatten": Spatten(tokens=1.0, heads=1.0, values=0.999),
}


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def _instructions(request, monkeypatch):
    """Let the CPU have bfloat16 instructions, or none."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: request.param)
    cpu.gemm_dtype.cache_clear()
    yield
    cpu.gemm_dtype.cache_clear()


@pytest.mark.usefixtures("_instructions")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("longest_dense", [768, 0], ids=["dense", "grouped"])
@torch.no_grad()
def test_every_method_is_within_the_rounding_of_the_model_alone(family, dtype, longest_dense, monkeypatch):
    monkeypatch.setattr(chai.attention.dispatch, "DENSE_ON_CPU", longest_dense)
    model, half = planted_model(family, values=False), planted_model(family, values=False).to(dtype)
    for lengths in ([40], [40, 3, 21]):
        batch = make_batch(lengths)
        real = batch["attention_mask"].bool()
        expected = model(**batch).logits[real]
        rounding = relative_error(half(**batch).logits[real], expected)
        for name, method in EXACT.items():
            with method(half):
                logits = half(**batch).logits
            assert logits.dtype == dtype
            assert relative_error(logits[real], expected) < 1.5 * rounding, name
        with Random(clusters=3)(model):
            expected = model(**batch).logits[real]
        with Random(clusters=3)(half):
            assert relative_error(half(**batch).logits[real], expected) < 3 * rounding


@pytest.mark.usefixtures("_instructions")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_decodes_as_fp32(dtype):
    """Every step of a text from the cache, not only the prompt."""
    model, half = planted_model("llama", values=False), planted_model("llama", values=False).to(dtype)
    ids = make_batch([30, 30])["input_ids"]
    expected = model(ids).logits
    rounding = relative_error(half(ids).logits, expected)
    for name, method in EXACT.items():
        with method(half):
            cache = method.new_cache(half)
            parts = [half(part, past_key_values=cache).logits for part in ids.split([12, *[1] * 18], 1)]
        assert relative_error(torch.cat(parts, 1), expected) < 1.5 * rounding, name


@pytest.mark.usefixtures("_instructions")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_masking_a_head_without_output_is_within_the_rounding_of_the_model_alone(family, dtype):
    model, batch = make_model(family), make_batch([40, 3, 21])
    for block in find_blocks(model):
        for values in rows(block.attention, model.config, "v", 2):
            values.zero_()
    real, expected = batch["attention_mask"].bool(), model(**batch).logits
    half = model.to(dtype)
    rounding = relative_error(half(**batch).logits[real], expected[real])
    with Dejavu("oracle", sparsity=1 / HEADS)(half):
        logits = half(**batch).logits
    assert logits.dtype == dtype
    assert relative_error(logits[real], expected[real]) < 1.5 * rounding
