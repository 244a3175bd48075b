"""Multi-head attention as the model computes it: the baseline (paper, Section 2)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from chai.flops import decode_entries
from chai.methods.base import Method, Saving
from chai.patching.model_info import UncountedError, layer_shape, logit_weights


@dataclass
class Mha(Method):
    """Leave the model alone: the attention it was loaded with, all heads, the stock cache."""

    saving: ClassVar[Saving] = "none"

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Change nothing."""
        return nullcontext(model)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a model without attention (ValueError)."""
        if not getattr(config.get_text_config(), "num_attention_heads", None):
            raise ValueError(f"a model of the family '{config.model_type}' has no attention heads; valid: one that has")

    def decode_bytes(self, model: PreTrainedModel, kv_len: int, batch_size: int) -> float:
        """Count the bytes of all weights, keys and values; NaN if the layers are not known well enough."""
        try:
            shape = layer_shape(model)
        except UncountedError:
            return math.nan
        entries = decode_entries(shape, self.heads_kept(model.config), kv_len, batch_size)
        return model.dtype.itemsize * (entries + logit_weights(model))

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return all heads."""
        config = config.get_text_config()
        return [config.num_attention_heads] * config.num_hidden_layers
