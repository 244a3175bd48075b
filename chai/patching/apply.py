"""Patch a model so that a method computes its attention; undo on exit.

``transformers`` passes no cache to the attention function and no queries to the cache. So the decoder's ``forward`` is
wrapped, and one attention function is registered. The wrapper starts a :class:`ForwardPass` that holds the cache and
puts it into a context variable; the attention function hands each layer's inputs to it.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chai.attention import mha_attention
from chai.cache import PrunedCache, PrunedLayer
from chai.patching.devices import replaced_forward
from chai.patching.falcon import dispatched_falcon
from chai.patching.model_info import check_family, list_layers

ATTENTION = "chai"  # the name registered with transformers; it must not contain "flash" or "sdpa"

#: What our attention does not compute.
UNSUPPORTED = {"s_aux": "attention sinks", "position_bias": "position biases"}

P = TypeVar("P", bound=PrunedCache)


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one layer's attention."""

    module: nn.Module  # the attention module
    query: Tensor  # [B, H, T, D], or the computed heads alone
    key: Tensor  # [B, H_kv, S, D], or what the cache stores
    value: Tensor  # [B, H_kv, S, D], or what the cache stores
    mask: Tensor | None  # [B or 1, 1, T, S] or None, as transformers passes it
    scaling: float  # factor of the scores
    softcap: float | None  # bound of the scores (Gemma 2)
    options: dict[str, Any]  # further arguments of transformers

    @property
    def layer_idx(self) -> int:
        """Index of the layer."""
        return cast(int, self.module.layer_idx)

    def stock(self) -> Tensor:
        """Compute the model's own attention, ``[B, T, H, D]``."""
        if self.softcap is not None:  # which the fused kernel does not compute
            return mha_attention(self.query, self.key, self.value, self.scaling, self.mask, softcap=self.softcap)
        return sdpa_attention_forward(
            self.module, self.query, self.key, self.value, self.mask, scaling=self.scaling, **self.options
        )[0]


class ForwardPass(ABC):
    """One call of the decoder: the state that its layers' attention needs."""

    @abstractmethod
    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Compute one layer's attention, ``[B, T, H, D]``."""


_PASS: ContextVar[ForwardPass | None] = ContextVar("forward_pass", default=None)


@contextmanager
def running(forward_pass: ForwardPass) -> Iterator[None]:
    """Let ``forward_pass`` compute the attention inside the block, in this thread."""
    token = _PASS.set(forward_pass)
    try:
        yield
    finally:
        _PASS.reset(token)


def current_pass() -> ForwardPass | None:
    """Return the forward pass that is running in this thread."""
    return _PASS.get()


