"""Definitions of tasks in lm-evaluation-harness's YAML: what they may contain, their metrics and their local files.

Imports lm-eval and transformers only where a definition is checked, and no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from experiments.config.compose import split_path
from experiments.config.schema import ConfigError, unknown_name

#: How lm-eval asks a model; it has no others for text.
OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
#: Keys of a group's definition that are its own; others are set in each of its tasks.
GROUP_ONLY = ("group", "group_alias", "task", "aggregate_metric", "aggregate_metric_list", "metadata", "tag", "include")
#: Keys of ``generation_kwargs`` that lm-eval reads itself; the others are of transformers' GenerationConfig.
GENERATION = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample",
              "temperature", "top_p", "top_k", "num_beams")  # fmt: skip
#: Keys of GenerationConfig that lm-eval sets itself.
GENERATION_FIXED = ("max_length", "use_cache", "pad_token_id", "return_dict_in_generate", "num_return_sequences")
#: Values of ``dataset_path`` that read files of ``data_files`` instead of a dataset of the hub.
FILE_FORMATS = ("arrow", "csv", "json", "parquet", "text", "xml")


def check_definition(task: DictConfig, spec: dict[str, Any]) -> None:
    """Raise a ConfigError for a task that cannot be scored, as far as its definition alone tells."""
    name = task.name
    if spec.get("doc_to_image") or spec.get("doc_to_audio"):
        raise ConfigError(f"task '{name}' needs images or audio; valid: tasks of text")
    if spec.get("unsafe_code"):
        raise ConfigError(f"task '{name}' runs code that the model writes, which is not done here")
    if "class" in spec:  # its code defines the rest
        if task.data_dir is not None:
            raise ConfigError(f"task '{name}' loads its data with code of its own; valid: task.data_dir=null")
        return
    _check_shapes(name, spec)
    output_type = spec.get("output_type", "generate_until")
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"task '{name}' has output_type '{output_type}'; valid: {', '.join(OUTPUT_TYPES)}")
    choose_metric(name, metric_keys(spec), task.metric)


def _check_shapes(name: str, spec: dict[str, Any]) -> None:
    """Verify the keys of a definition, and the values that are lists or dictionaries of a fixed form."""
    from lm_eval.config.task import TaskConfig

    valid = sorted(field.name for field in dataclasses.fields(TaskConfig))
    for key in spec:
        if key not in valid:
            raise ConfigError(unknown_name(f"key in the definition of task '{name}':", key, valid))
    metrics, filters, kwargs = (spec.get(key) for key in ("metric_list", "filter_list", "generation_kwargs"))
    if metrics is not None and not (
        _are_dictionaries(metrics, "metric") and not any(isinstance(one["metric"], (int, float)) for one in metrics)
    ):
        raise ConfigError(f"task '{name}': metric_list is {metrics!r}; valid: a list like [{{metric: acc}}], or null")
    if filters is not None and not (
        _are_dictionaries(filters, "name", "filter")
        and all(_are_dictionaries(one["filter"], "function") for one in filters)
    ):
        raise ConfigError(
            f"task '{name}': filter_list is {filters!r}; "
            "valid: a list like [{name: first, filter: [{function: take_first}]}], or null"
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ConfigError(f"task '{name}': generation_kwargs is {kwargs!r}; valid: a dictionary, or null")
    for key in set(kwargs or {}).difference(GENERATION):
        _check_generation_key(name, key)


def _are_dictionaries(value: Any, *keys: str) -> bool:
    """Return whether a value is a list of dictionaries, not an empty one, and each has the keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and one.keys() >= {*keys} for one in value)
    )


def check_filters(name: str, spec: dict[str, Any]) -> None:
    """Raise a ConfigError for a filter that is unknown once the functions of the definition are imported.

    Their code may register filters of its own.
    """
    import lm_eval.filters  # registers lm-eval's

    valid = list(lm_eval.filters.filter_registry)
    for function in (step["function"] for one in spec.get("filter_list") or () for step in one["filter"]):
        if isinstance(function, str) and function not in valid:
            raise ConfigError(unknown_name(f"filter of task '{name}':", function, valid))


