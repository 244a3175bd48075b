"""Validation of overrides and values; errors are a ConfigError of one line with the wrong key and the valid ones."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.compose import HYDRA_GROUPS, choices, compose_config, groups, values, variants
from experiments.config.remedies import with_remedy
from experiments.config.schema import (
    DEVICE_MAPS,
    DTYPES,
    FILLERS,
    KEYS,
    LOGGER_MODES,
    PYTHON_TEXTS,
    ConfigError,
    unknown_name,
)

DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
CHOICES = {"model.dtype": DTYPES, "logger.mode": LOGGER_MODES}
MINIMUM = {"task.num_fewshot": 0}
#: Keys of a task's section that can be set for a group of tasks, and for a task that lm-eval knows by its name.
GROUP_KEYS = ("data_dir", "num_fewshot", "apply_chat_template")
REGISTERED_KEYS = ("name", "metric", "include_path", "overrides", "data_dir", "num_fewshot", "apply_chat_template")
#: Those of a passkey task, and of it alone.
PASSKEY_KEYS = ("key", "filler", "text", "lengths", "depths", "items_per_cell", "seed")
#: Dictionaries with arbitrary keys: the model's own configuration, options of sbatch.
OPEN = ("model.architecture", "task.overrides", "hydra.launcher.additional_parameters")

#: Methods that do not run without a head profile.
NEED_PROFILE = ("chai_output",)

T = TypeVar("T")


def check_overrides(arguments: list[str], *, multirun: bool = False) -> None:
    """Verify the overrides of a command line, sweeps included, before anything is started or written."""
    try:
        parsed = OverridesParser.create().parse_overrides(arguments)
    except Exception as error:  # Hydra raises several unrelated types here
        raise ConfigError(
            f"cannot read the command line: {_one_line(error)}; expected key=value ..., "
            "and a value with special characters in two pairs of quotes: \"model.path='/data/my model (2)'\""
        ) from None
    hydra = [override for override in parsed if override.key_or_group.startswith("hydra")]
    selections = [override for override in parsed if override.key_or_group in groups()]
    settings = [override for override in parsed if override not in (*hydra, *selections)]
    _check_hydra(hydra, multirun=multirun)
    if {"model.path", "model.gguf"} <= {override.key_or_group for override in settings}:
        raise ConfigError("model.path and model.gguf are both set; valid: one of them")
    for override in (*selections, *settings):
        if override.is_sweep_override() and not multirun:
            raise ConfigError(f"{override.input_line} is a sweep: add -m (a list of numbers is written '[1,2]')")
    for override in selections:
        if override.is_add() or override.is_delete() or override.package is not None:
            raise ConfigError(f"cannot read {override.input_line}; expected {override.key_or_group}=NAME")
        _check_choices(override)
    first = [variants(override)[0] for override in settings]
    for combination in itertools.product(*map(variants, selections)):
        # Keys depend on the choices, hence are looked up before the settings are applied.
        base = _compose(combination)
        for override in settings:
            _check_key(base, override)
        # Vary one setting at a time: values are checked one by one, not in all combinations.
        fixed = [*combination, *(str(override.input_line) for override in hydra)]
        check_values(_compose([*fixed, *first]))
        for index, override in enumerate(settings):
            for variant in variants(override)[1:]:
                check_values(_compose([*fixed, *first[:index], variant, *first[index + 1 :]]))


def _check_hydra(overrides: list[Override], *, multirun: bool) -> None:
    """Verify the overrides of Hydra's own groups and settings."""
    for override in overrides:
        key = override.key_or_group
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line} cannot be a sweep; expected one {key}=VALUE")
        if key.startswith("hydra.sweep"):
            raise ConfigError(f"{key} has no effect: a sweep's record is below results_dir, in sweeps/")
        if key in HYDRA_GROUPS:
            _check_choices(override)
            if values(override) != ["basic"] and not multirun:
                raise ConfigError(f"{override.input_line} is for sweeps: add -m")
    if settings := [override for override in overrides if override.key_or_group.startswith("hydra.launcher.")]:
        selected = [str(override.input_line) for override in overrides if override.key_or_group == "hydra/launcher"]
        base = compose_config(selected, with_hydra=True)
        for override in settings:
            _check_key(base, override)


def _check_choices(override: Override) -> None:
    """Verify that a configuration group has the selected choices."""
    group = override.key_or_group
    for choice in values(override):
        if choice not in choices(group):
            raise ConfigError(unknown_name(group, choice, choices(group)))