@dataclass
class DecoderCall:
    """The arguments of a call of the decoder."""

    kwargs: dict[str, Any]  # all arguments by name
    batch_size: int  # rows
    q_len: int  # new tokens
    device: torch.device  # of the new tokens
    mask: Tensor | None  # attention_mask: 2-D, 4-D, or None
    returns_cache: bool  # use_cache, or a cache that the caller passed

    @property
    def has_padding(self) -> bool:
        """Whether some token may not see all tokens before it."""
        return not (self.mask is None or (self.mask.ndim == 2 and bool(self.mask.all())))

    def real_tokens(self) -> Tensor:
        """Return bool ``[B, T]``: the new tokens that are not padding, so that any token may attend to them."""
        mask = self.mask
        if mask is None:
            return torch.ones(self.batch_size, self.q_len, dtype=torch.bool, device=self.device)
        if mask.ndim == 4:
            mask = _visible(mask).any(2)[:, 0]
        return mask[:, -self.q_len :].bool().expand(self.batch_size, -1)

    def positions(self, offset: int) -> Tensor:
        """Return the positions of the new tokens, ``[B or 1, T]``; ``offset`` tokens are cached."""
        given = self.kwargs.get("position_ids")
        return torch.arange(offset, offset + self.q_len, device=self.device)[None] if given is None else given

    def check_causal(self) -> None:
        """Refuse what makes a token depend on a later one, or a row hold several sequences (ValueError).

        The tokens of a call may be divided, and all that is decided for a request is decided by its first tokens.
        """
        mask = self.mask
        if mask is not None and mask.ndim == 4 and self.q_len > 1:
            new = _visible(mask)[..., -self.q_len :]
            if bool(new.triu(1).any()):
                raise ValueError(
                    "the 4-D attention_mask lets tokens attend to later ones (a bidirectional prefix, for instance); "
                    "valid: a causal mask"
                )
        positions = self.kwargs.get("position_ids")
        alone = mask is None and self.kwargs.get("past_key_values") is None
        if alone and positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            raise ValueError(
                "position_ids do not count up by one (several sequences packed into one row); "
                "valid: one sequence in each row, padded, with an attention_mask"
            )

    def finish(self, output: Any) -> Any:
        """Return the decoder's output, without the cache where the caller wants none."""
        if self.returns_cache:
            return output
        if isinstance(output, tuple):  # return_dict=False, which leaves out what is None
            return tuple(item for item in output if not isinstance(item, Cache))
        return type(output)(**{name: None if isinstance(item, Cache) else item for name, item in output.items()})

    def part(self, begin: int, end: int) -> dict[str, Any]:
        """Return the arguments for the new tokens from ``begin`` to ``end`` alone."""
        part = dict(self.kwargs)
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            if part.get(name) is not None:
                part[name] = part[name][:, begin:end]
        if self.mask is not None:
            seen = self.mask.shape[-1] - self.q_len + end
            part["attention_mask"] = self.mask[:, :seen] if self.mask.ndim == 2 else self.mask[:, :, begin:end, :seen]
        return part


@dataclass(frozen=True)
class Decoder:
    """The decoder of a patched model: its module, its original forward, and the names of the parameters."""

    module: nn.Module
    forward: Callable[..., Any]
    parameters: tuple[str, ...]

    def parse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecoderCall:
        """Name the arguments of a call that is computed on a cache.

        Raises:
            ValueError: The attention mask is not a tensor, the call is not causal, or a row holds several sequences
                (:meth:`DecoderCall.check_causal`); gradient checkpointing, which runs each layer twice.
        """
        if self.module.training and any(
            getattr(part, "gradient_checkpointing", False) for part in list_layers(self.module)
        ):
            raise ValueError(
                "gradient checkpointing runs each layer twice and without a KV cache, which this method needs; "
                "valid: model.gradient_checkpointing_disable(), or model.eval()"
            )
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask is a {type(mask).__name__}; valid: a 2-D or 4-D tensor, or none")
        if kwargs.get("is_causal", getattr(self.config, "is_causal", None)) is False:
            raise ValueError("is_causal=False lets tokens attend to later ones; valid: causal attention")
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        returns_cache = use_cache is not False or kwargs.get("past_key_values") is not None
        call = DecoderCall(kwargs, tokens.shape[0], tokens.shape[1], tokens.device, mask, returns_cache)
        call.check_causal()
        return call

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the decoder."""
        return cast(PreTrainedConfig, self.module.config)


@contextmanager
def switched_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model's attention be the function that is registered with transformers as ``name`` inside the block."""
    previous = model.config._attn_implementation
    with ExitStack() as stack:
        if model.config.model_type == "falcon":
            stack.callback(setattr, model.config, "_attn_implementation", previous)
            stack.enter_context(dispatched_falcon(model, name))
            model.config._attn_implementation = name  # which chooses the kind of the mask
        else:
            stack.callback(model.set_attn_implementation, previous)
            model.set_attn_implementation(name)
        yield


