"""Shows a model's queries and keys to whoever wants to look, layer by layer; what the model computes stays the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chai.runtime import check_family, replaced_forward

ATTENTION = "observed_heads"  # our name in transformers' registry

#: Called with the layer's index, queries ``[B, H, T, D]`` and keys ``[B, H_key, T, D]`` (after rotary embedding), the
#: scaling of the scores, and the mask ``[B or 1, 1, T, T]`` (bool, true: attend), which is ``None`` for just causal.
Look = Callable[[int, Tensor, Tensor, float, "Tensor | None"], None]

_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)


@contextmanager
def observed(model: PreTrainedModel, look: Look) -> Iterator[PreTrainedModel]:
    """Let ``look`` see every layer's queries and keys inside the block; the model is restored afterwards.

    Raises:
        ValueError: the model's family isn't supported.
    """
    check_family(model.config)
    decoder, previous = model.get_decoder(), model.config._attn_implementation
    original = decoder.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        token = _LOOK.set(look)
        try:
            return original(*args, **kwargs)
        finally:
            _LOOK.reset(token)

    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, previous)
        model.set_attn_implementation(ATTENTION)
        stack.enter_context(replaced_forward(decoder, forward))
        yield model


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls."""
    look, scaling = _LOOK.get(), query.shape[-1] ** -0.5 if scaling is None else scaling
    if look is None:
        raise RuntimeError("observed attention was called outside a call of the model that is observed")
    look(int(module.layer_idx), query, key, scaling, attention_mask)  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0], None


AttentionInterface.register(ATTENTION, _attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
