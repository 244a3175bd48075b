"""SpAtten: tokens and heads that matter little are pruned, for good, from layer to layer (Wang et al., HPCA 2021)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import Cache, PreTrainedConfig, PreTrainedModel

from chai.cascade import CascadeRule
from chai.cascade_runtime import cascade_pruned, check_cascade, new_cascade_cache
from chai.flops import LayerWork
from chai.methods.base import Method, Saving, plain_cache


@dataclass
class Spatten(Method):
    """Cascade token pruning, cascade head pruning, and local value pruning (sections III-A to III-C of the paper).

    A token's importance is the attention given to it, a head's the magnitude of its output, both summed over all
    layers so far; what one layer prunes stays pruned in all later ones. :mod:`chai.cascade` has the equations.

    A language model's row may not depend on later ones, so each token of the context is pruned by the importance that
    it and the tokens before it gave. Text after the context (generated, or a continuation that is scored) sees what
    the context's last token sees, is never pruned itself, and has no say. The context is the first call's tokens, or
    ``cache.contexts`` of them.

    Pruned tokens and heads leave the cache, keys and values, when the context is over: that saving is real, and so is
    that of decoding. While the context is read pruning is a mask.

    Attributes:
        tokens: share of the tokens that the last layer keeps.
        heads: share of the heads that the last layer keeps.
        values: share of the values that each head reads for a token, those of the largest weights (a mask).
        unpruned_tokens: share of the layers, from the first, that keep all tokens; from there the share that is kept
            falls linearly to ``tokens``. The first layer keeps all anyway.
        unpruned_heads: the same for heads.

    Raises:
        ValueError: a value outside its choices.
    """

    tokens: float = 0.5
    heads: float = 0.75
    values: float = 1.0
    unpruned_tokens: float = 0.15
    unpruned_heads: float = 0.3

    saving: ClassVar[Saving] = "real"

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "values"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: above 0, up to 1")
        for name in ("unpruned_tokens", "unpruned_heads"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: 0 to 1")

    def rule(self, config: PreTrainedConfig) -> CascadeRule:
        """What each layer of such a model keeps."""
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        tokens = schedule(layers, self.unpruned_tokens, self.tokens)
        shares = schedule(layers, self.unpruned_heads, self.heads)
        return CascadeRule(tokens, tuple(max(1, math.ceil(share * heads - 1e-9)) for share in shares), self.values)

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply; see :func:`chai.cascade_runtime.cascade_pruned`."""
        self.check(model.config)
        return nullcontext(model) if self._idle(model.config) else cascade_pruned(model, self.rule(model.config))

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """An empty :class:`chai.cascade.CascadeCache`; the stock cache where nothing is pruned."""
        if self._idle(model.config):
            return plain_cache(model)
        return new_cascade_cache(model.config, self.rule(model.config), reserve)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Heads of each layer that aren't pruned."""
        return list(self.rule(config).heads)

    def work(self, config: PreTrainedConfig) -> list[LayerWork]:
        """Kept tokens and heads: in SpAtten a pruned token is gone, with its own queries, outputs and MLP."""
        shares = self.rule(config).tokens
        return [replace(one, tokens=s, read=self.values) for one, s in zip(super().work(config), shares, strict=True)]

    def note(self, config: PreTrainedConfig) -> str:
        """Where the saving is real."""
        shares = ", ".join(f"{share:.2f}" for share in self.rule(config).tokens)
        return f"spatten keeps {shares} of the tokens; real in the cache and in decoding, a mask while a prompt is read"

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that isn't supported, and sliding windows."""
        check_cascade(config)

    def _idle(self, config: PreTrainedConfig) -> bool:
        rule = self.rule(config)
        return rule == CascadeRule((1.0,) * len(rule.tokens), (config.num_attention_heads,) * len(rule.heads), 1.0)


def schedule(layers: int, unpruned: float, last: float) -> tuple[float, ...]:
    """For each layer the share that it keeps: all in the first ones, then falling linearly to ``last``."""
    first = max(1, math.ceil(unpruned * layers - 1e-9))
    return tuple(1 - (1 - last) * max(0, layer - first + 1) / max(1, layers - first) for layer in range(layers))
