"""The choice of the next token on the device, without a host read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Temperatures below this are greedy: logits that are divided by them would overflow.
GREEDY = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; each setting means what it does in transformers' ``generate()``.

    Attributes:
        temperature: Divides the logits; below 1e-5: the most probable token (greedy), as with 0.
        top_k: Only the ``top_k`` most probable tokens; ``None``: all.
        top_p: Of these, the fewest most probable ones whose probabilities sum to ``top_p``; ``None``: all.

    Raises:
        ValueError: A value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; valid: 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; valid: 1 or more, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; valid: above 0, up to 1, or None")


def next_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose one token for each row: ``[B, V]`` to long ``[B]``.

    With ``E_i`` independent and exponentially distributed, ``argmax_i p_i / E_i`` has the distribution ``p``: a sample
    without a search in cumulated probabilities.
    """
    if sampling.temperature < GREEDY:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None:
        ordered, places = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the more probable tokens: 0 for the first
        logits = torch.empty_like(logits).scatter_(1, places, ordered.masked_fill(before >= sampling.top_p, -torch.inf))
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)
