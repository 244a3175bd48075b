"""Features of heads: the attention among the warm-up tokens (paper, Section 3.3)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from chai.attention.reference import cap_scores


def attention_features(
    query: Tensor, key: Tensor, scaling: float, causal: bool = True, softcap: float | None = None
) -> Tensor:
    """Compute the attention matrix of each head among t tokens, ``softmax(scaling * Q_h K_h^T)``, as one vector.

    From query and key ``[..., H, t, D]`` after rotary embedding to ``[..., H, t * t]`` in fp32. The authors' release
    leaves the causal mask out. A soft cap bounds the scores, as in the model's own attention.
    """
    query_rows, key_rows = query.float().flatten(0, -3), key.float().flatten(0, -3)
    mask = _score_mask(query.shape[-2], causal, query.device).expand(len(query_rows), -1, -1)
    if softcap is None:
        scores = torch.baddbmm(mask, query_rows, key_rows.transpose(1, 2), alpha=scaling)
    else:
        scores = mask + cap_scores(scaling * torch.bmm(query_rows, key_rows.transpose(1, 2)), softcap)
    return scores.softmax(-1).view(*query.shape[:-2], -1)


@lru_cache(maxsize=16)
def _score_mask(tokens: int, causal: bool, device: torch.device) -> Tensor:
    """Return ``[t, t]`` to add to scores: -inf for later tokens if ``causal``, else 0."""
    with torch.inference_mode(False):  # cached for calls outside of inference mode, too
        return torch.full((tokens, tokens), -torch.inf if causal else 0.0, device=device).triu(1)
