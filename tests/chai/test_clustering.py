"""K-means, representatives and features, against scikit-learn and against loops."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from chai.clustering import HeadClusters, agglomerative, choose_representatives, head_features, kmeans


def planted(problems: int, points: int, k: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(problems, k, 25, generator=generator)
    labels = torch.stack([torch.arange(points) % k for _ in range(problems)])
    chosen = centres.gather(1, labels[..., None].expand(-1, -1, 25))
    return chosen + noise * torch.randn(chosen.shape, generator=generator), labels


@pytest.mark.parametrize("k", [1, 2, 5, 31, 32])
def test_inertia_is_that_of_scikit_learn(k):
    """Not above KMeans(n_init=10) by more than 1 % in the median, on points without clear clusters."""
    points = torch.rand(12, 32, 25, generator=torch.Generator().manual_seed(k)).softmax(-1)
    _, _, inertia = kmeans(points, k)
    ratios = []
    for row, ours in zip(points.numpy(), inertia.tolist(), strict=True):
        theirs = KMeans(k, n_init=10, random_state=0).fit(row).inertia_
        ratios.append(ours / theirs if theirs > 1e-9 else 1.0 + ours)
    assert sorted(ratios)[len(ratios) // 2] <= 1.01


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
    together, _, _ = kmeans(points, 4, seed=3)
    assert torch.equal(together, kmeans(points, 4, seed=3)[0])
    for row in range(5):
        assert torch.equal(together[row], kmeans(points[row : row + 1], 4, seed=3)[0][0])


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_every_cluster_has_a_head_even_where_heads_coincide(distinct):
    points = torch.rand(3, distinct, 25, generator=torch.Generator().manual_seed(0)).repeat(1, 8, 1)[:, :8]
    labels, _, inertia = kmeans(points, 5)
    for row in labels:
        assert sorted(set(row.tolist())) == [0, 1, 2, 3, 4]
    assert float(inertia.max()) < 1e-10
    choose_representatives(points, labels, 5).check()


def test_too_many_clusters_are_refused():
    with pytest.raises(ValueError, match="4 points can't have 5 clusters: choose 1 to 4"):
        kmeans(torch.rand(1, 4, 2), 5)


@pytest.mark.parametrize("rule", ["nearest", "lowest"])
def test_representatives_against_a_loop(rule):
    points, _ = planted(4, 12, 3, noise=0.5)
    labels, _, _ = kmeans(points, 3)
    clusters = choose_representatives(points, labels, 3, rule)
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


def test_tie_of_two_heads_goes_to_the_lower_whatever_rounding_says():
    points = torch.rand(1, 2, 25, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 1 + 1e-7, 1 - 1e-7):
        nudged = points.clone()
        nudged[0, 1] *= scale
        assert int(choose_representatives(nudged, torch.zeros(1, 2, dtype=torch.long), 1).representatives) == 0


def test_agglomerative_finds_planted_directions():
    points, labels = planted(3, 16, 4, noise=0.01)
    scaled = points * torch.linspace(0.5, 2, 16)[None, :, None]  # cosine distance ignores the length
    found = agglomerative(scaled, 4)
    for row in range(3):
        assert adjusted_rand_score(labels[row], found[row]) == 1.0


@pytest.mark.parametrize("causal", [True, False])
def test_features_against_a_loop(causal):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    features = head_features(query, key, 0.7, causal)
    for b in range(2):
        for h in range(3):
            rows = []
            for i in range(5):
                seen = range(i + 1) if causal else range(5)
                scores = torch.tensor([0.7 * float(query[b, h, i] @ key[b, h, j]) for j in seen], dtype=torch.float64)
                rows.append(torch.nn.functional.pad(scores.softmax(0), (0, 5 - len(scores))))
            torch.testing.assert_close(features[b, h].double(), torch.cat(rows), atol=1e-6, rtol=1e-5)


def test_contract_of_head_clusters_is_checked():
    with pytest.raises(ValueError, match="don't fit"):
        HeadClusters(torch.zeros(2, 4, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="isn't a member"):
        HeadClusters(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2]])).check()
    with pytest.raises(ValueError, match="outside"):
        HeadClusters(torch.tensor([[0, 2, 1]]), torch.tensor([[0, 2]])).check()
