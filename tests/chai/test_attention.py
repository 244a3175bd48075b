"""The library's attention functions, alone, against an fp64 loop over random shapes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from chai.attention import clustered_attention, reference
from chai.heads import HeadClusters, KVHeadMap, take_heads
from tests.oracle import attend_one_by_one


def reference_attention(query, key, value, clusters, scaling=None, mask=None):
    """The equation of the library, called as the dispatcher is."""
    if isinstance(clusters, HeadClusters):
        query = take_heads(query, clusters.representatives)
        clusters = KVHeadMap.all_stored(clusters, key.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return reference.clustered_attention(query, key, value, clusters, scaling, mask)


BOTH = pytest.mark.parametrize("attention", [clustered_attention, reference_attention])


def random_clusters(rng: random.Random, rows: int, heads: int, k: int) -> HeadClusters:
    assignments, representatives = [], []
    for _ in range(rows):
        chosen = sorted(rng.sample(range(heads), k))
        labels = [rng.randrange(k) for _ in range(heads)]
        for c, head in enumerate(chosen):
            labels[head] = c
        assignments.append(labels)
        representatives.append(chosen)
    clusters = HeadClusters(torch.tensor(assignments), torch.tensor(representatives))
    clusters.check()
    return clusters


@BOTH
@pytest.mark.parametrize("seed", range(12))
def test_clustered_attention_equals_the_loop(attention, seed):
    rng = random.Random(seed)
    heads = rng.choice([1, 4, 6, 8])
    key_heads = rng.choice([n for n in (1, 2, 3, 4, 6, 8) if heads % n == 0])
    rows, queries, size = rng.randint(1, 3), rng.randint(1, 7), rng.choice([2, 5, 8])
    keys, k = queries + rng.randint(0, 6), rng.randint(1, heads)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, queries, size, generator=generator)
    key, value = (torch.randn(rows, key_heads, keys, size, generator=generator) for _ in range(2))
    clusters = random_clusters(rng, rows, heads, k)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None].repeat(rows, 1, 1, 1)
    if keys > queries:
        mask[0, :, :, 0] = False  # left padding in the first row
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    scaling = rng.choice([1.0, size**-0.5])
    sources = clusters.representatives.gather(1, clusters.assignment)
    expected = attend_one_by_one(query, key, value, scaling, additive, sources, tokens=0)
    for form in (mask, additive):
        actual = attention(query, key, value, clusters, scaling, form)
        torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-5)


@BOTH
def test_kept_keys_give_what_all_keys_give(attention):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 8, 5, 4, generator=generator) for _ in range(3))
    clusters = random_clusters(rng, 2, 8, 3)
    kept = torch.stack([key[row, clusters.representatives[row]] for row in range(2)])
    chosen = take_heads(query, clusters.representatives)
    expected = attention(query, key, value, clusters)
    torch.testing.assert_close(attention(chosen, kept, value, KVHeadMap.only_read(clusters, 8)), expected)


@BOTH
@pytest.mark.parametrize(("queries", "keys"), itertools.product([1, 4], [4, 9]))
def test_every_head_its_own_cluster_is_multi_head_attention(attention, queries, keys):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, queries, 4, generator=generator)
    key, value = (torch.randn(2, 3, keys, 4, generator=generator) for _ in range(2))
    own = torch.arange(6).expand(2, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries),
        enable_gqa=True,
    )
    torch.testing.assert_close(attention(query, key, value, HeadClusters(own, own)), expected)


@BOTH
def test_identical_heads_lose_nothing(attention):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 7, 4, generator=generator).repeat_interleave(3, 1) for _ in range(2))
    value = torch.randn(1, 6, 7, 4, generator=generator)
    clusters = HeadClusters(torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[1, 3]]))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attention(query, key, value, clusters), expected)


ONE = HeadClusters(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 3, 5, 4)}, "key is .* dividing 8 query heads"),
        ({"value": torch.zeros(1, 5, 5, 4)}, "value is .* dividing 8 query heads"),
        ({"key": torch.zeros(1, 8, 6, 4)}, "does not fit query"),
        ({"query": torch.zeros(1, 4, 5, 4)}, "expected batch size 1 and 8 heads"),
        ({"query": torch.zeros(2, 8, 5, 4)}, "expected batch size 1 and 8 heads"),
        ({"clusters": KVHeadMap.only_read(ONE, 8)}, "expected batch size 1 and 1 heads"),
        (
            {"clusters": KVHeadMap.only_read(ONE, 8), "query": torch.zeros(1, 1, 5, 4)},
            "expected the 1 stored KV heads",
        ),
    ],
)
def test_shapes_that_stock_kernels_might_broadcast_are_refused(change, message):
    arguments = {
        "query": torch.zeros(1, 8, 5, 4),
        "key": torch.zeros(1, 8, 5, 4),
        "value": torch.zeros(1, 8, 5, 4),
        "clusters": ONE,
    }
    with pytest.raises(ValueError, match=message):
        clustered_attention(**{**arguments, **change})
