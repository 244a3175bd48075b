"""Aliases of configuration keys on the command line, since keys are part of run ids and cannot be renamed."""

from __future__ import annotations

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
    return [_replace_alias(override, overrides) for override in overrides]


def _replace_alias(override: str, overrides: list[str]) -> str:
    name = override.partition("=")[0].lstrip("+~")
    if name not in ALIASES:
        return override
    key, group, owners = ALIASES[name]
    # The last choice counts, as in Hydra; a sweep lists several.
    selected = [other.partition("=")[2] for other in overrides if other.partition("=")[0] == group]
    if not selected or not owners.issuperset(selected[-1].split(",")):
        return override
    return override.replace(name, key, 1)
