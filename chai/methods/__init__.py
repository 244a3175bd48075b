"""The methods, one file each. A file dropped in here is found by its name; nothing else is edited.

``from chai.methods import Chai`` works for every method, ``load_method("chai")`` finds its class by file name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chai.methods.base import Method
    from chai.methods.chai import Chai as Chai
    from chai.methods.chai_qkv import ChaiQkv as ChaiQkv
    from chai.methods.chai_static import ChaiStatic as ChaiStatic
    from chai.methods.dejavu import Dejavu as Dejavu
    from chai.methods.mha import Mha as Mha
    from chai.methods.random import Random as Random
    from chai.methods.spatten import Spatten as Spatten
    from chai.methods.static import Static as Static


def method_names() -> list[str]:
    """Names of all methods: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load_method(name: str) -> type[Method]:
    """The class of the method ``name``.

    Raises:
        ValueError: there is no such method.
    """
    if name not in method_names():
        raise ValueError(f"unknown method '{name}'; valid: {', '.join(method_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    from chai.methods.base import Method

    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and issubclass(member, Method)
    ]
    if len(found) != 1:
        raise ValueError(f"chai/methods/{name}.py must define exactly one Method, it defines {len(found)}")
    return found[0]


def __getattr__(attribute: str) -> type[Method]:
    """``chai.methods.Chai`` and its like, imported when first asked for."""
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in attribute).lstrip("_")
    if attribute[:1].isupper() and name in method_names():
        return load_method(name)
    raise AttributeError(f"module '{__name__}' has no attribute '{attribute}'")
