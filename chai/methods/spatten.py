"""SpAtten: cascade pruning of tokens and heads (Wang et al., HPCA 2021, https://arxiv.org/abs/2012.09852).

The equations are in :mod:`chai.patching.cascade`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from chai.cache import vector_bytes
from chai.cache.cascade import CascadeCache, CascadeRule
from chai.flops import LayerFlops
from chai.methods.base import Method, Saving
from chai.patching.apply import Decoder, adopt_cache, patched, running
from chai.patching.cascade import GlobalPass, PerRowPass
from chai.patching.generation import generation_contexts, take_context_lengths
from chai.patching.model_info import check_family, num_kv_heads, sliding_windows

#: Shares that the authors' release keeps, from a depth of the 24-layer model on: GPT-2-medium on WikiText-2, the only
#: workload of the release that prunes tokens, heads and values (github.com/mit-han-lab/spatten, spatten_hardware/
#: hardware/workloads/summary-gpt2-medium-wikitext2-per0-hp-step5+dedic+glob_p+local_p+hp+topk+quant.csv: key_fetch_num
#: of 1,024 tokens, heads of 16, value_fetch_num of key_fetch_num).
AUTHORS_LAYERS = 24
AUTHORS_TOKENS = {0: 1.0, 2: 0.9, 3: 0.8, 5: 0.6, 11: 0.3}
AUTHORS_HEADS = {0: 1.0, 16: 0.8, 22: 0.6}
AUTHORS_VALUES = 0.3
#: Numbers of ``preset="linear"``; the unpruned layers are those of the paper (Section V-A).
LINEAR = {"tokens": 0.5, "heads": 0.75, "values": 1.0, "unpruned_tokens": 0.15, "unpruned_heads": 0.3}


@dataclass
class Spatten(Method):
    """Cascade token pruning, cascade head pruning, and local value pruning (Sections III-A to III-C).

    What one layer prunes stays pruned in all later ones. Text after the context (generated, or a continuation that is
    scored) is never pruned itself, and gives no importance. The context is the tokens of the first call, unless lengths
    were set with :meth:`set_context_lengths`.

    Pruned tokens and heads leave the cache, keys and values, when the context is over: that saving is real, and so is
    that of decoding. While the context is read, pruning is a mask.

    Attributes:
        tokens: Share of the tokens that the last layer keeps; ``None``: the preset's shares.
        heads: Share of the heads that the last layer keeps; ``None``: the preset's shares.
        values: Share of the values that each head reads for a token, those of the largest weights; ``None``: the
            preset's.
        unpruned_tokens: Share of the layers, from the first, that keep all tokens; from there the share kept falls
            linearly to ``tokens``. The first layer always keeps all. ``None``: 0.15.
        unpruned_heads: The same for heads. ``None``: 0.3.
        pruning: ``global``: the published algorithm; the importance from all tokens of the context decides on one set
            of tokens and heads for the whole sequence, and a pruned token has no rows in later layers. The context must
            come in one call. ``per_row``: each token of the context chooses by the importance that it and the tokens
            before it gave; so none depends on later ones, and all tokens go through all layers.
        preset: ``authors``: the shares that the authors' release keeps in each layer, by relative depth. ``linear``:
            the numbers in :data:`LINEAR`. ``None``: authors if pruning is global, linear if it is per row.

    Raises:
        ValueError: A value outside its choices, or one that the preset does not use.
    """

    tokens: float | None = None
    heads: float | None = None
    values: float | None = None
    unpruned_tokens: float | None = None
    unpruned_heads: float | None = None
    pruning: Literal["global", "per_row"] = "global"
    preset: Literal["authors", "linear"] | None = None

    saving: ClassVar[Saving] = "real"

    def __post_init__(self) -> None:
        for name, choices in (("pruning", ("global", "per_row")), ("preset", ("authors", "linear", None))):
            if getattr(self, name) not in choices:
                listed = ", ".join("null" if choice is None else choice for choice in choices)
                raise ValueError(f"{name} is {getattr(self, name)}; valid: {listed}")
        for name in ("tokens", "heads", "values"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; valid: above 0, up to 1")
        for name in ("unpruned_tokens", "unpruned_heads"):
            value, shares = getattr(self, name), name.removeprefix("unpruned_")
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; valid: 0 to 1")
            if value is not None and self._is_authors and getattr(self, shares) is None:
                raise ValueError(
                    f"{name} has no effect on the authors' shares; valid: set {shares}, too, or preset=linear"
                )

    @property
    def _is_authors(self) -> bool:
        return self.preset == "authors" or (self.preset is None and self.pruning == "global")

    def rule(self, config: PreTrainedConfig) -> CascadeRule:
        """Return what each layer of such a model keeps."""
        num_heads = config.num_attention_heads
        tokens = self._shares("tokens", AUTHORS_TOKENS, config.num_hidden_layers)
        shares = self._shares("heads", AUTHORS_HEADS, config.num_hidden_layers)
        heads = tuple(max(1, math.ceil(share * num_heads - 1e-9)) for share in shares)
        values = AUTHORS_VALUES if self._is_authors and self.values is None else self._number("values")
        return CascadeRule(tokens, heads, values, self.pruning)

    def _shares(self, name: str, authors: dict[int, float], num_layers: int) -> tuple[float, ...]:
        """Return the share of tokens or heads that each layer keeps."""
        if self._is_authors and getattr(self, name) is None:
            return stretched(authors, AUTHORS_LAYERS, num_layers)
        return schedule(num_layers, self._number(f"unpruned_{name}"), self._number(name))

    def _number(self, name: str) -> float:
        value: float | None = getattr(self, name)
        return LINEAR[name] if value is None else value

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply to ``model`` inside a ``with`` block."""
        self.check(model.config)
        return nullcontext(model) if self._prunes_nothing(model.config) else self._apply(model)

    @contextmanager
    def _apply(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        rule = self.rule(model.config)
        new_pass = GlobalPass if rule.pruning == "global" else PerRowPass

        def forward(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
            contexts = take_context_lengths(model)
            call = decoder.parse(args, kwargs)
            call.kwargs["past_key_values"], cache = adopt_cache(
                call.kwargs.get("past_key_values"),
                CascadeCache,
                rule,
                lambda: CascadeCache.empty(rule, num_kv_heads(model.config)),
                "cascade pruning",
            )
            if contexts is not None:
                cache.contexts = contexts
            real = call.real_tokens()
            with cache.state.attach(), running(new_pass(cache, real, *cache.advance(real))):
                output = decoder.forward(**call.kwargs)
            cache.prune_if_over()
            return call.finish(output)

        with patched(model, forward), generation_contexts(model):
            yield model

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """Build an empty :class:`chai.cache.cascade.CascadeCache`; the stock cache where nothing is pruned."""
        if self._prunes_nothing(model.config):
            return super().new_cache(model)
        return CascadeCache.empty(self.rule(model.config), num_kv_heads(model.config), reserve)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """Return the heads of each layer that are not pruned."""
        return list(self.rule(config).heads)

    def layer_flops(self, config: PreTrainedConfig) -> list[LayerFlops]:
        """Count what the algorithm of ``pruning`` computes.

        Global: kept tokens and heads; a pruned token is gone, with its queries, keys, values, outputs and MLP. Per row:
        all tokens, with the keys and values of all heads, since later tokens may keep other ones; each token scores the
        tokens that it sees, with its own heads.
        """
        layers = zip(super().layer_flops(config), self.rule(config).tokens, strict=True)
        values = self.rule(config).values
        if self.pruning == "global":
            return [replace(layer, tokens=share, read=values) for layer, share in layers]
        projected = config.num_attention_heads
        return [replace(layer, projected=projected, seen=share, read=values) for layer, share in layers]

    def expected_cache_bytes(self, model: PreTrainedModel, cache: Cache) -> float:
        """Count each layer's share of the context, all later tokens, and the KV heads that are left."""
        if self._prunes_nothing(model.config):
            return super().expected_cache_bytes(model, cache)
        view, vectors = CascadeCache.of(cache), 0
        for layer, share in zip(view.pruned_layers, view.rule.tokens, strict=True):
            context = math.ceil(share * view.state.split - 1e-9)
            heads = layer.num_kv_heads if layer.remaining is None else layer.remaining.stored.shape[1]
            vectors += (context + view.get_seq_length() - view.state.split) * 2 * heads
        return vector_bytes(cache) * vectors

    def set_context_lengths(self, cache: Cache, lengths: Tensor) -> None:
        """Set the number of context tokens of each row."""
        if isinstance(cache, CascadeCache):
            cache.contexts = lengths

    def real_prefix(self, kv_len: int) -> int:
        """Return all tokens: importance is summed over the whole context."""
        return kv_len

    def note(self, config: PreTrainedConfig) -> str:
        """Return the share of tokens kept per layer, and where the saving is real."""
        rule = self.rule(config)
        shares = ", ".join(f"{share:.2f}" for share in rule.tokens)
        kept = "of the tokens" if rule.pruning == "global" else "of the tokens for each token"
        return (
            f"spatten keeps {shares} {kept}; operations are those of the algorithm; simulated in prefill (a mask), "
            "real in cache and decode"
        )

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that is not supported, and sliding windows."""
        check_family(config)
        if any(windows := sliding_windows(config)):
            raise ValueError(
                f"token pruning does not support sliding windows; this model's is {next(filter(None, windows))} tokens "
                "(valid: models without, or with sliding_window null)"
            )

    def _prunes_nothing(self, config: PreTrainedConfig) -> bool:
        rule = self.rule(config)
        return set(rule.tokens) == {1.0} and set(rule.heads) == {config.num_attention_heads} and rule.values == 1


def schedule(num_layers: int, unpruned: float, last: float) -> tuple[float, ...]:
    """Return the share that each layer keeps: all in the first ones, then falling linearly to ``last``."""
    first = max(1, math.ceil(unpruned * num_layers - 1e-9))
    falling = (max(0, layer - first + 1) / max(1, num_layers - first) for layer in range(num_layers))
    return tuple(1 - (1 - last) * part for part in falling)


def stretched(shares: dict[int, float], depth: int, num_layers: int) -> tuple[float, ...]:
    """Return each layer's share from that of the layer at the same relative depth in a model of ``depth`` layers.

    ``shares`` maps the first layer of each stretch of layers to their share.
    """
    return tuple(
        next(share for first, share in reversed(shares.items()) if layer * depth // num_layers >= first)
        for layer in range(num_layers)
    )
