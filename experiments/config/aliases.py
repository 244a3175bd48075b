"""Aliases of configuration keys on the command line, since keys are part of run ids and cannot be renamed."""

from __future__ import annotations

import re

#: alias: (key, group, choices of the group whose configuration has the key).
ALIASES = {
    "experiment.batch_size": ("experiment.rows", "experiment", {"latency", "memory"}),
    "experiment.repeats": ("experiment.rounds", "experiment", {"latency"}),
    "experiment.preallocate": ("experiment.reserve", "experiment", {"memory"}),
    "experiment.overwrite_embedded": ("experiment.install", "experiment", {"train_dejavu", "pretrain_tiny"}),
    "profile.saved_samples": ("profile.kept", "experiment", {"profile"}),
    "profile.trace_tokens": ("profile.history", "experiment", {"profile"}),
    "profile.aggregate": ("profile.combine", "experiment", {"profile"}),
    "method.keep_ratio": ("method.tokens", "method", {"spatten"}),
    "hydra.launcher.max_workers": ("hydra.launcher.jobs", "hydra/launcher", {"local"}),
}


def replace_aliases(overrides: list[str]) -> list[str]:
    """Return overrides with each alias replaced by its key, where all selected choices of its group have that key."""
    values = dict(override.partition("=")[::2] for override in overrides)  # the last choice counts, as in Hydra
    replaced = []
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        key, group, owners = ALIASES.get(name, (name, "", set()))
        fits = group in values and owners.issuperset(values[group].split(","))  # a sweep lists several choices
        replaced.append(override.replace(name, key, 1) if fits else override)
    return replaced


#: What is quoted, or a home folder at the start of a value, alone or in a list: Hydra's grammar has no unquoted ``~``.
HOME = re.compile(r"""(['"]).*?(?<!\\)\1|(?<=[=,\[{:])~(?=[/,\]}]|$)[^,\]}]*""")


def quote_home(overrides: list[str]) -> list[str]:
    """Quote unquoted values that begin with ``~/``; :func:`compose.expand_home` makes them paths."""
    return [HOME.sub(lambda found: found[0] if found[1] else f"'{found[0]}'", override) for override in overrides]
