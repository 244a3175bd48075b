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


@dataclass
class FirstTokens:
    """What one layer has seen of the first real tokens of each row, call by call.

    Real tokens needn't be neighbours: padding may stand before them, after them, or between two turns.

    Attributes:
        queries: ``[B, H, tokens, D]``, the queries of the first real tokens.
        positions: long ``[B, tokens]``, where they stand in the sequence; -1 while not seen.
        count: long ``[B]``, real tokens seen so far.
    """

    queries: Tensor
    positions: Tensor
    count: Tensor

    @classmethod
    def before(cls, query: Tensor, tokens: int) -> FirstTokens:
        """Nothing seen yet, for a batch whose queries look like ``query``."""
        rows, heads, _, size = query.shape
        positions = torch.full((rows, tokens), -1, device=query.device)
        return cls(query.new_zeros(rows, heads, tokens, size), positions, positions.new_zeros(rows))

    @property
    def tokens(self) -> int:
        """How many first tokens are wanted."""
        return self.positions.shape[1]

    @property
    def complete(self) -> Tensor:
        """Bool ``[B]``: the rows of which all wanted tokens were seen."""
        return (self.positions >= 0).all(1)

    def note(self, query: Tensor, visible: Tensor) -> Tensor:
        """Take in the queries of one call.

        Args:
            query: ``[B, H, T, D]``.
            visible: bool ``[B, S]``, the keys that any query of this call may attend to (false: padding).

        Returns:
            long ``[B, T]``, the place of each new token among its row's real tokens, from 0; -1 for padding.
        """
        offset = visible.shape[1] - query.shape[2]  # position of the first new token
        new = visible[:, offset:]
        order = torch.where(new, self.count[:, None] + new.cumsum(1) - 1, -1)
        self.count = self.count + new.sum(1)
        if self.tokens:
            wanted = torch.arange(self.tokens, device=order.device)
            matches = order[:, None] == wanted[:, None]  # [B, tokens, T]
            found, index = matches.any(2), matches.to(torch.uint8).argmax(2)
            picked = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
            self.queries = torch.where(found[:, None, :, None], picked, self.queries)
            self.positions = torch.where(found, index + offset, self.positions)
        return order

    def pick(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """Of ``[B, N, T, X]``, which begins at position ``offset``, the first real tokens ``[B, N, tokens, X]``.

        Where a first token isn't in the tensor, something else stands in its place.
        """
        index = (self.positions - offset).clamp(0, tensor.shape[2] - 1)[:, None, :, None]
        return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on. Rows that are complete no longer count their tokens."""
        self.positions = torch.where(self.positions < length, self.positions, -1)
        self.count = torch.where(self.complete, self.count, (self.positions >= 0).sum(1))

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> FirstTokens:
        """The same for a batch whose rows were selected, reordered or repeated."""
        return FirstTokens(select(self.queries), select(self.positions), select(self.count))
