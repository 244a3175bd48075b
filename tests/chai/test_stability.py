"""The spread of the numbers of clusters over samples of the texts, against loops over single samples."""

from __future__ import annotations

import numpy as np
import pytest

from chai.clustering.num_clusters import allocate, knee, plateau
from chai.offline import stability
from chai.offline.stability import bootstrap_counts, interval, measure_stability, split_half_counts

RULES = {
    "plateau": lambda error: plateau(error, 0.05),
    "knee": knee,
    "cost": lambda error: allocate(error, np.tile(np.arange(1, 7), (3, 1)), most_cost=11) + 1,
    "loss": lambda error: allocate(error, np.tile(np.arange(1, 7), (3, 1)), most_loss=1e3) + 1,
}
PLANTED = [5, 2, 3]


def errors_of_texts(texts: int, noise: float, seed: int = 0) -> np.ndarray:
    """Errors ``[texts, 3, 6]`` that fall to a tenth at a planted number of clusters, each text with its own noise."""
    k = np.arange(1, 7)
    mean = np.stack(
        [np.where(k < planted, 1 - 0.9 * (k - 1) / (planted - 1), 0.1 * (6 - k) / 6) for planted in PLANTED]
    )
    scale = np.random.default_rng(seed).lognormal(0, noise, (texts, 3, 6))
    return (100 * mean * scale).astype(np.float32)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_bootstrap_counts_are_those_of_a_loop(rule):
    errors = errors_of_texts(37, 2.0)
    found = bootstrap_counts(errors, rule, np.random.default_rng(4), resamples=150)  # more than one chunk
    generator = np.random.default_rng(4)
    drawn = generator.multinomial(37, np.full(37, 1 / 37), size=150)
    assert (drawn.sum(1) == 37).all()
    for row, times in zip(found, drawn, strict=True):
        texts = [text for text, many in enumerate(times) for _ in range(many)]
        mean = sum(errors[text].astype(np.float64) for text in texts) / len(texts)
        assert row.tolist() == rule(mean).tolist()
    assert len(np.unique(found, axis=0)) > 1


@pytest.mark.parametrize("texts", [2, 37, 40])
def test_halves_are_disjoint_and_complete(texts):
    """The rule here is the mean itself, of errors that say which texts are in it."""
    errors = np.zeros((texts, 2, 1))
    errors[:, 0, 0], errors[:, 1, 0] = 1, 2.0 ** np.arange(texts) % 1000003
    found = split_half_counts(errors, lambda error: error[..., 0], np.random.default_rng(0), splits=90)
    assert found.shape == (90, 2, 2)
    np.testing.assert_allclose(found[..., 0], 1)
    sums = np.rint(found[..., 1] * (texts // 2)).sum(1)
    whole = errors[:, 1, 0].sum()
    left_out = whole - sums
    if texts % 2:
        assert set(left_out.tolist()) <= set(errors[:, 1, 0].tolist()) and len(set(left_out.tolist())) > 10
    else:
        np.testing.assert_allclose(left_out, 0)


def test_interval_is_of_counts_that_occur():
    counts = np.array([[1, 3]] * 20 + [[2, 3]] * 960 + [[7, 4]] * 20)
    assert [end.tolist() for end in interval(counts)] == [[2, 3], [2, 3]]
    assert [end.tolist() for end in interval(counts, 0.99)] == [[1, 3], [7, 4]]
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 30, (1000, 3))
    ordered = np.sort(counts, axis=0)
    low, high = interval(counts)
    assert low.tolist() == ordered[24].tolist() and high.tolist() == ordered[974].tolist()


def test_planted_counts_are_inside_and_noise_widens_the_interval():
    quiet, noisy = (measure_stability(errors_of_texts(60, noise), RULES["plateau"], 0) for noise in (0.1, 1.5))
    for found in (quiet, noisy):
        assert all(low <= k <= high for low, k, high in zip(found.low, PLANTED, found.high, strict=True))
    assert (
        quiet.low == quiet.high == PLANTED and quiet.halves_equal == [1, 1, 1] and quiet.halves_difference == [0, 0, 0]
    )
    assert sum(noisy.high) > sum(noisy.low) and min(noisy.halves_equal) < 1 and max(noisy.halves_difference) > 0


def test_the_seed_decides(monkeypatch):
    monkeypatch.setattr(stability, "RESAMPLES", 1000)
    errors = errors_of_texts(20, 1.5)
    first, again, other = (measure_stability(errors, knee, seed) for seed in (0, 0, 1))
    assert first == again and first != other


def test_one_text_has_no_spread():
    assert measure_stability(errors_of_texts(1, 0.1), knee, 0) is None
