"""Multi-head attention as the model has it: the baseline (paper, section 2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

from transformers import Cache, PreTrainedConfig, PreTrainedModel

from chai.methods.base import Method, Saving, plain_cache


@dataclass
class Mha(Method):
    """Leaves the model alone: the attention it was loaded with, all heads, the stock cache."""

    saving: ClassVar[Saving] = "none"

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Nothing to apply and nothing to restore."""
        return nullcontext(model)

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """A stock ``DynamicCache``, which reserves nothing."""
        return plain_cache(model)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """All of them."""
        return [config.num_attention_heads] * config.num_hidden_layers
