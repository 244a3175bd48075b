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

#: The argument of the decoder in which the context lengths of a call without a cache are passed, long ``[B]``.
CONTEXT_LENGTHS = "context_lengths"

_LENGTHS: ContextVar[Tensor | None] = ContextVar("context_lengths", default=None)


@contextmanager
def generation_contexts(model: PreTrainedModel) -> Iterator[None]:
    """Pass the prompt lengths to each call of ``generate`` without a cache, inside the block.

    With a cache they are known from its first call.
    """
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None:  # a decoder without a head for logits, which cannot generate
        yield
        return

    @functools.wraps(prepare)  # generate() reads the signature
    def prepare_with_lengths(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(input_ids, *args, **kwargs)
        if inputs.get("past_key_values") is not None:
            return inputs
        if kwargs.get("is_first_iteration"):
            mask = inputs.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(input_ids)
            _LENGTHS.set(mask.sum(1))
        return inputs | {CONTEXT_LENGTHS: _LENGTHS.get()}

    previous = model.__dict__.get("prepare_inputs_for_generation")
    setattr(model, "prepare_inputs_for_generation", prepare_with_lengths)  # noqa: B010, mypy sees a module
    try:
        yield
    finally:
        if previous is None:
            del model.prepare_inputs_for_generation
        else:
            setattr(model, "prepare_inputs_for_generation", previous)  # noqa: B010
