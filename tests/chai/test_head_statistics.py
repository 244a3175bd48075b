"""What is gathered about heads, against slow loops in float64 and scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import chai.offline.head_statistics
from chai.clustering.distances import METRICS
from chai.clustering.kmeans import sweep
from chai.clustering.metrics import adjusted_rand, changed_heads, within_and_between
from chai.offline.head_profile import track_clusters
from chai.offline.head_statistics import HeadStatistics, StatisticsError, StatisticsOptions, correlation, gather
from chai.patching.apply import capture
from tests.chai.kmeans_points import kmeans
from tests.chai.test_distances import cost_of
from tests.models import HEADS, LAYERS, make_batch, make_model

WANTED = StatisticsOptions(layers=1, heads=4, tokens=16, saved_samples=2, map_tokens=6, trace_tokens=5, trace_samples=3)


def attention(query, key, scaling, mask, length):
    """``[H, T, T]`` of one sample, its real tokens, in float64."""
    heads, group = len(query), len(query) // len(key)
    found = torch.zeros(heads, length, length, dtype=torch.float64)
    for h, t in itertools.product(range(heads), range(length)):
        seen = [s for s in range(t + 1) if mask is None or mask[t, s]]
        scores = torch.tensor([scaling * float(query[h, t].double() @ key[h // group, s].double()) for s in seen])
        found[h, t, seen] = scores.double().softmax(0)
    return found


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("features", ["causal", "last_row"])
@settings(max_examples=8, deadline=None)
@given(seed=some.integers(0, 1000), key_heads=some.sampled_from([1, 2, 4]), window=some.sampled_from([None, 3]))
def test_gathering_against_a_loop(block, features, seed, key_heads, window):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([11, 7, 5])
    query = torch.randn(3, 4, 11, 8, generator=generator)
    key = torch.randn(3, key_heads, 11, 8, generator=generator)
    places = torch.arange(11)
    mask = None if window is None else (places > places[:, None] - window) & (places <= places[:, None])
    wanted = StatisticsOptions(**{**vars(WANTED), "features": features})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chai.offline.head_statistics, "BLOCK_BYTES", block * 4 * 3 * 4 * 11)
        found = gather(query, key, 0.6, None if mask is None else mask[None, None], lengths, wanted)
    for row, length in enumerate(lengths.tolist()):
        weights = attention(query[row], key[row], 0.6, mask, length)
        points = weights.flatten(1) if features == "causal" else weights[:, -1]
        differences = (points[:, None] - points).square().sum(-1)
        close(found.distances[row], differences)
        close(found.squares[row], points.square().sum(1))
        steps = (weights[:, None, :5] - weights[None, :, :5]).square().sum(-1).permute(2, 0, 1)
        close(found.steps[row], steps)
        close(found.row[row, :, :length], weights[:, -1])
        assert not found.row[row, :, length:].any()
        shown = min(length, 6)
        close(found.map_row[row, :, :shown], weights[:, shown - 1, :shown])
        assert not found.map_row[row, :, shown:].any()
        uniform = torch.arange(2, length + 1).double().log()
        close(found.entropy[row], (torch.special.entr(weights[:, 1:]).sum(-1) / uniform).mean(1))
        close(found.first_token[row], weights[:, 1:, 0].mean(1))
        close(found.own_token[row], weights.diagonal(dim1=1, dim2=2)[:, 1:].mean(1))
        entries, total = (length * (length + 1) / 2, length) if features == "causal" else (length, 1)
        alike = correlation(
            found.distances[row].double().numpy()[None],
            found.squares[row].double().numpy()[None],
            np.array([entries]),
            np.array([float(total)]),
        )
        seen = weights[:, torch.ones(length, length).tril().bool()] if features == "causal" else weights[:, -1]
        np.testing.assert_allclose(alike[0], np.corrcoef(seen.numpy()), atol=2e-4)


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("features", ["causal", "last_row"])
def test_costs_and_joint_products_against_a_loop(block, features):
    """Right padding counts nothing; of ``last_row`` the last real token alone counts, for the products as well."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([11, 7, 5])
    query, key = torch.randn(3, 4, 11, 8, generator=generator), torch.randn(3, 2, 11, 8, generator=generator)
    outputs, sketch = torch.randn(3, 4, 11, 6, generator=generator), torch.randn(3, 4, 11, 5, generator=generator)
    wanted = StatisticsOptions(**{**vars(WANTED), "features": features, "metrics": METRICS, "joint": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chai.offline.head_statistics, "BLOCK_BYTES", block * 4 * 3 * 4 * 11)
        found = gather(query, key, 0.6, None, lengths, wanted, None, outputs, sketch)
    assert {*found.costs} == {*METRICS} - {"attention"}
    for row, length in enumerate(lengths.tolist()):
        weights = attention(query[row], key[row], 0.6, None, length)
        weights = weights[:, -1:] if features == "last_row" else weights
        for (metric, costs), h, r in itertools.product(found.costs.items(), range(4), range(4)):
            expected = cost_of(metric, weights[h], weights[r], outputs[row, h, :length].double())
            assert float(costs[row, h, r]) == pytest.approx(expected, rel=1e-3, abs=1e-5), (metric, h, r)
        errors = [
            ((weights[r] - weights[h]) @ sketch[row, h, :length].double()).flatten()
            for h, r in itertools.product(range(4), range(4))
        ]
        close(found.gram[row], torch.stack([torch.stack([one @ other for other in errors]) for one in errors]))


def test_sums_of_costs_and_products_are_those_of_the_samples(tmp_path):
    """Also after they were saved and read."""
    wanted = StatisticsOptions(**{**vars(WANTED), "metrics": ("cosine", "output"), "joint": True})
    parts, whole = [], HeadStatistics(wanted)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        query, key = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(2))
        values = torch.randn(2, 4, 9, 5, generator=generator)
        parts.append(gather(query, key, 0.6, None, torch.tensor([9, 6]), wanted, None, values, values))
        whole.add(parts[-1:], [["a"] * 9, ["b"] * 6])
        whole.save(tmp_path / "part", {})
        whole = HeadStatistics.load(tmp_path / "part", wanted, {})
    for name in ("cosine", "output"):
        close(torch.from_numpy(whole.sums[f"cost_{name}"][0]), sum(part.costs[name].sum(0) for part in parts))
    close(torch.from_numpy(whole.sums["gram"][0]), sum(part.gram.sum(0) for part in parts))
    assert "cost_attention" not in whole.sums


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), atol=2e-5, rtol=2e-4)


