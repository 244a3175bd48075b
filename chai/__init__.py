"""Clustered head attention for efficient inference of large language models, as a library.

>>> from chai.methods import Chai
>>> with Chai(clusters=[8, 6, 4, 4])(model):
...     model.generate(**batch, max_new_tokens=64)

The engine generates without waiting for the host, over a KV cache of reserved length (:mod:`chai.engine`):

>>> import chai
>>> chai.generate(model, batch["input_ids"], Chai(clusters=[8, 6, 4, 4]), max_new_tokens=64)

It imports nothing from ``experiments`` or ``analysis``, and does not depend on configurations, tasks or results.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chai.engine import Engine as Engine
    from chai.engine import generate as generate

__all__ = ["Engine", "generate"]


def __getattr__(name: str) -> Any:
    """Import ``chai.generate`` and ``chai.Engine`` at their first use."""
    if name in __all__:
        return getattr(importlib.import_module("chai.engine"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
