"""Clustered head attention: the equation (:mod:`chai.attention.reference`), its fast paths, and the choice of one."""

from chai.attention.dispatch import clustered_attention, mha_attention, shared_value_attention
from chai.attention.reference import apply_weights, attention_weights, causal_mask

__all__ = [
    "apply_weights",
    "attention_weights",
    "causal_mask",
    "clustered_attention",
    "mha_attention",
    "shared_value_attention",
]
