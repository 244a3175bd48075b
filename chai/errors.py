"""Errors that name a remedy, to which an application can add instructions (a command, a configuration key)."""

from __future__ import annotations


class ChaiError(ValueError):
    """An error of the library in one line.

    Args:
        message: What is wrong, and what is valid.
        remedy: Name of a remedy: ``train_predictor``, ``train_neurons``, ``make_profile``; of a model that cannot be
            loaded ``no_source``, ``pickled_weights``, ``memory``, ``gated``, ``hub_id``, ``offline``, ``gguf``.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy
