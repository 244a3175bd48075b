"""The interface of a method: a dataclass of hyper-parameters, applied to a model by a ``with`` block.

A method also defines its FLOPs, its bytes and how benchmarks time it. The defaults are those of multi-head attention;
override what differs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from chai.cache import vector_bytes
from chai.flops import LayerFlops, LayerShape, prompt_flops
from chai.patching.model_info import (
    UncountedError,
    is_latent,
    layer_shape,
    logit_weights,
    num_kv_heads,
    sliding_windows,
)

#: ``real``: less is stored and computed. ``simulated``: masked, nothing is saved. ``none``: nothing is claimed.
Saving = Literal["real", "simulated", "none"]


class Method(ABC):
    """A way of computing a model's attention."""

    saving: ClassVar[Saving]

    @abstractmethod
    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply to ``model`` inside a ``with`` block; the model is restored at its end, also after an exception."""

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """Build an empty KV cache for one batch, to be passed as ``past_key_values``.

        ``reserve`` tokens are allocated at once, if the method's cache can; the stock ``DynamicCache`` cannot.
        """
        return DynamicCache(config=model.config)

    @abstractmethod
    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return the number of heads of each layer whose scores are computed."""

    def note(self, config: PreTrainedConfig) -> str:
        """Return a one-line note for the user about this method on this model; empty for most."""
        return ""

    def result_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return further fields of a run's result about this method on this model; none for most."""
        return {}

    def check(self, config: PreTrainedConfig) -> None:
        """Verify that the method can run on such a model, before its weights are loaded (ValueError: it cannot)."""

    def check_weights(self, model: PreTrainedModel) -> None:
        """Verify what depends on the loaded weights (ValueError: the method was prepared for other weights)."""

    # Operations and bytes by arithmetic.

    def layer_flops(self, config: PreTrainedConfig) -> list[LayerFlops]:
        """Return the FLOP counts of each layer for a prompt. By default, heads that are not kept cost nothing."""
        return [LayerFlops(kept, kept, kept) for kept in self.heads_kept(config)]

    def layer_shape(self, model: PreTrainedModel) -> LayerShape:
        """Return the shape of the model's layers as this method uses them."""
        return layer_shape(model)

    def prompt_flops(self, model: PreTrainedModel, q_len: int) -> int | None:
        """Count the operations of a prompt by the algorithm: all layers, and the logits of its last token.

        ``None`` for a model whose layers are not known well enough.
        """
        try:
            shape = self.layer_shape(model)
        except UncountedError:
            return None
        return prompt_flops(shape, self.layer_flops(model.config), q_len) + 2 * logit_weights(model)

    def prefill_flops(self, model: PreTrainedModel, q_len: int) -> float:
        """Count the operations that limit the time to first token; NaN if not known."""
        flops = self.prompt_flops(model, q_len)
        return math.nan if flops is None else flops

    def decode_bytes(self, model: PreTrainedModel, kv_len: int, batch_size: int) -> float:
        """Count the bytes that limit the time to next token: weights, and the KV cache of a batch; NaN if not known."""
        return math.nan

    def expected_cache_bytes(self, model: PreTrainedModel, cache: Cache) -> float:
        """Count the bytes that a filled cache must hold by arithmetic: all keys and values, unless overridden.

        NaN for latent attention, whose keys and values differ in width.
        """
        config = model.config.get_text_config()
        if is_latent(config):
            return math.nan
        kv_len, windows = cache.get_seq_length(), sliding_windows(config)
        # A layer with a sliding window keeps the tokens that the next one still sees.
        tokens = sum(kv_len if window is None else min(kv_len, window - 1) for window in windows)
        return vector_bytes(cache) * 2 * num_kv_heads(config) * tokens

    # Used by scoring and benchmarks.

    def set_context_lengths(self, cache: Cache, lengths: Tensor) -> None:
        """Set the number of context tokens (long ``[B]``) before a call that also holds continuations."""

    def real_prefix(self, kv_len: int) -> int:
        """Return how many of the first tokens of a benchmark's context must pass through the model.

        The rest of the cache may be filled with random numbers: time and memory of a token do not depend on them.
        """
        return min(max(5, self.warmup_tokens), kv_len)

    @property
    def warmup_tokens(self) -> int:
        """Real tokens of multi-head attention at the start of a request."""
        return 0

    def with_num_clusters(self, k: int) -> Method | None:
        """Return the method with ``k`` clusters in every layer; ``None`` for a method without clusters."""
        return None

    def benchmark_counts(self, config: PreTrainedConfig, requested: list[int] | None) -> list[int]:
        """Return the numbers of clusters at which attention and a layer are timed alone."""
        return [config.get_text_config().num_attention_heads]

    def attention_timer(
        self, query: Tensor, key: Tensor, value: Tensor, k: int, scaling: float
    ) -> Callable[[], object] | None:
        """Build a function that computes the attention alone, with ``k`` clusters of equal size.

        Query is ``[B, H, T, D]``, key and value ``[B, H_kv, S, D]``; ``None`` for a method without an attention of its
        own.
        """
        return None

    def clustering_timer(self, model: PreTrainedModel, batch_size: int) -> Callable[[], object] | None:
        """Build a function that clusters the heads of all layers once; ``None`` where nothing is clustered online."""
        return None
