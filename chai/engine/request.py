"""What the host knows of a request, read before its first token: lengths, padding, equal rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Request:
    """A batch of sequences.

    Attributes:
        length: Tokens of each row so far, with padding.
        starts: Padding tokens at the start of each row.
        warmup_tokens: Real tokens of each row that run with all heads.
        shared: All rows have the same clusters.
    """

    batch_size: int
    length: int
    starts: list[int]
    warmup_tokens: int
    shared: bool
    highest: int  # token id
    lowest: int

    @classmethod
    def read(cls, ids: Tensor, attention_mask: Tensor | None, warmup_tokens: int) -> Request:
        """Read prompts ``[B, T]`` and their mask (ValueError: shapes or padding that are not supported)."""
        if not isinstance(ids, Tensor):
            raise ValueError(f"ids are of type {type(ids).__name__}; valid: a tensor [batch_size, tokens]")
        if ids.ndim != 2 or ids.numel() == 0 or ids.dtype not in (torch.long, torch.int32):
            raise ValueError(
                f"ids are {tuple(ids.shape)} of {str(ids.dtype).removeprefix('torch.')}; "
                "valid: integers [batch_size, tokens], at least one token"
            )
        ids = ids.cpu()
        rows, length = ids.shape
        starts = [0] * rows if attention_mask is None else _read_starts(ids, attention_mask)
        # Clusters depend on the warm-up tokens alone.
        ends = [start + warmup_tokens for start in starts]
        first = [row[start:end].tolist() for row, start, end in zip(ids, starts, ends, strict=True)]
        shared = rows == 1 or (max(ends) <= length and all(tokens == first[0] for tokens in first))
        shared = shared or warmup_tokens == 0
        return cls(rows, length, starts, warmup_tokens, shared, int(ids.max()), int(ids.min()))

    def check(self, batch_size: int, longest: int, vocabulary: int) -> None:
        """Refuse what does not fit the engine (ValueError)."""
        if self.batch_size != batch_size:
            raise ValueError(f"ids have {self.batch_size} rows; valid: {batch_size}, the engine's batch_size")
        if self.length > longest:
            raise ValueError(
                f"the prompt has {self.length} tokens; valid: up to {longest}, the engine's max_length without the new "
                "tokens"
            )
        if not 0 <= self.lowest <= self.highest < vocabulary:
            raise ValueError(f"ids are {self.lowest} to {self.highest}; valid: 0 to {vocabulary - 1}")

    def append(self) -> None:
        """Count one more token of each row."""
        self.length += 1

    @property
    def padded(self) -> bool:
        """Whether some row begins with padding."""
        return any(self.starts)

    @property
    def shortest(self) -> int:
        """Real tokens of the shortest row."""
        return self.length - max(self.starts)

    @property
    def longest(self) -> int:
        """Real tokens of the longest row."""
        return self.length - min(self.starts)


def _read_starts(ids: Tensor, attention_mask: Tensor) -> list[int]:
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask is of type {type(attention_mask).__name__}; valid: a tensor [batch_size, tokens], or None"
        )
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; valid: {tuple(ids.shape)}, as ids")
    real = attention_mask.cpu() != 0
    starts = (~real).sum(1)
    if not torch.equal(real, torch.arange(ids.shape[1]) >= starts[:, None]) or bool((starts == ids.shape[1]).any()):
        raise ValueError(
            "attention_mask has padding on the right or between tokens, or a row without tokens; "
            "valid: padding on the left (tokenizer.padding_side = 'left')"
        )
    found: list[int] = starts.tolist()
    return found
