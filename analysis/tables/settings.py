"""Print hyper-parameters that differ from the defaults in ``conf/``, name rows, and compose commands for more runs."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from analysis.results.scores import Score
from analysis.tables.specs import REPOSITORY, Spec

METHODS = {
    "mha": "MHA", "chai": "CHAI", "chai_static": "CHAI-static", "chai_qkv": "CHAI-QKV",
    "chai_output": "CHAI-output",
    "static": "static", "random": "random", "dejavu": "DejaVu", "spatten": "SpAtten",
}  # fmt: skip
COUNTS = "COUNTS"  # placeholder for cluster counts that the user must choose
PROFILE = "PROFILE"  # placeholder for the folder of a profile of the model
#: Defaults of conditions that no file in ``conf/`` has to name.
DEFAULTS = {"model.dtype": "auto", "model.revision": "main", "task.num_fewshot": 0}


@functools.cache
def defaults(path: str) -> dict[str, Any]:
    """Read a file below ``conf/`` with the keys that it inherits; empty if it does not exist."""
    try:
        keys = yaml.safe_load((REPOSITORY / "conf" / f"{path}.yaml").read_text()) or {}
    except OSError:
        return {}
    inherited: dict[str, Any] = {}
    for name in keys.pop("defaults", []):
        if isinstance(name, str):  # a file of the same group
            inherited |= defaults(f"{path.rpartition('/')[0]}/{name}")
    return inherited | keys


def unusual(score: Score) -> dict[str, Any]:
    """Return a run's hyper-parameters that differ from the method's defaults, and any cluster count for all layers."""
    usual = defaults(f"method/{score.method}")
    return {
        key: value
        for key, value in score.settings.items()
        if value != _resolved(usual.get(key, ...), score.config) or (key == "clusters" and isinstance(value, int))
    }


def _resolved(value: Any, config: dict[str, Any]) -> Any:
    """Resolve a default that refers to another key (``${model.clusters}``) in a run's configuration."""
    if not (isinstance(value, str) and value.startswith("${") and value.endswith("}")):
        return value
    node: Any = config
    for part in value[2:-1].split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def row_name(method: str, settings: dict[str, Any]) -> str:
    """Name a method with settings: ``random k=4``, ``DejaVu-10%``."""
    name = METHODS.get(method, method)
    rest = dict(settings)
    if isinstance(rest.get("sparsity"), (int, float)):
        name += f"-{100 * rest.pop('sparsity'):g}%"
    if "clusters" in rest:
        rest = {"k": rest.pop("clusters"), **rest}
    return " ".join([name, *assignments(rest)])


def assignments(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ``key=value`` for each setting, values as the command line takes them."""
    return [f"{prefix}{key}={text(value)}" for key, value in settings.items()]


def text(value: Any) -> str:
    """Return a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def command(
    spec: Spec,
    model: str,
    like: Score | None,
    method: str,
    settings: dict[str, Any],
    tasks: Sequence[str],
    seeds: Sequence[int] = (),
) -> str:
    """Return the command that fills some cells of a row, under the conditions of ``like`` (``None``: the defaults).

    ``seeds`` are of the method; none: its default.
    """
    whole = spec.whole is not None and set(tasks) == set(spec.tasks)
    chosen = assignments(settings, "method.") + ([f"method.seed={','.join(map(str, seeds))}"] if seeds else [])
    is_sweep = len(seeds) > 1 or (not whole and len(tasks) > 1)
    words = ["python run.py", *(["-m"] if is_sweep else []), f"method={method}"]
    words += placeholders(model, method, settings)
    words += map(shlex.quote, chosen)
    task = spec.whole if whole else ",".join(tasks)
    return " ".join([*words, *where(model, like), f"task={task}", *conditions(like)])


def sweep(spec: Spec, model: str, like: Score | None) -> str:
    """Return the command that fills a whole table."""
    other = where(model, like) if model != spec.model or len(where(model, like)) > 1 else []
    other += [f"task={spec.whole}"] if spec.other_tasks else []
    if spec.profile:
        open_words = [f"model.profile={PROFILE}"] if profile_of(model) == PROFILE else []
    else:
        open_words = placeholders(model, "chai", {})
    return " ".join(["python run.py -m", f"paper={spec.name}", *other, *open_words, *conditions(like)])


def profile_of(model: str) -> str:
    """Return the head profile of a model for a command: its configuration's, or a placeholder for the user."""
    return "${model.profile}" if defaults(f"model/{model}").get("profile") else PROFILE


def placeholders(model: str, method: str, settings: dict[str, Any]) -> list[str]:
    """Return overrides for the user to complete: what the method takes from the model, which does not define it."""
    wanted, defined = defaults(f"method/{method}"), defaults(f"model/{model}")
    return [
        f"method.{key}={word}"
        for key, word in (("clusters", COUNTS), ("profile", PROFILE))
        if wanted.get(key) == f"${{model.{key}}}"
        and key not in settings
        and defined.get(key) is None
        and not (key == "clusters" and settings.get("profile"))
    ]


def where(model: str, like: Score | None) -> list[str]:
    """Return the overrides that choose the model, with its local folder if the run to be matched had one."""
    path = like.config["model"].get("path") if like is not None else None
    usual = defaults(f"model/{model}")
    local = [shlex.quote(f"model.path={path}")]
    if not usual and path is not None:
        return local
    return [f"model={model}", *(local if _is_elsewhere(path, usual.get("path")) else [])]


def _is_elsewhere(path: str | None, usual: str | None) -> bool:
    """Return whether a run's local files differ from those of the configuration (``${repo:experiments/...}``)."""
    return path is not None and (usual is None or not path.endswith(usual.removeprefix("${repo:").removesuffix("}")))


def conditions(like: Score | None) -> list[str]:
    """Return the overrides that give a run the conditions of ``like``, as far as they are not the defaults."""
    if like is None:
        return []
    usual = DEFAULTS | defaults("config")
    usual |= {f"model.{key}": value for key, value in defaults(f"model/{like.run.model}").items()}
    known = {"limit", "seed", "batch_size", *DEFAULTS}
    values = like.conditions | {"seed": like.config.get("seed")}
    changed = {key: value for key, value in values.items() if key in known and value != usual.get(key)}
    words = assignments(changed)
    # Local data, if the run had it elsewhere than the configuration.
    folder = like.config["task"].get("data_dir")
    if _is_elsewhere(folder, defaults(f"task/{like.task}").get("data_dir")):
        words.append(f"task.data_dir={folder}")
    return [shlex.quote(word) for word in words]
