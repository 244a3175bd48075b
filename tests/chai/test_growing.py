"""Multi-head attention on every cache that benchmarks compare: the same logits as on the stock one, at other costs."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from chai.cache import GrowingCache, allocated_bytes, cache_bytes
from chai.cache.buffer import TokenBuffer
from chai.methods import Chai
from tests.models import HEADS, make_batch, make_model

FAMILIES = ["llama", "opt", "gpt_neox", "mistral_sliding", "qwen2"]


def decode(model, batch, cache, steps: int = 70) -> torch.Tensor:
    """Logits of a prompt and of tokens after it, one at a time; past the first growth of a buffer."""
    mask, found = batch["attention_mask"], []
    found.append(model(**batch, past_key_values=cache).logits[:, -1])
    for token in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        ids = torch.full((len(mask), 1), 3 + token % 20)
        found.append(model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_on_the_growing_cache_are_those_on_the_stock_one(family, implementation):
    model, batch = make_model(family), make_batch([14, 3, 9])
    model.set_attn_implementation(implementation)
    stock, growing = DynamicCache(), GrowingCache()
    expected, actual = decode(model, batch, stock), decode(model, batch, growing)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert cache_bytes(growing) == cache_bytes(stock) < allocated_bytes(growing)


@torch.no_grad()
def test_the_stock_cache_copies_at_every_token_and_the_growing_one_does_not():
    """In how many places the keys of a layer lie, while a prompt of 9 grows to 119 tokens."""
    model, batch = make_model("llama"), make_batch([9])
    for cache, expected in ((DynamicCache(), 110), (GrowingCache(), 2), (GrowingCache(200), 1)):
        decode(model, batch, cache, 0)
        held = []  # keeps what is no longer used, so that its memory is not taken again
        for _ in range(110):
            model(torch.tensor([[3]]), past_key_values=cache)
            held.append(cache.layers[0].keys)
        assert len({keys.data_ptr() for keys in held}) == expected
        assert held[-1].shape[1:3] == (HEADS, 119)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generation_crop_and_batches(beams):
    """What ``generate()`` does to a cache: beams reorder it, and a conversation goes on after a crop."""
    model, batch = make_model("llama"), make_batch([14, 3, 9])
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    expected = model.generate(**batch, **options, past_key_values=DynamicCache())
    assert torch.equal(model.generate(**batch, **options, past_key_values=GrowingCache()), expected)
    found = []
    for cache in (DynamicCache(), GrowingCache()):
        decode(model, batch, cache, 3)
        cache.crop(-2)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        found.append(model(torch.tensor([[5], [6]]), past_key_values=cache).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_growing_cache_starts_again():
    cache = GrowingCache()
    for size in (9, 4):
        keys = torch.rand(1, 2, size, 8)
        stored, _ = cache.update(keys, keys, 0)
        assert torch.equal(stored, keys)
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_method_refuses_the_growing_cache_in_one_line():
    model = make_model("llama")
    with Chai(clusters=2)(model), pytest.raises(ValueError, match="cannot use this GrowingCache"):
        model(**make_batch([9]), past_key_values=GrowingCache())


@pytest.mark.parametrize("length", [1, 63, 64, 65, 2047, 2048, 2049, 8191, 8192, 9000])
def test_what_is_read_in_half_precision_is_contiguous_unless_much_more_was_reserved(length):
    """A token at a time or after a crop; with a large reserve, reading all of it would cost more than the copy."""
    buffer = TokenBuffer()
    buffer.append(torch.rand(1, 2, length, 4))
    for _ in range(2):
        assert buffer.padded().is_contiguous() and buffer.padded().shape[-2] >= buffer.length
        buffer.append(torch.rand(1, 2, 1, 4))
    buffer.crop(length)
    assert buffer.padded().is_contiguous() and torch.equal(buffer.padded()[:, :, :length], buffer.view)
    reserved = TokenBuffer(4 * length + 1000)
    reserved.append(torch.rand(1, 2, length, 4))
    assert length <= reserved.padded().shape[-2] < length + 64
