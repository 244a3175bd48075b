"""Correct the p-values of a family of comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values: the chance of any false finding in the family stays below the level.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p, kind="stable")
    # The smallest is multiplied by their number, the next by one less, and so on; none falls below the one before it.
    ranked = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(ranked), 1.0) if len(p) else ranked
    return adjusted.tolist()