def _check_generation_key(name: str, key: Any) -> None:
    """Verify that ``generate`` knows a key that lm-eval passes on."""
    from transformers import GenerationConfig

    known = [option for option in vars(GenerationConfig()) if not option.startswith("_")]
    valid = [*GENERATION, *(option for option in known if option not in GENERATION_FIXED)]
    if key not in valid:
        near = difflib.get_close_matches(str(key), valid, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(
            f"task '{name}': generation_kwargs has the key '{key}'{hint}; valid: {', '.join(GENERATION)}, "
            "and others of transformers' GenerationConfig"
        )


def metric_keys(spec: dict[str, Any]) -> list[str]:
    """Return the names of a definition's metrics, with their filter where it has a name."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    listed = spec.get("metric_list") or DEFAULT_METRIC_REGISTRY[spec.get("output_type", "generate_until")]
    names = [metric if isinstance(metric, str) else metric.get("metric") for metric in listed]
    filters = [one["name"] for one in spec.get("filter_list") or ()] or ["none"]
    return [metric_key(getattr(name, "__name__", str(name)), label) for label in filters for name in names]


def metric_key(name: str, label: str) -> str:
    """Return the key of a metric in the results: as in lm-eval, but for the filter's name ``none``."""
    return name if label == "none" else f"{name},{label}"


def choose_metric(task: str, keys: list[str], metric: str | None) -> str:
    """Return the key of the metric to show: the first, or that of the first filter; a ConfigError if there is none."""
    chosen = [key for key in keys if metric in (None, key, key.partition(",")[0])]
    if not chosen:
        raise ConfigError(f"task '{task}' has no metric '{metric}'; valid: {', '.join(keys)}")
    return chosen[0]


def function_keys(path: Path) -> list[str]:
    """Return the keys of a definition whose values name functions (``!function``)."""
    return [key for key, node in _nodes(path).items() if _names_function(node)]


def refuse_functions(group: str, path: Path) -> None:
    """Raise a ConfigError if a group sets a key of its tasks with ``!function``: only a task's own file can."""
    for key in _shared_functions(_nodes(path)):
        raise ConfigError(
            f"group '{group}' sets '{key}' with !function ({path}); valid in the definition of a single task only"
        )


def _nodes(path: Path) -> dict[str, yaml.Node]:
    """Return the values of a YAML file before they are constructed, by key; those of its includes count less."""
    root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    own = _pairs(root)
    included = own.pop("include", None)
    nodes: dict[str, yaml.Node] = {}
    for one in included.value if isinstance(included, yaml.SequenceNode) else [included] if included else []:
        nodes |= _nodes(path.parent / one.value)
    return nodes | own


def _pairs(node: yaml.Node | None) -> dict[str, yaml.Node]:
    """Return the values of a mapping by key; empty for other nodes."""
    return {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def _names_function(node: yaml.Node) -> bool:
    """Return whether a function is named anywhere in a value."""
    if isinstance(node, yaml.MappingNode):
        return any(_names_function(value) for _, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return any(_names_function(value) for value in node.value)
    return bool(node.tag == "!function")


def _shared_functions(nodes: dict[str, yaml.Node]) -> Iterator[str]:
    """Yield the keys with functions that a group, or a member that is defined in it, sets in its tasks."""
    yield from (key for key, node in nodes.items() if key not in GROUP_ONLY and _names_function(node))
    members = nodes.get("task")
    for member in members.value if isinstance(members, yaml.SequenceNode) else ():
        yield from _shared_functions(_pairs(member))


def split_files(task: DictConfig, spec: dict[str, Any]) -> list[tuple[str, Path]]:
    """Return the splits of a registered task, in the definition's order, and their existing files in ``task.data_dir``.

    The split that is scored is among them even where the definition names none: it is ``test``.
    """
    splits = [str(spec[key]) for key in SPLITS if spec.get(key)]
    if (scored := scored_split(spec)) not in splits:
        splits.append(scored)
    return [(split, path) for split in splits if (path := split_path(task, split)).is_file()]


def scored_split(spec: dict[str, Any]) -> str:
    """Return the split whose items are scored."""
    return str(spec.get("test_split") or spec.get("validation_split") or "test")


def data_files(spec: dict[str, Any]) -> list[Path]:
    """Return the local files that a definition names itself; patterns and addresses are none."""
    kwargs = spec.get("dataset_kwargs") or {}
    named = [file for file in _leaves(kwargs.get("data_files")) if "://" not in file and not set("*?[") & set(file)]
    return [Path(kwargs.get("data_dir") or "", Path(file).expanduser()) for file in named]


def _leaves(value: Any) -> list[str]:
    """Return the texts of ``data_files``: one, a list, or either for each split."""
    if isinstance(value, dict):
        return [file for part in value.values() for file in _leaves(part)]
    return [str(part) for part in ([value] if isinstance(value, str) else value or [])]
