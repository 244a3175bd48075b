"""A growing buffer for the keys or values of a cache layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Buffer lengths, and those of :meth:`TokenBuffer.padded`, are multiples of this.
ROUND = 64


class TokenBuffer:
    """Keys or values ``[B, N, S, D]`` to which tokens are appended, with spare room behind the last.

    The buffer is copied when a 32nd of its length has been added, instead of at every token.
    """

    def __init__(self, reserve: int = 0) -> None:
        self.length = 0  # tokens stored
        self.reserve = reserve  # tokens of the first allocation
        self.buffer: Tensor | None = None  # with the spare room; None while empty

    @property
    def view(self) -> Tensor:
        """The stored tokens."""
        assert self.buffer is not None
        return self.buffer.narrow(-2, 0, self.length)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the buffer, spare room included."""
        return 0 if self.buffer is None else self.buffer.nbytes

    def append(self, new: Tensor) -> Tensor:
        """Append tokens; returns all."""
        count, needed = new.shape[-2], self.length + new.shape[-2]
        if torch.is_grad_enabled() and new.requires_grad:  # never overwrite what a gradient may need
            self.buffer = torch.cat([self.view, new], -2) if self.length else new
            self.length = needed
            return self.buffer
        if self.buffer is None or needed > self.buffer.shape[-2]:
            shape = list(new.shape)
            shape[-2] = self._room(needed)
            buffer = new.new_empty(shape)
            buffer.narrow(-2, needed, shape[-2] - needed).zero_()  # `padded` reads it, so it must hold numbers
            if self.length:
                buffer.narrow(-2, 0, self.length).copy_(self.view)
            self.buffer = buffer
        self.buffer.narrow(-2, self.length, count).copy_(new)
        self.length = needed
        return self.view

    def replace(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Replace the stored tokens by ``change`` of them, which may alter rows or heads."""
        changed = change(self.view)
        self.buffer, self.length = None, 0
        return self.append(changed)

    def padded(self) -> Tensor:
        """Return the stored tokens, padded with arbitrary numbers to a length that seldom changes.

        That is the whole buffer, which is contiguous: torch copies a part of it for every half-precision product on a
        CPU, which takes up to twenty times as long as the product. Of a buffer with much more room than growing leaves
        (``reserve``, or after a crop), the first tokens up to a multiple of ``ROUND``.
        """
        assert self.buffer is not None
        if self.buffer.shape[-2] <= self.length + 2 * self._step(self.length):
            return self.buffer
        return self.buffer.narrow(-2, 0, -(-self.length // ROUND) * ROUND)

    def crop(self, length: int) -> Tensor:
        """Drop the tokens from ``length`` on."""
        self.length = length
        return self.view

    def _room(self, needed: int) -> int:
        step = self._step(needed)
        return max(-(-needed // step) * step, self.reserve)

    @staticmethod
    def _step(length: int) -> int:
        """Return by how many tokens a buffer of this length grows."""
        return max(ROUND, length // 32 // ROUND * ROUND)
