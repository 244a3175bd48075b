"""Tango's score interval of a paired difference of proportions.

T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
Statistics in Medicine 17 (1998). Unlike the percentiles of a bootstrap, it keeps its level with few flipped items, and
has a width without any: z^2 / (n + z^2) to either side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
STEPS = 32  # of the bisection: to 5e-10


def statistic(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, difference: ArrayLike) -> Floats:
    """Return the score statistic of each comparison, standard normal if the true difference is as given.

    The statistic is ``(gained - lost - n d) / sqrt(n (2 q + d (1 - d)))``, where ``q``, the share of lost items, is its
    maximum-likelihood estimate under the true difference ``d``.

    Args:
        lost: Number of items right at first and wrong then; fractions are allowed.
        gained: Number of items wrong at first and right then.
        n: Number of all items.
        difference: The true difference of the shares of right items, between -1 and 1.
    """
    b, c, n, d = (np.asarray(value, dtype=float) for value in (lost, gained, n, difference))
    linear = (2 * n - c + b) * d - b - c
    constant = -b * d * (1 - d)
    q = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = np.maximum(n * (2 * q + d * (1 - d)), 0)
    distance = c - b - n * d
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(distance) < 1e-12 * n, 0.0, distance / np.sqrt(variance))


def ends(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, z: float) -> tuple[Floats, Floats]:
    """Return both ends of the interval of each comparison: the differences whose statistic is ``z`` and ``-z``."""
    b, c, n = (np.asarray(value, dtype=float) for value in (lost, gained, n))
    d = (c - b) / n
    # The statistic falls as the difference grows. Bisect the lower end between -1 and d, the upper between d and 1.
    left, right = np.stack([np.full_like(d, -1.0), d]), np.stack([d, np.full_like(d, 1.0)])
    target = np.array([z, -z]).reshape(2, *[1] * d.ndim)
    for _ in range(STEPS):
        middle = (left + right) / 2
        is_above = statistic(b, c, n, middle) > target
        left, right = np.where(is_above, middle, left), np.where(is_above, right, middle)
    low, high = (left + right) / 2
    return low, high
