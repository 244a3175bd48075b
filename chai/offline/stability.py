"""How far the number of clusters of a layer depends on the texts that were sampled (paper, Section 3.2, Figure 8).

A rule (:mod:`chai.clustering.num_clusters`) is applied to mean errors of other samples of the texts: bootstrap samples
of the same size, and halves. Everything follows from the errors of single texts, ``[N, L, H]``; no model is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

#: From errors ``[..., L, H]`` to counts ``[..., L]``.
Rule = Callable[[np.ndarray], np.ndarray]
RESAMPLES = 1000  # bootstrap samples
SPLITS = 200  # random splits into halves
LEVEL = 0.95  # of the percentile interval
CHUNK = 64  # samples whose errors are held at a time


@dataclass(frozen=True)
class Stability:
    """Spread of the counts of each layer over samples of the texts."""

    level: float  # of the interval
    resamples: int
    low: list[int]  # ends of the percentile interval of the bootstrap
    high: list[int]
    splits: int
    halves_equal: list[float]  # share of the splits whose halves give the same count
    halves_difference: list[float]  # mean difference between the counts of two halves, without sign

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are written to ``profile.json``."""
        return asdict(self)


def measure_stability(errors: np.ndarray, rule: Rule, seed: int) -> Stability | None:
    """Return the spread of a rule's counts over bootstrap samples and halves of N texts; ``None`` for a single text.

    Args:
        errors: ``[N, L, H]``, of each text with k clusters at ``[:, :, k - 1]``.
        rule: Chooses the counts from mean errors.
        seed: Of the random samples; the same seed gives the same result.
    """
    if len(errors) < 2:
        return None
    generator = np.random.default_rng(seed)
    low, high = interval(bootstrap_counts(errors, rule, generator))
    first, second = split_half_counts(errors, rule, generator).swapaxes(0, 1)
    return Stability(
        LEVEL, RESAMPLES, low.tolist(), high.tolist(),
        SPLITS, (first == second).mean(0).tolist(), np.abs(first - second).mean(0).tolist(),
    )  # fmt: skip


def bootstrap_counts(
    errors: np.ndarray, rule: Rule, generator: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Return the counts ``[resamples, L]`` of samples of N texts, drawn with replacement."""
    size = len(errors)
    drawn = generator.multinomial(size, np.full(size, 1 / size), size=resamples)  # times that each text is drawn
    return _counts(errors, drawn / size, rule)


def split_half_counts(
    errors: np.ndarray, rule: Rule, generator: np.random.Generator, splits: int = SPLITS
) -> np.ndarray:
    """Return the counts ``[splits, 2, L]`` of two random halves; of an odd number of texts one is left out."""
    half = len(errors) // 2
    orders = generator.permuted(np.tile(np.arange(len(errors)), (splits, 1)), axis=1)
    weights = np.zeros((splits, 2, len(errors)))
    np.put_along_axis(weights[:, 0], orders[:, :half], 1 / half, axis=1)
    np.put_along_axis(weights[:, 1], orders[:, half : 2 * half], 1 / half, axis=1)
    return _counts(errors, weights.reshape(2 * splits, -1), rule).reshape(splits, 2, -1)


def interval(counts: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends ``[L]`` of the percentile interval of counts ``[resamples, L]``; both are counts that occur."""
    tail = (1 - level) / 2
    low, high = np.quantile(counts, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return low.astype(np.int64), high.astype(np.int64)


def _counts(errors: np.ndarray, weights: np.ndarray, rule: Rule) -> np.ndarray:
    """Apply the rule to weighted means over texts: weights ``[R, N]`` to counts ``[R, L]``."""
    flat = errors.reshape(len(errors), -1).astype(np.float64)
    parts = (weights[begin : begin + CHUNK] @ flat for begin in range(0, len(weights), CHUNK))
    return np.concatenate([rule(part.reshape(-1, *errors.shape[1:])) for part in parts])