@contextmanager
def patched(model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[PreTrainedModel]:
    """Replace the decoder's forward and attention inside the block; restore them also after an exception.

    ``forward(decoder, *args, **kwargs)`` is called in place of ``decoder.forward(*args, **kwargs)``.

    Raises:
        ValueError: A method is applied to the model already.
    """
    previous = model.config._attn_implementation
    if previous == ATTENTION:
        raise ValueError("a method is applied to this model already: leave its `with` block first")
    module = model.get_decoder()
    decoder = Decoder(module, module.forward, tuple(inspect.signature(module.forward).parameters))
    with ExitStack() as stack:
        stack.enter_context(switched_attention(model, ATTENTION))
        wrapper = functools.wraps(decoder.forward)(functools.partial(forward, decoder))
        stack.enter_context(replaced_forward(module, wrapper))
        yield model


@contextmanager
def capture(model: PreTrainedModel, callback: Callable[[AttentionInputs], None]) -> Iterator[PreTrainedModel]:
    """Call ``callback`` with each layer's inputs inside the block; the model computes its own attention.

    The mask is bool (true: attend), ``[B or 1, 1, T, S]``, or ``None``: causal.

    Raises:
        ValueError: The model family is not supported, or a method is applied to the model already.
    """

    class Capture(ForwardPass):
        def attend(self, inputs: AttentionInputs) -> Tensor:
            callback(inputs)
            return inputs.stock()

    def forward(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
        with running(Capture()):
            return decoder.forward(*args, **kwargs)

    check_family(model.config)
    with patched(model, forward):
        yield model


def join_outputs(parts: list[Any]) -> Any:
    """Join the decoder's outputs for parts of a call; tokens are dimension 1 of every tensor."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts, 1)
    if isinstance(first, dict):  # transformers' ModelOutput
        return type(first)(**{name: join_outputs([part[name] for part in parts]) for name in first})
    if isinstance(first, tuple):
        return tuple(join_outputs(list(items)) for items in zip(*parts, strict=True))
    assert first is None or isinstance(first, Cache)
    return first


def adopt_cache(
    cache: object, kind: type[P], owner: object, empty: Callable[[], Cache], method: str
) -> tuple[Cache, P]:
    """Make the cache of a call one with our layers.

    An empty ``DynamicCache`` (``generate`` creates one) gets the layers of ``empty()`` and keeps its class, for
    the caller holds a reference to it. ``owner`` identifies the method, ``method`` names it in messages.

    Returns:
        The cache to pass to the decoder, and our view of it, of class ``kind``.

    Raises:
        ValueError: A cache of another kind, one that holds tokens already, or one of another method.
    """
    if cache is None:
        cache = empty()
    elif type(cache) is DynamicCache and not _is_ours(cache) and cache.get_seq_length() == 0 and not cache.offloading:
        cache.layers = empty().layers
    if isinstance(cache, Cache) and cache.offloading:
        raise ValueError(f"{method} cannot use an offloaded cache: pass no cache, or a DynamicCache without offloading")
    if not isinstance(cache, Cache) or not _is_ours(cache):
        raise ValueError(
            f"{method} cannot use this {type(cache).__name__}: "
            "pass no cache, an empty DynamicCache, or method.new_cache(model)"
        )
    view = kind.of(cache)
    if view.state.owner != owner:
        raise ValueError(f"this {type(cache).__name__} belongs to another application of a method; start a new one")
    return cache, view


def _visible(mask: Tensor) -> Tensor:
    """Return a mask as bool (true: attend)."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _is_ours(cache: Cache) -> bool:
    return len(cache.layers) > 0 and isinstance(cache.layers[0], PrunedLayer)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out."""
    forward_pass = _PASS.get()
    if forward_pass is None:
        raise RuntimeError(
            "the attention was called outside a call of the model that the method was applied to "
            "(a part of the model was called by itself, or another model shares its config object)"
        )
    refused = [text for name, text in UNSUPPORTED.items() if kwargs.get(name) is not None]
    if dropout or refused:
        raise ValueError(f"this attention does not support {', '.join(refused) or 'dropout'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = AttentionInputs(module, query, key, value, attention_mask, scaling, softcap, kwargs)
    return forward_pass.attend(inputs).contiguous(), None


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
