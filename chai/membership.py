"""From a sequence's first tokens to its membership: a method's rule, and what a cache notes until it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chai.clustering import HeadClusters


class MembershipRule(Protocol):
    """How a method decides which heads belong together; the same object serves all caches."""

    @property
    def tokens(self) -> int:
        """Real tokens of multi-head attention before the membership is decided; 0: it is known from the start."""
        ...

    def clusters_of(self, layer: int) -> int:
        """K of this layer."""
        ...

    def decide(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> HeadClusters:
        """Membership of a layer from its first tokens.

        Args:
            layer: index of the layer.
            query: ``[B, H, tokens, D]``, the queries of the first real tokens of each row.
            key: ``[B, H, tokens, D]``, their keys, repeated for grouped queries.
            scaling: factor of the scores.

        """
        ...


@dataclass(frozen=True)
class Span:
    """Where a call's tokens stand in the sequence: ``length`` keys in all, of which the last ``count`` are new."""

    count: int
    length: int

    @property
    def offset(self) -> int:
        """Position of the first new token."""
        return self.length - self.count


@dataclass
class FirstTokens:
    """What one layer has seen of the first real tokens of each row, call by call.

    Attributes:
        start: long ``[B]``, position of the first real token; -1 while only padding was seen.
        queries: ``[B, H, tokens, D]``, the queries of the first real tokens.
        seen: bool ``[B, tokens]``, which of them are there already.

    """

    start: Tensor
    queries: Tensor
    seen: Tensor

    @classmethod
    def before(cls, query: Tensor, tokens: int) -> FirstTokens:
        """Nothing seen yet, for a batch whose queries look like ``query``."""
        rows, heads, _, size = query.shape
        return cls(
            torch.full((rows,), -1, device=query.device),
            query.new_zeros(rows, heads, tokens, size),
            torch.zeros(rows, tokens, dtype=torch.bool, device=query.device),
        )

    @property
    def tokens(self) -> int:
        """How many first tokens are wanted."""
        return self.seen.shape[1]

    @property
    def complete(self) -> Tensor:
        """Bool ``[B]``: the rows of which all wanted tokens were seen."""
        return self.seen.all(1) & (self.start >= 0)

    def note(self, query: Tensor, visible: Tensor) -> None:
        """Take in the queries of one call.

        Args:
            query: ``[B, H, T, D]``.
            visible: bool ``[B, S]``, the keys that any query of this call may attend to (false: padding).

        """
        span = Span(query.shape[2], visible.shape[1])
        first = torch.where(visible.any(1), visible.to(torch.uint8).argmax(1), -1)
        self.start = torch.where(self.start < 0, first, self.start)
        positions = self.positions(span)
        new = (self.start[:, None] >= 0) & (self._steps() + self.start[:, None] < span.length)
        new &= (positions >= span.offset) & visible.gather(1, positions)
        self.queries = torch.where(new[:, None, :, None], self.pick(query, span), self.queries)
        self.seen = self.seen | new

    def positions(self, span: Span) -> Tensor:
        """Long ``[B, tokens]``: where each row's first real tokens stand, clamped to the sequence so far."""
        return (self.start[:, None].clamp(min=0) + self._steps()).clamp(max=span.length - 1)

    def pick(self, tensor: Tensor, span: Span) -> Tensor:
        """Of a call's ``[B, N, T, X]`` the first real tokens ``[B, N, tokens, X]``; clamped where they aren't in it."""
        index = (self.positions(span) - span.offset).clamp(0, span.count - 1)[:, None, :, None]
        return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))

    def order(self, span: Span) -> Tensor:
        """Long ``[B, T]``: the place of each new token among its row's real tokens, from 0; negative for padding."""
        start = torch.where(self.start < 0, span.length, self.start)
        return torch.arange(span.offset, span.length, device=start.device) - start[:, None]

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on."""
        self.seen = self.seen & (self.start[:, None] + self._steps() < length)
        self.start = torch.where(self.start >= length, -1, self.start)

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> FirstTokens:
        """The same for a batch whose rows were selected, reordered or repeated."""
        return FirstTokens(select(self.start), select(self.queries), select(self.seen))

    def _steps(self) -> Tensor:
        return torch.arange(self.tokens, device=self.start.device)