def test_uniform_heads_correlate_with_nobody():
    points = np.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    distances = np.square(points[:, None] - points).sum(-1)[None]
    found = correlation(distances, np.square(points).sum(1)[None], np.array([4]), np.array([1.0]))[0]
    np.testing.assert_allclose(found[0], [1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found[1, 2], np.corrcoef(points[1:])[0, 1])


def random_distances(problems: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(seed).dirichlet(np.ones(30), (problems, count))
    return points, np.square(points[:, :, None] - points[:, None]).sum(-1).astype(np.float32)


def test_a_sweep_is_every_k_by_itself():
    points, distances = random_distances(70, 9)  # more than one task
    inertia, labels = sweep(distances)
    for k in range(1, 10):
        alone, _, least = kmeans(torch.from_numpy(points).float(), k)
        np.testing.assert_allclose(inertia[:, k - 1], least, rtol=1e-4, atol=1e-6)
        assert [adjusted_rand_score(a, b) for a, b in zip(labels[:, k - 1], alone.numpy(), strict=True)] == [1.0] * 70


def test_the_sweep_reaches_the_inertia_of_scikit_learn():
    """Not above by more than 1 % in the median of each k."""
    points, distances = random_distances(12, 16)
    inertia, _ = sweep(distances)
    for k in (2, 3, 5, 8, 12, 15):
        theirs = [KMeans(k, n_init=10, random_state=0).fit(own).inertia_ for own in points]
        assert np.median(inertia[:, k - 1] / theirs) <= 1.01


labelled = some.integers(0, 10_000).map(lambda seed: np.random.default_rng(seed).integers(0, 4, (2, 9)))


@settings(max_examples=60, deadline=None)
@given(labels=labelled)
def test_adjusted_rand_is_that_of_scikit_learn(labels):
    found = adjusted_rand(labels[None, 0], labels[None, 1])
    assert found.shape == (1,)
    np.testing.assert_allclose(found[0], adjusted_rand_score(*labels), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(labels=labelled)
def test_changed_heads_are_the_fewest_over_all_namings(labels):
    first, second = labels
    fewest = min(
        sum(names[b] != a for a, b in zip(first, second, strict=True)) for names in itertools.permutations(range(4))
    )
    assert changed_heads(first[None], second[None]).tolist() == [fewest]


def test_within_and_between_against_a_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 6, 6))
    values += values.swapaxes(1, 2)
    labels = np.stack([np.tile([0] * 6, (3, 1)), rng.integers(0, 3, (3, 6)), np.tile(np.arange(6), (3, 1))], 1)
    within, between = within_and_between(values, labels)
    for sample, k in itertools.product(range(3), range(3)):
        pairs = {True: [], False: []}
        for i, j in itertools.combinations(range(6), 2):
            pairs[bool(labels[sample, k, i] == labels[sample, k, j])].append(values[sample, i, j])
        for found, expected in ((within, pairs[True]), (between, pairs[False])):
            assert found[sample, k] == pytest.approx(np.mean(expected) if expected else np.nan, nan_ok=True)


def test_no_choice_is_agreement():
    for labels in (np.zeros((1, 5), dtype=int), np.arange(5)[None]):
        assert adjusted_rand(labels, labels).tolist() == [1.0]


def gathered(features: str = "causal", samples: int = 6, batch: int = 2) -> tuple[HeadStatistics, list[torch.Tensor]]:
    """Statistics of random samples of one layer, and the features of each sample."""
    wanted = StatisticsOptions(**{**vars(WANTED), "features": features})
    statistics, points = HeadStatistics(wanted), []
    for begin in range(0, samples, batch):
        generator = torch.Generator().manual_seed(begin)
        query, key = (2 * torch.randn(batch, 4, 9, 8, generator=generator) for _ in range(2))
        lengths = torch.tensor([9, 6] * (batch // 2))
        statistics.add(
            [gather(query, key, 0.5, None, lengths, wanted)], [["x"] * length for length in lengths.tolist()]
        )
        for row, length in enumerate(lengths.tolist()):
            weights = attention(query[row], key[row], 0.5, None, length)
            padded = torch.zeros(4, 16, dtype=torch.float64)
            padded[:, :length] = weights[:, -1]
            points.append(weights.flatten(1) if features == "causal" else padded)
    return statistics, points


@pytest.mark.parametrize("features", ["causal", "last_row"])
def test_errors_are_those_of_k_means_on_the_features(features):
    statistics, points = gathered(features)
    together = torch.cat(points, 1)[None].float()
    for k in (1, 2, 3, 4):
        alone = [float(kmeans(own[None].float(), k)[2]) for own in points]
        assert statistics.errors("per_sample")[0, k - 1] == pytest.approx(np.mean(alone), rel=1e-3, abs=1e-6)
        side_by_side = float(kmeans(together, k)[2]) / len(points)
        assert statistics.errors("concatenated")[0, k - 1] == pytest.approx(side_by_side, rel=1e-3, abs=1e-6)
        if features == "last_row":
            mean = float(kmeans(torch.stack(points).mean(0)[None].float(), k)[2])
            assert statistics.errors("averaged")[0, k - 1] == pytest.approx(mean, rel=1e-3, abs=1e-6)
        assert statistics.sample_errors[:, 0, k - 1] == pytest.approx(alone, rel=1e-3, abs=1e-6)
    np.testing.assert_allclose(statistics.sample_errors.mean(0), statistics.errors("per_sample"), rtol=1e-5, atol=1e-6)
    if features == "causal":
        with pytest.raises(ValueError, match="last_row only"):
            statistics.errors("averaged")


def test_statistics_of_an_earlier_version_have_no_errors_of_single_samples(tmp_path):
    """Neither complete ones, nor those of an interrupted pass that is continued."""
    whole, _ = gathered(samples=6)
    part, _ = gathered(samples=2)
    for name in ("within", "between"):
        del part.sums[name]
    part.series["sample_error"] = []
    part.save(tmp_path / "old.safetensors", {})
    old = HeadStatistics.load(tmp_path / "old.safetensors", WANTED, {})
    assert old.sample_errors is None and whole.sample_errors.shape == (6, 1, 4)
    generator = torch.Generator().manual_seed(2)
    query, key = (2 * torch.randn(2, 4, 9, 8, generator=generator) for _ in range(2))
    old.add([gather(query, key, 0.5, None, torch.tensor([9, 6]), WANTED)], [["x"] * 9, ["x"] * 6])
    assert old.samples == 4 and old.sample_errors is None


def test_memberships_are_followed_as_a_loop_does():
    statistics, points = gathered()
    changes, agreement = track_clusters(statistics, [2])
    assert changes.shape == (1, 4) and agreement.shape == (1, 5)
    expected = np.zeros((3, 5))  # samples that are followed, tokens
    for sample in range(3):
        length = [9, 6][sample % 2]
        weights = points[sample].reshape(4, length, length)
        final = kmeans(weights.flatten(1)[None].float(), 2)[0][0]
        for n in range(1, 6):
            labels = kmeans(weights[:, :n].flatten(1)[None].float(), 2)[0][0]
            expected[sample, n - 1] = adjusted_rand_score(final, labels)
    np.testing.assert_allclose(agreement[0], expected.mean(0), atol=1e-6)


def test_saved_statistics_go_on_where_they_stood(tmp_path):
    whole, _ = gathered(samples=6)
    part, _ = gathered(samples=2)
    part.save(tmp_path / "s.safetensors", {"of": "this"})
    part = HeadStatistics.load(tmp_path / "s.safetensors", WANTED, {"of": "this"})
    for begin in (2, 4):
        generator = torch.Generator().manual_seed(begin)
        query, key = (2 * torch.randn(2, 4, 9, 8, generator=generator) for _ in range(2))
        lengths = torch.tensor([9, 6])
        part.add([gather(query, key, 0.5, None, lengths, WANTED)], [["x"] * 9, ["x"] * 6])
    assert part.samples == whole.samples == 6 and part.kept_tokens == whole.kept_tokens
    assert all(np.array_equal(part.sums[name], whole.sums[name], equal_nan=True) for name in whole.sums)
    for name, arrays in whole.series.items():
        assert all(np.array_equal(a, b) for a, b in zip(arrays, part.series[name], strict=True))
    with pytest.raises(StatisticsError, match="other statistics"):
        HeadStatistics.load(tmp_path / "s.safetensors", WANTED, {"of": "that"})
    content = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(content[:-100])
    with pytest.raises(StatisticsError, match="holds no statistics"):
        HeadStatistics.load(tmp_path / "s.safetensors", WANTED, {"of": "this"})


@pytest.mark.parametrize("family", ["llama", "opt", "mistral_sliding", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_observing_shows_what_the_model_attends_to_and_changes_nothing(family):
    model, batch = make_model(family), make_batch([12, 12])
    expected = model(batch["input_ids"]).logits
    model.set_attn_implementation("eager")
    stock = model(batch["input_ids"], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    wanted = StatisticsOptions(
        LAYERS, HEADS, tokens=12, saved_samples=1, map_tokens=12, trace_tokens=5, trace_samples=1
    )
    rows = {}

    def look(inputs):
        lengths = torch.tensor([12, 12])
        rows[inputs.layer_idx] = gather(inputs.query, inputs.key, inputs.scaling, inputs.mask, lengths, wanted).row

    with capture(model, look):
        torch.testing.assert_close(model(batch["input_ids"]).logits, expected)
        with pytest.raises(RuntimeError, match="outside a call"):
            model.get_decoder().__class__.forward(model.get_decoder(), batch["input_ids"])
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in model.get_decoder().__dict__
    for layer in range(LAYERS):
        torch.testing.assert_close(rows[layer], stock[layer][:, :, -1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ZeroDivisionError), capture(model, look):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
