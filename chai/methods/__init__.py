"""The methods, one file each, found by file name: to add one, add a file.

``from chai.methods import Chai`` works for every method; ``load_method("chai")`` returns the class of a name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

from chai.methods.base import Method

if TYPE_CHECKING:
    from chai.methods.chai import Chai as Chai
    from chai.methods.chai_output import ChaiOutput as ChaiOutput
    from chai.methods.chai_qkv import ChaiQkv as ChaiQkv
    from chai.methods.chai_static import ChaiStatic as ChaiStatic
    from chai.methods.dejavu import Dejavu as Dejavu
    from chai.methods.mha import Mha as Mha
    from chai.methods.random_heads import Random as Random
    from chai.methods.spatten import Spatten as Spatten
    from chai.methods.static import Static as Static

#: Modules of this package that are not methods.
BASES = ("base", "clustering")
#: Files with another name than their method: ``random.py`` would have that of a module of the standard library.
FILES = {"random": "random_heads"}


def method_names() -> list[str]:
    """Return the names of all methods."""
    names = {file: name for name, file in FILES.items()}
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(names.get(name, name) for name in modules if name not in BASES)


def load_method(name: str) -> type[Method]:
    """Return the class of the method ``name`` (ValueError: unknown method, or its file does not define exactly one)."""
    if name not in method_names():
        raise ValueError(f"unknown method '{name}'; valid: {', '.join(method_names())}")
    file = FILES.get(name, name)
    module = importlib.import_module(f"{__name__}.{file}")
    classes = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and issubclass(member, Method) and not inspect.isabstract(member)
    ]
    if len(classes) != 1:
        raise ValueError(f"chai/methods/{file}.py must define exactly one method, it defines {len(classes)}")
    return classes[0]


def baseline() -> Method:
    """Return multi-head attention, the baseline of every comparison."""
    return load_method("mha")()


def __getattr__(attribute: str) -> type[Method]:
    """Import ``chai.methods.Chai`` and the other classes at their first use."""
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in attribute).lstrip("_")
    if attribute[:1].isupper() and name in method_names():
        return load_method(name)
    raise AttributeError(f"module '{__name__}' has no attribute '{attribute}'")
