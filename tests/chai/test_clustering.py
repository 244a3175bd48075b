"""K-means, representatives and features, against scikit-learn and against loops."""

from __future__ import annotations

import json
from itertools import combinations
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from chai.clustering.assignment import (
    agglomerative_clusters,
    choose_representatives,
    clusters_by_cost,
    feature_distances,
)
from chai.clustering.features import attention_features
from chai.heads import HeadClusters
from tests.chai.kmeans_points import kmeans

MICROWORLD = Path(__file__).resolve().parents[2] / "experiments" / "microworld"
ENGLISH = (
    "Once upon a time there was a little girl named Lily.",
    "The dog ran to the park and played with a ball.",
    "Tom was sad because he lost his toy.",
    "It was raining and the cat sat inside.",
)


def planted(problems: int, points: int, k: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(problems, k, 25, generator=generator)
    labels = torch.stack([torch.arange(points) % k for _ in range(problems)])
    chosen = centres.gather(1, labels[..., None].expand(-1, -1, 25))
    return chosen + noise * torch.randn(chosen.shape, generator=generator), labels


def gqa_clusters(points: torch.Tensor, kv_heads: int, counts: list[int]) -> list[HeadClusters]:
    return clusters_by_cost(feature_distances(points), counts, kv_heads=kv_heads)


@torch.no_grad()
def features_of_texts(folder: Path, texts: list[str] | tuple[str, ...]) -> torch.Tensor:
    """What the heads of each layer attend to among the first five tokens: ``[layers * texts, H, 25]``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.cat([tokenizer(text, return_tensors="pt")["input_ids"][:, :5] for text in texts])
    return torch.cat([layer.flatten(2) for layer in model(ids, output_attentions=True).attentions])


@pytest.fixture(scope="module")
def embedded() -> torch.Tensor:
    lines = (MICROWORLD / "data" / "micro_arc_easy.jsonl").read_text().splitlines()
    return features_of_texts(MICROWORLD / "model", [json.loads(line)["question"] for line in lines[:40:10]])


@pytest.fixture(scope="module")
def stories(shared: Path) -> torch.Tensor:
    return features_of_texts(shared / "models" / "stories260K", ENGLISH)


def ratios_to_scikit_learn(points: torch.Tensor, k: int) -> list[float]:
    """Inertia of each problem over that of KMeans(n_init=10), in ascending order."""
    _, _, inertia = kmeans(points, k)
    theirs = [KMeans(k, n_init=10, random_state=0).fit(row).inertia_ for row in points.numpy()]
    return sorted((a + 1e-9) / (b + 1e-9) for a, b in zip(inertia.tolist(), theirs, strict=True))


@pytest.mark.parametrize("k", [1, 2, 5, 31, 32])
def test_inertia_is_that_of_scikit_learn(k):
    """Not above by more than 1 % in the median, on points without clear clusters."""
    points = torch.rand(12, 32, 25, generator=torch.Generator().manual_seed(k)).softmax(-1)
    ratios = ratios_to_scikit_learn(points, k)
    assert ratios[len(ratios) // 2] <= 1.01


@pytest.mark.parametrize(
    ("features", "k"), [*(("embedded", k) for k in (2, 4, 8)), *(("stories", k) for k in (2, 3, 6))]
)
def test_inertia_on_attention_is_that_of_scikit_learn(features, k, request):
    """Not above by more than 1 % in the median, and never by more than a quarter."""
    ratios = ratios_to_scikit_learn(request.getfixturevalue(features), k)
    assert ratios[len(ratios) // 2] <= 1.01
    assert ratios[-1] <= 1.25


@pytest.mark.parametrize("features", ["embedded", "stories", "random"])
def test_different_k_in_one_batch_equal_the_same_problems_alone(features, request):
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(24, 32, 25, generator=generator)
    points = random if features == "random" else request.getfixturevalue(features)
    k = torch.randint(1, points.shape[1] + 1, (len(points),), generator=generator)
    labels, centroids, inertia = kmeans(points, k)
    assert centroids.shape == (len(points), int(k.max()), 25)
    for row, own in enumerate(k.tolist()):
        alone = kmeans(points[row : row + 1], own)
        assert torch.equal(labels[row], alone[0][0])
        torch.testing.assert_close(centroids[row, :own], alone[1][0])
        torch.testing.assert_close(inertia[row], alone[2][0])
        assert not centroids[row, own:].any()
        assert labels[row].unique().tolist() == list(range(own))


@pytest.mark.parametrize("k", [2, 4, 8])
def test_planted_clusters_are_found(k):
    points, labels = planted(6, 16, k, noise=0.01)
    found, centroids, inertia = kmeans(points, k)
    for row in range(6):
        assert adjusted_rand_score(labels[row], found[row]) == 1.0
    members = centroids.gather(1, found[..., None].expand(-1, -1, 25))
    torch.testing.assert_close(inertia, (points - members).square().sum((1, 2)))


def test_result_is_deterministic_and_independent_of_the_batch():
    points, _ = planted(5, 16, 6, noise=0.4)
    together, _, _ = kmeans(points, 4)
    assert torch.equal(together, kmeans(points, 4)[0])
    for row in range(5):
        assert torch.equal(together[row], kmeans(points[row : row + 1], 4)[0][0])


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_every_cluster_has_a_head_even_where_heads_coincide(distinct):
    points = torch.rand(3, distinct, 25, generator=torch.Generator().manual_seed(0)).repeat(1, 8, 1)[:, :8]
    labels, _, inertia = kmeans(points, 5)
    for row in labels:
        assert sorted(set(row.tolist())) == [0, 1, 2, 3, 4]
    assert float(inertia.max()) < 1e-10
    choose_representatives(points[None], labels[None], [5])[0].check()
    mixed, _, _ = kmeans(points, torch.tensor([5, 1, 8]))
    assert [sorted(set(row.tolist())) for row in mixed] == [[0, 1, 2, 3, 4], [0], list(range(8))]


@pytest.mark.parametrize("rule", ["nearest", "lowest"])
def test_representatives_against_a_loop(rule):
    points, _ = planted(4, 12, 3, noise=0.5)
    labels, _, _ = kmeans(points, 3)
    clusters = choose_representatives(points[None], labels[None], [3], rule)[0]
    clusters.check()
    for row in range(4):
        for c in range(3):
            members = [h for h in range(12) if int(clusters.assignment[row, h]) == c]
            mean = points[row, members].double().mean(0)
            distances = [float((points[row, h].double() - mean).square().sum()) for h in members]
            near = [h for h, d in zip(members, distances, strict=True) if d <= min(distances) * 1.0001]
            expected = near[0] if rule == "nearest" else members[0]
            assert int(clusters.representatives[row, c]) == expected
        assert adjusted_rand_score(labels[row], clusters.assignment[row]) == 1.0
        assert clusters.representatives[row].tolist() == sorted(clusters.representatives[row].tolist())


@pytest.mark.parametrize("rule", ["nearest", "lowest"])
def test_layers_at_once_equal_each_alone(rule):
    counts = [5, 2, 12, 1, 5]
    points, _ = planted(15, 12, 3, noise=0.5)
    labels, _, _ = kmeans(points, torch.tensor(counts).repeat_interleave(3))
    points, labels = points.unflatten(0, (5, 3)), labels.unflatten(0, (5, 3))
    for layer, found in enumerate(choose_representatives(points, labels, counts, rule)):
        found.check()
        alone = choose_representatives(points[layer][None], labels[layer][None], [counts[layer]], rule)[0]
        assert torch.equal(found.assignment, alone.assignment)
        assert torch.equal(found.representatives, alone.representatives)


def cost_of(clusters: HeadClusters, points: torch.Tensor) -> list[float]:
    """Sum of squared distances to the own representative, of each row."""
    chosen = clusters.representatives.gather(1, clusters.assignment)
    nearest = points.gather(1, chosen[..., None].expand_as(points)).double()
    return (points.double() - nearest).square().sum((1, 2)).tolist()


def least_cost(row: torch.Tensor, key_heads: int, k: int) -> float:
    """The same for the best of all sets of k heads that read ceil(k / group) key heads."""
    heads = len(row)
    group = heads // key_heads
    distances = (row[:, None].double() - row.double()).square().sum(-1).numpy()
    sets = [s for s in combinations(range(heads), k) if len({h // group for h in s}) == ceil(k / group)]
    return min(distances[list(s)].min(0).sum() for s in sets)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("key_heads", [4, 8])
@pytest.mark.parametrize("features", ["stories", "random"])
def test_fewest_key_heads_are_read_at_the_least_cost(features, key_heads, k, request):
    """Exactly the least, for with at most two query heads a key head every choice is tried; 8 of 8: k-medoids."""
    random = torch.rand(8, 8, 25, generator=torch.Generator().manual_seed(0))
    points = random if features == "random" else request.getfixturevalue(features)[::3]
    (clusters,) = gqa_clusters(points[None], key_heads, [k])
    clusters.check()
    assert clusters.representatives.tolist() == clusters.representatives.sort(1).values.tolist()
    for row in clusters.representatives.tolist():
        assert len({head * key_heads // 8 for head in row}) == ceil(k * key_heads / 8)
    best = [least_cost(row, key_heads, k) for row in points]
    np.testing.assert_allclose(cost_of(clusters, points), best, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 7])
def test_surplus_heads_of_larger_groups_go_at_little_cost(k):
    points = torch.rand(12, 8, 25, generator=torch.Generator().manual_seed(0))
    (clusters,) = gqa_clusters(points[None], 2, [k])
    clusters.check()
    ratios = sorted(ours / least_cost(row, 2, k) for ours, row in zip(cost_of(clusters, points), points, strict=True))
    assert ratios[6] <= 1.01 and ratios[-1] <= 1.15


def test_key_heads_too_many_for_all_sets_are_near_the_best():
    """8 of 16 key heads are 12,870 sets, so these are chosen greedily and swapped."""
    points, _ = planted(3, 16, 6, noise=0.3)
    (clusters,) = gqa_clusters(points[None], 16, [8])
    clusters.check()
    for ours, row in zip(cost_of(clusters, points), points, strict=True):
        assert ours <= 1.05 * least_cost(row, 16, 8)


def test_key_heads_of_layers_with_different_k():
    points = torch.rand(3, 2, 8, 25, generator=torch.Generator().manual_seed(0))
    points[1, 0] = points[1, 0, :1]  # heads that coincide
    found = gqa_clusters(points, 4, [3, 5, 8])
    for layer, k in enumerate([3, 5, 8]):
        found[layer].check()
        (alone,) = gqa_clusters(points[layer : layer + 1], 4, [k])
        assert torch.equal(found[layer].assignment, alone.assignment)
        assert torch.equal(found[layer].representatives, alone.representatives)
    assert torch.equal(found[2].assignment, torch.arange(8).expand(2, -1))
    assert torch.equal(found[2].representatives, torch.arange(8).expand(2, -1))


def test_impossible_key_heads_are_refused():
    with pytest.raises(ValueError, match="3 KV heads do not divide 8 query heads"):
        gqa_clusters(torch.rand(1, 1, 8, 2), 3, [2])
    with pytest.raises(ValueError, match="8 heads cannot have 9 clusters; valid: 1 to 8"):
        gqa_clusters(torch.rand(2, 1, 8, 2), 4, [2, 9])


def test_tie_of_two_heads_goes_to_the_lower_whatever_rounding_says():
    points = torch.rand(1, 2, 25, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 1 + 1e-7, 1 - 1e-7):
        nudged = points.clone()
        nudged[0, 1] *= scale
        (clusters,) = choose_representatives(nudged[None], torch.zeros(1, 1, 2, dtype=torch.long), [1])
        assert int(clusters.representatives) == 0


def test_agglomerative_finds_planted_directions():
    points, labels = planted(3, 16, 4, noise=0.01)
    scaled = points * torch.linspace(0.5, 2, 16)[None, :, None]  # cosine distance ignores the length
    (found,) = agglomerative_clusters(scaled[None], [4])
    found.check()
    for row in range(3):
        assert adjusted_rand_score(labels[row], found.assignment[row]) == 1.0


@pytest.mark.parametrize("causal", [True, False])
def test_features_against_a_loop(causal):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    features = attention_features(query, key, 0.7, causal)
    for b in range(2):
        for h in range(3):
            rows = []
            for i in range(5):
                seen = range(i + 1) if causal else range(5)
                scores = torch.tensor([0.7 * float(query[b, h, i] @ key[b, h, j]) for j in seen], dtype=torch.float64)
                rows.append(torch.nn.functional.pad(scores.softmax(0), (0, 5 - len(scores))))
            torch.testing.assert_close(features[b, h].double(), torch.cat(rows), atol=1e-6, rtol=1e-5)


def test_contract_of_head_clusters_is_checked():
    with pytest.raises(ValueError, match="do not fit"):
        HeadClusters(torch.zeros(2, 4, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="is not a member"):
        HeadClusters(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2]])).check()
    with pytest.raises(ValueError, match="outside"):
        HeadClusters(torch.tensor([[0, 2, 1]]), torch.tensor([[0, 2]])).check()


@pytest.mark.parametrize("k", [5, torch.tensor([2, 5, 1]), 0])
def test_too_many_clusters_are_refused(k):
    with pytest.raises(ValueError, match="4 points cannot have .* clusters; valid: 1 to 4"):
        kmeans(torch.rand(3, 4, 2), k)
