"""Cache sizes of scored batches, and their means over sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Cache, PreTrainedModel

from chai.cache import cache_bytes, cache_bytes_mha, stored_kv_heads
from chai.methods import baseline
from chai.methods.base import Method

#: Tokens of the prompt whose operations are counted (paper, Figure 1).
PROMPT_TOKENS = 2048


def count_flops(method: Method, model: PreTrainedModel) -> dict[str, int] | None:
    """Count the operations of a prompt under a method and under MHA; ``None`` for a layout that is not known."""
    own, mha = (counted.prompt_flops(model, PROMPT_TOKENS) for counted in (method, baseline()))
    return None if own is None or mha is None else {"tokens": PROMPT_TOKENS, "method": own, "mha": mha}


def cache_stats(cache: Cache, sequences: int) -> dict[str, Any]:
    """Return the live bytes of a batch's cache, and the number of KV heads that each layer stores (JSON-like)."""
    return {
        "sequences": sequences,
        "held": cache_bytes(cache),
        "held_mha": cache_bytes_mha(cache),  # of multi-head attention for the same tokens
        "key_heads": stored_kv_heads(cache),  # of each layer
    }


def mean_savings(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean live bytes of a sequence's cache, and each layer's mean number of stored KV heads."""
    total = {name: sum(batch[name] for batch in batches) for name in ("sequences", "held", "held_mha")}
    layers = zip(*(batch["key_heads"] for batch in batches), strict=True)
    return {
        "kv_bytes": round(total["held"] / total["sequences"]),
        "kv_bytes_mha": round(total["held_mha"] / total["sequences"]),
        "key_heads_stored": [round(sum(heads) / len(heads), 2) for heads in layers],
    }
