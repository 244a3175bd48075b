"""``python run.py -m paper=table2``: the sweeps that fill one of the paper's tables, launched as one.

``conf/paper/<name>.yaml`` names the model, the tasks, and for each sweep what would be written on the command line.
Methods with different hyper-parameters can't share a sweep, for that is every combination of what it lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from experiments.config.schema import CONF, ConfigError, choices, unknown

GROUP = "paper"


def expand(overrides: list[str], *, multirun: bool) -> list[list[str]]:
    """The overrides of each sweep that a command line asks for; itself alone where it has no ``paper=NAME``.

    What else is on the line goes to every sweep, ``model=`` and ``task=`` in place of the table's own.
    ``method.K=V`` goes to the methods that have such a key, where the sweep doesn't set it itself.

    Raises:
        ConfigError: an unknown table or method, no ``-m``, or an override that doesn't go with ``paper=``.
    """
    chosen = [override for override in overrides if _key(override).lstrip("+~") == GROUP]
    if not chosen:
        return [overrides]
    name = chosen[0].partition("=")[2]
    if len(chosen) > 1 or chosen[0] != f"{GROUP}={name}":
        raise ConfigError(f"can't read {' '.join(chosen)}; expected one {GROUP}=NAME")
    if name not in choices(GROUP):
        raise ConfigError(unknown(GROUP, name, choices(GROUP)))
    if not multirun:
        raise ConfigError(f"{GROUP}={name} is a sweep: add -m")
    rest = [override for override in overrides if override not in chosen]
    if any(_key(override) == "method" for override in rest):
        raise ConfigError(f"method= doesn't go with {GROUP}={name}, which names its methods itself")
    return sweeps(CONF / GROUP / f"{name}.yaml", rest)


def sweeps(path: Path, extra: list[str]) -> list[list[str]]:
    """The overrides of each sweep in a file, with those given beside it.

    Raises:
        ConfigError: a method that there isn't, or a ``method.K=V`` that none of the file's methods takes.
    """
    table = yaml.safe_load(path.read_text())
    settings = [override for override in extra if _key(override).startswith("method.")]
    common = [override for override in extra if override not in settings]
    given = {_key(override) for override in common}
    common = [*(f"{key}={table[key]}" for key in ("model", "task") if key not in given), *common]
    found: list[list[str]] = []
    taken: set[str] = set()
    for line in table["sweeps"]:
        own = dict(word.split("=", 1) for word in line.split())
        by_settings: dict[tuple[str, ...], list[str]] = {}
        for method in own.pop("method").split(","):
            if method not in choices("method"):
                raise ConfigError(f"{GROUP}={path.stem}: {unknown('method', method, choices('method'))}")
            fitting = tuple(o for o in settings if _has(method, _key(o)) and _key(o) not in own)
            by_settings.setdefault(fitting, []).append(method)
            taken.update(fitting)
        for fitting, methods in by_settings.items():
            fixed = [f"{key}={value}" for key, value in own.items()]
            found.append([f"method={','.join(methods)}", *fixed, *fitting, *common])
    for override in settings:
        if override not in taken:
            raise ConfigError(f"{override}: no method of {GROUP}={path.stem} has such a key to set")
    return found


def _key(override: str) -> str:
    return override.partition("=")[0]


def _has(method: str, key: str) -> bool:
    """Whether a method's file has the key ``method.K``."""
    keys: dict[str, Any] = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text())
    return key.removeprefix("method.") in keys
