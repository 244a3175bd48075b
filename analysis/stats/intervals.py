"""A number with its intervals."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import norm

LEVEL = 0.95  # of the intervals that are shown
ALPHA = 0.05  # of each of the two one-sided tests of equivalence, and of tests of a difference
EQUAL_LEVEL = 1 - 2 * ALPHA  # of the interval that these two tests correspond to


def quantile(level: float) -> float:
    """Return the half-width of a two-sided interval of a standard normal variable."""
    return float(norm.ppf((1 + level) / 2))


@dataclass(frozen=True)
class Interval:
    """A measured number with its 95 % interval.

    Attributes:
        value: The number.
        low: Lower end of the 95 % interval.
        high: Upper end.
        equal_ends: Ends of the 90 % interval, for tests of equivalence; ``None``: those of the 95 % interval, drawn in
            as for a normal variable.
    """

    value: float
    low: float
    high: float
    equal_ends: tuple[float, float] | None = None

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Return a number without uncertainty, or of unknown uncertainty."""
        return cls(value, value, value)

    @property
    def inner(self) -> tuple[float, float]:
        """Ends of the 90 % interval."""
        if self.equal_ends is not None:
            return self.equal_ends
        share = quantile(EQUAL_LEVEL) / quantile(LEVEL)
        return self.value - share * (self.value - self.low), self.value + share * (self.high - self.value)

    def __neg__(self) -> Interval:
        ends = None if self.equal_ends is None else (-self.equal_ends[1], -self.equal_ends[0])
        return Interval(-self.value, -self.high, -self.low, ends)
