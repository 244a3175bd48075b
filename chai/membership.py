"""From a sequence's first tokens to its membership: a method's rule, and which tokens of a call are the first ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    @property
    def shares_values(self) -> bool:
        """A representative's values stand for its members' too."""
        ...

    def clusters_of(self, layer: int) -> int:
        """K of this layer."""
        ...

    def decide(self, layers: Sequence[int], query: Tensor, key: Tensor, scaling: float) -> list[HeadClusters]:
        """Memberships of all clustered layers at once, from the first tokens.

        Args:
            layers: indices of the ``L`` layers.
            query: ``[L, B, H, tokens, D]``, the queries of the first real tokens of each row.
            key: ``[L, B, H_key, tokens, D]``, their keys.
            scaling: factor of the scores.
        """
        ...


@dataclass
class FirstTokens:
    """Where the first real tokens of each row stand, gathered over as many calls as it takes.

    A token counts when its own call shows it as real, wherever it stands: padding may be left, right, or between two
    turns of a conversation.

    Attributes:
        positions: long ``[B, tokens]``, where they stand in the sequence; -1 while not seen.
        count: long ``[B]``, real tokens seen so far.
    """

    positions: Tensor
    count: Tensor

    @classmethod
    def unseen(cls, rows: int, tokens: int, device: torch.device) -> FirstTokens:
        """Nothing seen yet."""
        positions = torch.full((rows, tokens), -1, device=device)
        return cls(positions, positions.new_zeros(rows))

    @property
    def tokens(self) -> int:
        """How many first tokens are wanted."""
        return self.positions.shape[1]

    @property
    def complete(self) -> Tensor:
        """Bool ``[B]``: the rows of which all wanted tokens were seen."""
        return (self.positions >= 0).all(1)

    def ends(self, real: Tensor) -> list[int]:
        """After how many of a call's new tokens some row has all its first ones, in ascending order.

        Args:
            real: bool ``[B, T]``, the new tokens that aren't padding.
        """
        missing = self.tokens - self.count
        reached = (real.cumsum(1) == missing[:, None]) & real & (missing > 0)[:, None]
        return [int(index) + 1 for index in reached.any(0).nonzero()]

    def note(self, real: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Take in a call's new tokens, the first of which stands at position ``offset``.

        Returns:
            bool and long ``[B, tokens]``: which of the wanted tokens are among the new ones, and where (from 0).
        """
        place = torch.where(real, self.count[:, None] + real.cumsum(1) - 1, -1)  # [B, T], among the real tokens
        matches = place[:, None] == torch.arange(self.tokens, device=real.device)[:, None]  # [B, tokens, T]
        found, index = matches.any(2), matches.to(torch.uint8).argmax(2)
        self.count = self.count + real.sum(1)
        self.positions = torch.where(found, index + offset, self.positions)
        return found, index

    def crop(self, length: int) -> None:
        """Forget tokens from position ``length`` on. Rows that are complete no longer count their tokens."""
        self.positions = torch.where(self.positions < length, self.positions, -1)
        self.count = torch.where(self.complete, self.count, (self.positions >= 0).sum(1))

    def map_rows(self, select: Callable[[Tensor], Tensor]) -> FirstTokens:
        """The same for a batch whose rows were selected, reordered or repeated."""
        return FirstTokens(select(self.positions), select(self.count))


def take_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """The given tokens of each row: ``[B, N, T, X]`` and ``[B, t]`` (long) to ``[B, N, t, X]``."""
    return tensor.gather(2, index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
