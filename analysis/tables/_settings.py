"""Hyper-parameters in print: those that aren't the defaults in ``conf/``, names of rows, commands for more runs."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from analysis.scores import Score
from analysis.tables._specs import REPOSITORY, Spec

METHODS = {
    "mha": "MHA", "chai": "CHAI", "chai_static": "CHAI-static", "chai_qkv": "CHAI-QKV",
    "static": "static", "random": "random", "dejavu": "DejaVu", "spatten": "SpAtten",
}  # fmt: skip
COUNTS = "COUNTS"  # stands for cluster counts that nobody but the user has
PROFILE = "PROFILE"  # stands for the folder of a profile of the model
WIDEST = 12  # characters of a row's name; a longer one gets a letter, and its settings are said below the table


@functools.cache
def defaults(path: str) -> dict[str, Any]:
    """Return the keys of a file below ``conf/``, with those that it inherits; none if there is no such file."""
    try:
        own = yaml.safe_load((REPOSITORY / "conf" / f"{path}.yaml").read_text()) or {}
    except OSError:
        return {}
    inherited: dict[str, Any] = {}
    for name in own.pop("defaults", []):
        if isinstance(name, str):  # a file of the same group; the schema and `_self_` have none
            inherited |= defaults(f"{path.rpartition('/')[0]}/{name}")
    return inherited | own


def unusual(score: Score) -> dict[str, Any]:
    """The hyper-parameters of a run that aren't its method's defaults; a count for all layers always is one."""
    usual = defaults(f"method/{score.method}")
    return {
        key: value
        for key, value in score.settings.items()
        if value != _resolved(usual.get(key, ...), score.config) or (key == "clusters" and isinstance(value, int))
    }


def _resolved(value: Any, config: dict[str, Any]) -> Any:
    """A default that refers to another key (``${model.clusters}``), as it is in a run's configuration."""
    if not (isinstance(value, str) and value.startswith("${") and value.endswith("}")):
        return value
    node: Any = config
    for part in value[2:-1].split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def row_name(method: str, settings: dict[str, Any]) -> str:
    """``random k=4``, ``DejaVu-10%``: a method with settings."""
    name = METHODS.get(method, method)
    rest = dict(settings)
    if isinstance(rest.get("sparsity"), (int, float)):
        name += f"-{100 * rest.pop('sparsity'):g}%"
    if "clusters" in rest:
        rest = {"k": rest.pop("clusters"), **rest}
    return " ".join([name, *(f"{key}={text(value)}" for key, value in rest.items())])


def text(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def command(
    spec: Spec, model: str, like: Score | None, method: str, settings: dict[str, Any], tasks: Sequence[str]
) -> str:
    """The command that fills some cells of a row.

    Args:
        spec: of the table.
        model: whose row it is.
        like: a run whose conditions are wanted; ``None``: the defaults.
        method: of the row.
        settings: its hyper-parameters that aren't the defaults.
        tasks: of the cells.
    """
    whole = spec.whole is not None and set(tasks) == set(spec.tasks)
    words = ["python run.py", *(["-m"] if not whole and len(tasks) > 1 else [])]
    words += [
        f"method={method}",
        *counts(model, method, settings),
        *profile(model, method, settings),
        *(shlex.quote(f"method.{key}={text(value)}") for key, value in settings.items()),
    ]
    task = spec.whole if whole else ",".join(tasks)
    return " ".join([*words, *where(model, like), f"task={task}", *conditions(like)])


def sweep(table: str, spec: Spec, model: str, like: Score | None) -> str:
    """The command that fills a whole table."""
    other = where(model, like) if model != spec.model or len(where(model, like)) > 1 else []
    return " ".join(["python run.py -m", f"paper={table}", *other, *counts(model, "chai", {}), *conditions(like)])


def counts(model: str, method: str, settings: dict[str, Any]) -> list[str]:
    """A place for the cluster counts, where neither the settings nor the model's own file give them."""
    needed = defaults(f"method/{method}").get("clusters") == "${model.clusters}" and "clusters" not in settings
    return [f"method.clusters={COUNTS}"] if needed and defaults(f"model/{model}").get("clusters") is None else []


def profile(model: str, method: str, settings: dict[str, Any]) -> list[str]:
    """A place for the folder of a profile, where the method needs one and the model's own file has none."""
    needed = defaults(f"method/{method}").get("profile") == "${model.profile}" and "profile" not in settings
    return [f"method.profile={PROFILE}"] if needed and defaults(f"model/{model}").get("profile") is None else []


def where(model: str, like: Score | None) -> list[str]:
    """The overrides that choose the model, and its local folder where the run that is to be matched had one."""
    path = like.config["model"].get("path") if like is not None else None
    usual = defaults(f"model/{model}")
    if not usual and path is not None:
        return [shlex.quote(f"model.path={path}")]
    return [f"model={model}", *([shlex.quote(f"model.path={path}")] if _elsewhere(path, usual.get("path")) else [])]


def _elsewhere(path: str | None, usual: str | None) -> bool:
    """Whether a run's local files weren't those that the configuration names (``${repo:experiments/...}``)."""
    return path is not None and (usual is None or not path.endswith(usual.removeprefix("${repo:").removesuffix("}")))


def conditions(like: Score | None) -> list[str]:
    """The overrides that a run needs to count beside ``like``: its conditions that aren't the defaults."""
    if like is None:
        return []
    usual = defaults("config") | {"task.num_fewshot": 0}
    usual |= {f"model.{key}": value for key, value in defaults(f"model/{like.run.model}").items()}
    known = {"limit", "seed", "batch_size", "task.num_fewshot", "model.dtype", "model.revision"}
    missing = {"model.dtype": "auto", "model.revision": "main"}
    words = [
        f"{key}={text(value)}"
        for key, value in like.conditions.items()
        if key in known and value != usual.get(key, missing.get(key))
    ]
    folder = like.config["task"].get("data_dir")
    if _elsewhere(folder, defaults(f"task/{like.task}").get("data_dir")):
        words.append(f"task.data_dir={folder}")
    return [shlex.quote(word) for word in words]
