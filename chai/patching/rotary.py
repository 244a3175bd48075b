"""Rotary frequencies that depend on the length of a call (dynamic NTK, LongRoPE), where its tokens are divided.

``transformers`` chooses these frequencies by the largest position of each call of the rotary embedding. A part of the
tokens must be rotated as the whole is, so the embedding is computed for all tokens, and cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from chai.patching.devices import replaced_forward

#: Types of rotary embedding whose frequencies depend on the length.
BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class _Part:
    positions: Tensor  # [B or 1, T], of all tokens of the call
    begin: int
    end: int


_PART: ContextVar[_Part | None] = ContextVar("rotary_part", default=None)


@contextmanager
def part_of_positions(positions: Tensor, begin: int, end: int) -> Iterator[None]:
    """Let the decoder run inside the block on the tokens from ``begin`` to ``end`` of a call, in this thread."""
    token = _PART.set(_Part(positions, begin, end))
    try:
        yield
    finally:
        _PART.reset(token)


@contextmanager
def whole_call_frequencies(model: PreTrainedModel) -> Iterator[None]:
    """Rotate the tokens of a part by the frequencies of the whole call inside the block."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None or not depends_on_length(rotary):
        yield
        return
    rotate = rotary.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        part = _PART.get()
        if part is None:
            return rotate(x, position_ids, *args, **kwargs)
        whole = rotate(x, part.positions.to(position_ids.device), *args, **kwargs)  # each [B or 1, T, D]
        return tuple(tensor[:, part.begin : part.end] for tensor in whole)

    with replaced_forward(rotary, forward):
        yield


def depends_on_length(rotary: nn.Module) -> bool:
    """Whether the frequencies of a rotary embedding depend on the length; some models have a type for each layer."""
    kinds = getattr(rotary, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(name in str(kind) for kind in kinds for name in BY_LENGTH)
