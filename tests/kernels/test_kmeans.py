"""K-means by Triton kernels, interpreted, against the library's core on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chai.clustering import kmeans as core
from chai.clustering.assignment import kmeans_clusters
from chai.clustering.features import attention_features
from chai.heads import HeadClusters, KVHeadMap, pack_kv_heads
from chai.kernels import kmeans as kernels
from tests.kernels.launches import Launches

READS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "_to_cpu", "masked_select"}


def attention_points(heads: int, tokens: int = 5) -> torch.Tensor:
    """Attention of some kinds of heads among the first tokens, as in models: flat, local, to the first token."""
    base = torch.randn(4, 6, tokens, 8)
    kinds = torch.randint(4, (heads,))
    query, key = (base[kinds, part] + 0.3 * torch.randn(heads, tokens, 8) for part in (0, 1))
    key[:, 0] += 2 * query.mean(1) * (kinds[:, None] == 1)
    return attention_features(query, key, 8**-0.5)


POINTS = {
    "normal": lambda size: torch.randn(size, 6),
    "attention": attention_points,
    "one token": lambda size: attention_points(size, 1),  # all points are equal
    "grid": lambda size: torch.randint(0, 3, (size, 2)).float(),  # many equal distances
    "line": lambda size: torch.randint(0, 6, (size, 1)).float(),
    "third": lambda size: torch.randint(0, 4, (size, 3)) / 3.0,  # equal distances but for rounding
    "copies": lambda size: torch.randn(4, 9)[torch.randint(4, (size,))],
    "near copies": lambda size: torch.randn(5, 9)[torch.randint(5, (size,))] + 1e-4 * torch.randn(size, 9),
    "far apart": lambda size: torch.randn(size, 4) * 10.0 ** torch.randint(-4, 5, (size, 1)),
}


def expected(points: torch.Tensor, counts: list[int], nearest: bool, max_moves: int = 50) -> tuple:
    distances = core.pairwise_distances(points.numpy())
    labels, representatives, _ = core.cluster(distances, np.array(counts), nearest=nearest, max_moves=max_moves)
    return torch.from_numpy(labels), torch.from_numpy(representatives)


def assert_same(points: torch.Tensor, counts: list[int], nearest: bool, max_moves: int = 50) -> None:
    found = kernels.kmeans(points, counts, nearest=nearest, max_moves=max_moves)
    for got, wanted in zip(found, expected(points, counts, nearest, max_moves), strict=True):
        assert got.dtype == torch.long and torch.equal(got, wanted)


def test_ties_are_those_of_the_cpu():
    assert kernels.TIE == core.TIE


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("nearest", [True, False])
def test_clusters_equal_the_cpus(kind, nearest):
    """Four problems of one size with a k each."""
    generator = np.random.default_rng([*map(ord, kind), nearest])
    size = int(generator.integers(4, 13))
    counts = [*(int(k) for k in generator.integers(1, size + 1, 3)), 4]
    assert_same(torch.stack([POINTS[kind](size) for _ in counts]), counts, nearest)


@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (2, 2), (16, 16), (17, 9), (32, 20), (40, 37), (64, 62)])
def test_sizes_around_powers_of_two(size, k):
    assert_same(attention_points(size)[None], [k], True)


def test_points_move_after_wards_clustering():
    """Without moves the result is another one, and the limit of moves is kept."""
    points = torch.randn(200, 14, 2)
    none, one, all_moves = (expected(points, [4] * 200, True, moves)[0] for moves in (0, 1, 50))
    (moved_twice,) = ((none != one).any(1) & (one != all_moves).any(1)).nonzero(as_tuple=True)
    points = points[moved_twice[:1]]
    for moves in (0, 1, 50):
        assert_same(points, [4], True, moves)


def test_written_distances_are_the_cpus_to_the_last_bit():
    points = torch.stack([attention_points(17), torch.randn(17, 25) * 1e3])
    clusters = kernels.empty_clusters(2, 17, 17, points.device)
    kernels.fill_clusters(clusters, points, torch.full((2,), 17, dtype=torch.int32), nearest=True)
    assert torch.equal(clusters.distances, torch.from_numpy(core.pairwise_distances(points.numpy())))


def test_other_dtypes_and_strides():
    points = attention_points(12).half()
    turned = points.T.contiguous().T[None]
    found = kernels.kmeans(turned, torch.tensor([3]), nearest=True, most=3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected(points[None].float(), [3], True), strict=True))


def test_memory_is_used_again():
    points = attention_points(12)[None]
    clusters = kernels.empty_clusters(1, 12, 5, points.device)
    for k in (5, 2):  # what the first call left does not matter
        found = kernels.kmeans(points, torch.tensor([k], dtype=torch.int32), nearest=True, out=clusters)
        assert found[0] is clusters.assignment and found[1] is clusters.representatives
        labels, representatives = expected(points, [k], True)
        assert torch.equal(found[0], labels) and torch.equal(found[1][:, :k], representatives)
        assert bool((found[1][:, k:] == 12).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_features_without_a_meaning_have_valid_clusters(value):
    points = torch.randn(1, 9, 3)
    points[0, 4, 1] = value
    HeadClusters(*kernels.kmeans(points, [4], nearest=True)).check()


def test_numbers_of_clusters_that_cannot_be():
    points = torch.randn(2, 6, 3)
    with pytest.raises(ValueError, match="6 points cannot have 7 clusters; valid: 1 to 6"):
        kernels.kmeans(points, [2, 7], nearest=True)
    with pytest.raises(ValueError, match="6 points cannot have 0 clusters; valid: 1 to 6"):
        kmeans_clusters(points[None], [0], kernels=True)
    with pytest.raises(ValueError, match="K-means of 129 points on the GPU; valid: 1 to 128"):
        kernels.empty_clusters(1, 129, 4, points.device)
    clusters = kernels.empty_clusters(2, 6, 3, points.device)
    with pytest.raises(ValueError, match=r"counts \(1,\).* do not fit"):
        kernels.fill_clusters(clusters, points, torch.ones(1, dtype=torch.int32), nearest=True)
    with pytest.raises(ValueError, match="valid: contiguous fp32 features, int32 counts"):
        kernels.fill_clusters(clusters, points, torch.ones(2), nearest=True)
    counts = torch.tensor([9, -1], dtype=torch.int32)  # not read on the host: taken as 3 and 1
    found = kernels.kmeans(points, counts, nearest=True, most=3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected(points, [3, 1], True), strict=True))


@pytest.mark.parametrize("representative", ["nearest", "lowest"])
def test_clusters_of_layers_and_rows(representative):
    features = torch.stack([torch.stack([attention_points(6, 3) for _ in range(2)]) for _ in range(2)])
    found = kmeans_clusters(features, [4, 2], representative, kernels=True)
    for got, wanted in zip(found, kmeans_clusters(features, [4, 2], representative), strict=True):
        got.check()
        assert torch.equal(got.assignment, wanted.assignment)
        assert torch.equal(got.representatives, wanted.representatives)


class Reads(TorchDispatchMode):
    """Collects the operations by which the host would wait for a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in READS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_no_host_read(monkeypatch):
    points = torch.randn(2, 3, 40, 25)
    memory = kernels.empty_clusters(6, 40, 5, points.device)
    counts = torch.full((6,), 5, dtype=torch.int32)
    distances, clustering = Launches(), Launches()
    monkeypatch.setattr(kernels, "_distances", distances)
    monkeypatch.setattr(kernels, "_kmeans", clustering)
    clusters = HeadClusters(torch.arange(8).expand(3, -1) // 2, torch.tensor([[0, 2, 4, 6]] * 3))
    with Reads() as reads:
        kernels.fill_clusters(memory, points.flatten(0, 1), counts, nearest=True)
        kmeans_clusters(points, [5, 3], kernels=True)
        for num_kv_heads in (8, 4, 2):
            KVHeadMap.only_read(clusters, num_kv_heads, most=min(4, num_kv_heads))
    assert not reads.found
    assert distances.grids == [(6, 4)] * 2 and clustering.grids == [(6,)] * 2
    with Reads() as reads:  # the counter counts
        pack_kv_heads(torch.tensor([[0, 1]]), 4)
    assert reads.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("most", [2, 3, 4, 5, 8, 9])
def test_stored_kv_heads_up_to_a_bound(most):
    """Every read KV head is stored, at the index that is returned; the rest repeats one that is needed."""
    generator = torch.Generator().manual_seed(most)
    allowed = torch.stack([torch.randperm(8, generator=generator)[: min(most, 5)] for _ in range(20)])
    read = allowed.gather(1, torch.randint(allowed.shape[1], (20, 6), generator=generator))
    index, stored = pack_kv_heads(read, 8, most)
    assert stored.shape == (20, min(most, 8))
    assert torch.equal(stored.gather(1, index), read)
    if most < 8:
        for row, needed in zip(stored.tolist(), read.tolist(), strict=True):
            assert set(row) == set(needed)
    exact_index, exact_stored = pack_kv_heads(read, 8)
    width = exact_stored.shape[1]
    if most < 8:  # a bound only adds repetitions
        assert torch.equal(index, exact_index) and torch.equal(stored[:, :width], exact_stored)


def test_a_bound_of_no_kv_heads():
    with pytest.raises(ValueError, match="0 KV heads to store; valid: 1 or more"):
        pack_kv_heads(torch.zeros(1, 2, dtype=torch.long), 4, 0)


def test_map_with_a_bound():
    clusters = HeadClusters(torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2]]), torch.tensor([[0, 2, 4]]))
    head_map = KVHeadMap.only_read(clusters, 4, most=3)
    assert head_map.stored.tolist() == [[0, 1, 2]] and head_map.kv_heads.tolist() == [[0, 1, 2]]
    wider = HeadClusters(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), torch.tensor([[1, 3]]))
    assert KVHeadMap.only_read(wider, 2, most=2).stored.tolist() == [[0, 1]]
    assert KVHeadMap.only_read(wider, 4, most=3).stored.tolist() == [[0, 1, 0]]
