"""``paper=NAME``: the sweeps that fill one of the paper's tables, listed in ``conf/paper/<name>.yaml``.

Methods with different hyper-parameters cannot share a sweep, since a sweep is every combination of its values.
A file can have sweeps for each ``reading`` of what the paper leaves open, of which ``reading=NAME`` chooses.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from experiments.config.aliases import quote_home, replace_aliases
from experiments.config.compose import choices, compose_config
from experiments.config.schema import CONF, ConfigError, unknown_name

GROUP = "paper"
READING = "reading"
ALL = "both"  # all readings of a file


def expand(overrides: list[str], *, multirun: bool) -> list[list[str]]:
    """Return the overrides of each sweep on a command line, without aliases; just one without ``paper=NAME``."""
    overrides = quote_home(replace_aliases(overrides))
    tables = [override for override in overrides if _key(override).lstrip("+~") == GROUP]
    if not tables:
        return [overrides]
    name = tables[0].partition("=")[2]
    if tables != [f"{GROUP}={name}"]:
        raise ConfigError(f"cannot read {' '.join(tables)}; expected one {GROUP}=NAME")
    if name not in choices(GROUP):
        raise ConfigError(unknown_name(GROUP, name, choices(GROUP)))
    if not multirun:
        raise ConfigError(f"{GROUP}={name} is a sweep: add -m")
    if any(_key(override) == "method" for override in overrides):
        raise ConfigError(f"method= cannot be combined with {GROUP}={name}, which lists its methods itself")
    return read_table(CONF / GROUP / f"{name}.yaml", [override for override in overrides if override not in tables])


def read_table(path: Path, extra: list[str]) -> list[list[str]]:
    """Return the overrides of each sweep in a file, combined with the overrides ``extra``.

    ``extra`` goes to every sweep; its ``model=``, ``task=`` and ``reading=`` replace those of the file. ``method.K=V``
    goes to the methods that have such a key, unless the sweep sets it itself.
    """
    table = yaml.safe_load(path.read_text())
    settings = [override for override in extra if _key(override).startswith("method.")]
    common = [override for override in extra if override not in settings]
    lines, common = _sweeps(path, table, common)
    given = {_key(override) for override in common}
    common = [*(f"{key}={table[key]}" for key in ("model", "task") if key not in given), *common]
    sweeps: list[list[str]] = []
    used: set[str] = set()
    for line in lines:
        fixed = dict(word.split("=", 1) for word in replace_aliases(line.split()))
        methods_by_settings: dict[tuple[str, ...], list[str]] = {}
        for method in fixed.pop("method").split(","):
            if method not in choices("method"):
                raise ConfigError(f"{GROUP}={path.stem}: {unknown_name('method', method, choices('method'))}")
            # Keep the settings that the method has and the sweep does not set itself.
            overrides = zip(settings, replace_aliases([f"method={method}", *settings])[1:], strict=True)
            free = _method_keys(method) - fixed.keys()
            fitting = {setting: override for setting, override in overrides if _key(override) in free}
            methods_by_settings.setdefault(tuple(fitting.values()), []).append(method)
            used.update(fitting)
        own = [f"{key}={value}" for key, value in fixed.items()]
        for values, methods in methods_by_settings.items():
            sweeps.append([f"method={','.join(methods)}", *own, *values, *common])
    for override in settings:
        if override not in used:
            raise ConfigError(f"{override}: no method of {GROUP}={path.stem} has such a key to set")
    return sweeps


def _sweeps(path: Path, table: dict[str, Any], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return the sweeps of a file with those of the chosen readings, and the overrides without ``reading=``."""
    wanted = [override for override in overrides if _key(override) == READING]
    readings: dict[str, list[str]] = table.get("readings", {})
    if wanted and not readings:
        raise ConfigError(f"{wanted[0]}: {GROUP}={path.stem} has no readings")
    name = wanted[-1].partition("=")[2] if wanted else table.get(READING, ALL)
    valid = [*readings, ALL]
    if readings and name not in valid:
        raise ConfigError(unknown_name(READING, name, valid))
    chosen = [line for key, lines in readings.items() if name in (key, ALL) for line in lines]
    return [*table["sweeps"], *chosen], [override for override in overrides if override not in wanted]


def _key(override: str) -> str:
    return override.partition("=")[0]


@functools.cache
def _method_keys(method: str) -> frozenset[str]:
    return frozenset(f"method.{key}" for key in compose_config([f"method={method}"]).method)
