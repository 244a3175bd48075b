"""Context lengths of ``generate(..., use_cache=False)``, whose calls each hold the whole sequence so far."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Prompt lengths of the generation that is running in this thread, long ``[B]``.
_PROMPTS: ContextVar[Tensor | None] = ContextVar("prompts", default=None)
#: The model that generates and the context lengths of its next call. Not every family hands further arguments of its
#: forward on to its decoder (Falcon does not), so they cannot be an argument.
_NEXT: ContextVar[tuple[PreTrainedModel, Tensor] | None] = ContextVar("next", default=None)


@contextmanager
def generation_contexts(model: PreTrainedModel) -> Iterator[None]:
    """Let each call of ``generate`` without a cache set :func:`take_context_lengths`, inside the block.

    With a cache the lengths are known from its first call.
    """
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None:  # a decoder without a head for logits, which cannot generate
        yield
        return

    @functools.wraps(prepare)  # generate() reads the signature
    def prepare_with_lengths(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
        _NEXT.set(None)
        if inputs.get("past_key_values") is not None:
            return inputs
        if kwargs.get("is_first_iteration"):
            mask = inputs.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(input_ids)
            _PROMPTS.set(mask.sum(1))
        if (prompts := _PROMPTS.get()) is not None:
            _NEXT.set((model, prompts))
        return inputs

    previous = model.__dict__.get("prepare_inputs_for_generation")
    setattr(model, "prepare_inputs_for_generation", prepare_with_lengths)  # noqa: B010, mypy sees a module
    try:
        yield
    finally:
        _NEXT.set(None)
        if previous is None:
            del model.prepare_inputs_for_generation
        else:
            setattr(model, "prepare_inputs_for_generation", previous)  # noqa: B010


def take_context_lengths(model: PreTrainedModel) -> Tensor | None:
    """Return the context lengths (long ``[B]``) of a call that ``generate`` makes without a cache, once."""
    pending = _NEXT.get()
    if pending is None or pending[0] is not model:
        return None
    _NEXT.set(None)
    return pending[1]
