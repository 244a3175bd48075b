"""Where the rows of a generation end."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from chai.engine.support import vocabulary_size


@dataclass(frozen=True)
class Stopping:
    """Stop tokens, and the token that fills the rows that have ended.

    Attributes:
        tokens: A row ends with any of these.
        pad: Of the vocabulary; not read without stop tokens.
    """

    tokens: tuple[int, ...] = ()
    pad: int = 0

    @classmethod
    def read(cls, model: PreTrainedModel, stop_tokens: int | Iterable[int] | None) -> Stopping:
        """Read them from the model's generation configuration where they are not given.

        Raises:
            ValueError: Stop tokens that are no integers, or a padding token outside the vocabulary.
        """
        config = getattr(model, "generation_config", None)
        if stop_tokens is None:
            stop_tokens = config.eos_token_id if config is not None and config.eos_token_id is not None else ()
        tokens = _read_integers(stop_tokens)
        pad = None if config is None else config.pad_token_id
        if not tokens:
            return cls()
        pad, vocabulary = tokens[0] if pad is None else pad, vocabulary_size(model)
        if not 0 <= pad < vocabulary:
            raise ValueError(
                f"the padding token is {pad} (pad_token_id of the generation configuration, else the first stop token);"
                f" valid: 0 to {vocabulary - 1}"
            )
        return cls(tokens, pad)


def _read_integers(stop_tokens: Any) -> tuple[int, ...]:
    try:
        if isinstance(stop_tokens, Tensor):
            stop_tokens = stop_tokens.tolist()
        if isinstance(stop_tokens, Iterable):
            return tuple(operator.index(token) for token in stop_tokens)
        return (operator.index(stop_tokens),)
    except TypeError:
        raise ValueError(f"stop_tokens are {stop_tokens!r}; valid: an integer, some integers, or None") from None