def _check_key(base: DictConfig, override: Override) -> None:
    key = override.key_or_group
    group, *rest = parts = key.split(".")
    is_registered = group == "task" and bool(base.task.registered)
    if rest == ["name"] and group in ("experiment", "method", "task", "logger") and not is_registered:
        more = "; a task of lm-eval is task=lm_eval task.name=NAME" if group == "task" else ""
        raise ConfigError(f"{key} is what {group}=... sets; valid: {', '.join(choices(group))}{more}")
    if group == "task" and rest:
        _check_task_key(base.task, key, rest)
    node: Any = base
    for depth, part in enumerate(parts):
        names = sorted(map(str, node)) if isinstance(node, DictConfig) else []
        if part in names:
            node = node._get_node(part)
            continue
        parent = ".".join(parts[:depth])
        if parent in OPEN and override.is_add():
            return
        if not names:
            raise ConfigError(f"unknown key '{key}': {parent} has no keys below it")
        close = difflib.get_close_matches(part, names, n=1)
        hint = f" (did you mean '{'.'.join([*parts[:depth], close[0]])}'?)" if close else ""
        place = f" in {parent}" if parent else ""
        raise ConfigError(f"unknown key '{key}'{hint}; valid{place}: {', '.join(names)}")


def _check_task_key(task: DictConfig, key: str, rest: list[str]) -> None:
    """Verify that a key of the task's section has an effect on such a task."""
    if rest[0] not in task:
        return  # reported with the similar names
    if task.members and tuple(rest) not in [(name,) for name in GROUP_KEYS]:
        valid = ", ".join(f"task.{name}" for name in GROUP_KEYS)
        raise ConfigError(f"{key} cannot be set for a group of tasks; valid for '{task.name}': {valid}")
    if task.registered and rest[0] not in REGISTERED_KEYS:
        valid = ", ".join(f"task.{name}" for name in REGISTERED_KEYS)
        raise ConfigError(f"{key} has no effect with task=lm_eval, whose definitions set it; valid: {valid}")
    if not task.registered and rest[0] in ("include_path", "overrides", "registered"):
        raise ConfigError(f"{key} is for tasks of lm-eval: task=lm_eval task.name=NAME")
    if task.key is None and rest[0] in PASSKEY_KEYS:
        raise ConfigError(f"{key} is for tasks with a hidden key; valid with it: task=passkey, task=needle")
    if task.key is not None and rest[0] not in (*PASSKEY_KEYS, "apply_chat_template"):
        valid = ", ".join(f"task.{name}" for name in (*PASSKEY_KEYS, "apply_chat_template"))
        raise ConfigError(f"{key} has no effect with task={task.name}, which is made here; valid: {valid}")


def check_values(config: DictConfig) -> None:
    """Verify what types alone do not express."""
    try:
        OmegaConf.resolve(resolved := config.copy())
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from None
    for key, valid in CHOICES.items():
        if (value := OmegaConf.select(resolved, key)) not in valid:
            raise ConfigError(f"{key} is '{value}'; valid: {_listed(valid)}")
    for key, least in MINIMUM.items():
        if (value := OmegaConf.select(resolved, key)) is not None and value < least:
            raise ConfigError(f"{key} is {value}; valid: {least} or more")
    _check_counts(resolved)
    if resolved.logger.timeout <= 0:
        raise ConfigError(f"logger.timeout is {resolved.logger.timeout}; valid: more than 0 seconds")
    if not DEVICES.fullmatch(resolved.device):
        raise ConfigError(f"device is '{resolved.device}'; valid: auto, cpu, cuda, cuda:0, mps")
    _check_device_map(resolved.model.device_map)
    check_clusters(resolved)
    if resolved.corpus is not None and resolved.corpus.python not in (*PYTHON_TEXTS, None):
        raise ConfigError(f"corpus.python is '{resolved.corpus.python}'; valid: {_listed([*PYTHON_TEXTS, None])}")
    _check_task(resolved.task)


def _check_counts(config: DictConfig) -> None:
    """Verify ``limit`` and ``batch_size``, which are not always numbers."""
    limit, batch_size = config.limit, config.batch_size
    is_accuracy = config.experiment.get("name") == "accuracy"
    is_fraction = type(limit) is float and 0 < limit < 1 and is_accuracy
    if limit is not None and not is_fraction and (type(limit) is not int or limit < 1):
        fraction = ", or a fraction of the items between 0 and 1 (0.1)" if is_accuracy else ""
        raise ConfigError(f"limit is {limit}; valid: 1 or more{fraction}, or null")
    if not (batch_size == "auto" and is_accuracy) and (type(batch_size) is not int or batch_size < 1):
        raise ConfigError(f"batch_size is {batch_size}; valid: 1 or more{', or auto' if is_accuracy else ''}")


def _check_task(task: DictConfig) -> None:
    """Verify that a task has a definition, and local data where it is to be found."""
    if task.registered:
        if OmegaConf.is_missing(task, "name"):
            raise ConfigError("task=lm_eval needs task.name: a task, group or tag of lm-eval, for example gsm8k")
        if task.overrides is not None and not isinstance(task.overrides, DictConfig):
            raise ConfigError(f"task.overrides is {task.overrides!r}; valid: a dictionary of keys of the definition")
        return
    if task.key is not None:
        _check_passkey(task)
        return
    if not task.members and not task.harness:
        raise ConfigError(f"task '{task.name}' sets neither task.harness nor task.members")
    if task.data_dir is not None and not task.members and not task.data_file:
        raise ConfigError(f"task '{task.name}' has no task.data_file to look for in task.data_dir")


def _check_passkey(task: DictConfig) -> None:
    """Verify the settings of a task with a hidden key, without the model's tokenizer."""
    for name, choices_of_key in (("key", KEYS), ("filler", (*FILLERS, None) if task.text is not None else FILLERS)):
        if task[name] not in choices_of_key:
            raise ConfigError(f"task.{name} is {_listed([task[name]])}; valid: {_listed(choices_of_key)}")
    for name, fits, words in (
        ("lengths", lambda value: value >= 1, "different numbers of tokens, 1 or more ('[512,1024]')"),
        ("depths", lambda value: 0 <= value <= 1, "different numbers from 0 to 1 ('[0,0.5,1]')"),
    ):
        given = list(task[name] or [])
        if not given or len(set(given)) < len(given) or not all(map(fits, given)):
            raise ConfigError(f"task.{name} is {given}; valid: {words}")
    for name, least in (("items_per_cell", 1), ("seed", 0)):
        if task[name] is None or task[name] < least:
            raise ConfigError(f"task.{name} is {_listed([task[name]])}; valid: {least} or more")


def _check_device_map(value: Any) -> None:
    """Verify that a device map is a known name or a dictionary from modules to devices."""
    if isinstance(value, DictConfig) and len(value):
        for module, device in value.items():
            index = type(device) is int and device >= 0
            named = isinstance(device, str) and device != "auto" and (device == "disk" or DEVICES.fullmatch(device))
            if not index and not named:
                raise ConfigError(
                    f"model.device_map puts {module} on {device!r}; valid: a GPU's index, cpu, cuda:0, mps, disk"
                )
    elif value is not None and value not in DEVICE_MAPS:
        raise ConfigError(
            f"model.device_map is {value!r}; valid: {', '.join(DEVICE_MAPS)}, null, or a dictionary of modules and "
            "devices ('{model.embed_tokens:0,model.layers:1,...}')"
        )


def check_clusters(config: DictConfig) -> None:
    """Verify that a method with cluster counts gets them from the command line, the model or a profile."""
    if config.experiment.name == "train_dejavu":  # its runs do not depend on the method
        return
    sources = (config.method.get("clusters"), config.method.get("profile"), config.profile)
    if config.method.name in NEED_PROFILE:  # which says so itself
        return
    if "clusters" in config.method and all(source is None for source in sources):
        raise ConfigError(
            f"model '{config.model.name}' defines no default cluster counts; set method.clusters to a list with one "
            "count per layer ('[8,6,4,4]'), one count for all layers, or a preset's name; or set method.profile=FOLDER"
        )


def to_dataclass(cls: type[T], section: DictConfig, where: str) -> T:
    """Convert ``section`` (without its ``name``) to an instance of ``cls``, with checked keys and types."""
    arguments: Any = OmegaConf.to_container(section, resolve=True)
    arguments.pop("name", None)
    hints = typing.get_type_hints(cls)
    written = {field.name: field.type for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key, value in arguments.items():
        if key not in written:
            raise ConfigError(unknown_name(f"key {where}", key, sorted(written)))
        if not _matches(value, hints[key]):
            options = _options(hints[key])
            expected = f"valid: {_listed(options)}" if options else f"expected {written[key]}"
            raise ConfigError(f"{where}.{key} is {value!r}; {expected}")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {with_remedy(error)}") from None


def _matches(value: object, expected: Any) -> bool:
    """Return whether a YAML value has the type; unlike ``isinstance``, ``True`` is not an int, and 1 is a float."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, alternative) for alternative in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    return expected is Any or type(value) is (origin or expected) or (expected is float and type(value) is int)


def _options(expected: Any) -> list[Any]:
    """Return the choices of a Literal, or of a list of them, and None if it is optional."""
    if get_origin(expected) is Literal:
        return list(get_args(expected))
    options = [option for part in get_args(expected) for option in _options(part)]
    return [*options, None] if options and types.NoneType in get_args(expected) else options


def _listed(valid: Sequence[Any]) -> str:
    """Return choices as they are written in YAML, separated by commas."""
    return ", ".join("null" if choice is None else str(choice) for choice in valid)


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration; errors become a ConfigError of one line."""
    try:
        return compose_config(list(overrides))
    except Exception as error:  # Hydra and OmegaConf raise many unrelated types here
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        key = getattr(cause, "full_key", None)
        raise ConfigError(f"{key}: {_one_line(cause)}" if key else _one_line(cause)) from None


def _one_line(error: BaseException) -> str:
    """Return the first line of an error that has content, with the valid names where Hydra lists them below it."""
    text = str(error).partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    listed = any(line.startswith("Available options") for line in lines)
    return (" ".join(lines) if listed else lines[0]) if lines else type(error).__name__
