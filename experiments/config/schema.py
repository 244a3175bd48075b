"""The structured configuration: what keys exist, of what type, with what values; and how a bad one is reported.

Nothing here imports torch or lm-eval, so ``python run.py --help`` and every mistake on the command line answer at once.
The keys of ``experiment`` and ``method`` are those of their YAML files; their types are those of the dataclasses they
become (:func:`to_dataclass`), in ``experiments/<name>.py`` and ``chai/methods/<name>.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

REPOSITORY = Path(__file__).resolve().parents[2]
CONF = REPOSITORY / "conf"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # chai.models has them too, but imports torch
DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

#: Hydra's own groups that can be chosen; ``basic`` is Hydra's name for one after the other, here.
HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")

#: Dictionaries that take any key: of the model's own configuration, of sbatch.
OPEN = ("model.architecture", "hydra.launcher.additional_parameters")

T = TypeVar("T")


class ConfigError(ValueError):
    """A wrong name or value in the configuration: one line that says what is valid. Exit code 2, nothing written."""


@dataclass
class Resources:
    """What a queued job of a model asks for (``hydra/launcher=slurm``); a few of them fit into any time limit."""

    gpus: int = 1
    cpus: int = 8
    mem_gb: int = 64  # GiB of main memory
    timeout_min: int = 240  # a job that needs longer is queued again and goes on from what it saved


@dataclass
class ModelConfig:
    """A model: where its weights are, how they are loaded, and its shape for when they aren't needed."""

    name: str = "???"
    hub_id: str | None = None
    revision: str = "main"
    path: str | None = None  # a local folder in Hugging Face format, instead of the hub
    dtype: str = "auto"
    device_map: Any = (
        None  # null: all on `device`; a name of DEVICE_MAPS, or modules and devices: accelerate divides it
    )
    safetensors_only: bool = True  # refuse pickled weights
    random_init: bool = False  # build `architecture` with random weights (for probes; no accuracy to be had)
    clusters: Any = None  # the counts that `method.clusters` takes by default
    predictor: str | None = None  # folder of a trained predictor, which `method.predictor` takes by default
    profile: str | None = None  # folder of a profile, which methods with a static membership take by default
    architecture: dict[str, Any] = field(default_factory=dict)  # used by random_init
    resources: Resources = field(default_factory=Resources)
    fingerprint: str | None = None  # of the weights at `path`; filled in


@dataclass
class TaskConfig:
    """A task of lm-evaluation-harness, or a group of such (``members``), each scored in a run of its own."""

    name: str = "???"
    members: list[str] = field(default_factory=list)
    harness: str | None = None  # file below lm_eval/tasks with the prompts, choices and scoring
    metric: str = "acc"
    split: str = "test"
    data_file: str | None = None
    data_dir: str | None = None  # a folder with `data_file`; null: the hub
    columns: list[str] = field(default_factory=list)  # that each item of local data must have
    fingerprint: str | None = None  # of the data file; filled in
    num_fewshot: int = 0


@dataclass
class CorpusConfig:
    """Where texts come from: a local file before the hub, and the hub before the embedded generator."""

    name: str = "???"
    path: str | None = None  # .jsonl with `column` in each line, or any other file with a text a line
    hub_id: str | None = None
    revision: str = "main"
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    fingerprint: str | None = None  # of the file at `path`; filled in


@dataclass
class LoggerConfig:
    """Where a run is shown beside its folder (:mod:`experiments.runs.tracking`)."""

    name: str = "???"
    project: str = "chai-lab"
    entity: str | None = None  # the account's own where null
    group: str | None = None  # null: the sweep's start, for the runs of a sweep
    mode: str | None = None  # online or offline; null: as WANDB_MODE says, else online with a key and a network
    timeout: float = 120.0  # seconds after which a run isn't waited for any more


@dataclass
class RunConfig:
    """Everything that ``run.py`` is told; ``profile`` and ``corpus`` are null where an experiment has no such thing."""

    experiment: Any = field(default_factory=dict)
    method: Any = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    profile: Any = None
    corpus: CorpusConfig | None = None
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 0
    limit: int | None = None
    batch_size: int = 16
    device: str = "auto"
    force: bool = False
    results_dir: str = "results"


def register() -> None:
    """Make the schemas and the ``repo`` resolver (a path inside the repository) known to Hydra; safe to call twice."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="task", name="schema", node=TaskConfig)
    store.store(group="corpus", name="schema", node=CorpusConfig)
    store.store(group="logger", name="schema", node=LoggerConfig)
    OmegaConf.register_new_resolver("repo", lambda path: str(REPOSITORY / path), replace=True)


def choices(group: str) -> list[str]:
    """The names that ``group=`` takes."""
    names = [path.stem for path in (CONF / group).glob("*.yaml")]
    return sorted([*names, "basic"] if group in HYDRA_GROUPS else names)


def groups() -> list[str]:
    """The configuration groups of the project itself, and ``paper``, whose files are lists of sweeps."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def compose_config(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """The configuration for one list of overrides, outside of Hydra's own main; ``with_hydra`` keeps its section."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=with_hydra)


def combinations(arguments: list[str]) -> list[list[str]]:
    """What a sweep stands for: the overrides of each of its combinations, none of them a sweep itself."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = OverridesParser.create().parse_overrides(arguments)
    return [list(single) for single in BasicSweeper.split_arguments(parsed, None)[0]]


def load_member(name: str, group: TaskConfig) -> DictConfig:
    """The configuration of one task of a group; what the group was given on the command line holds for its members.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in choices("task"):
        raise ConfigError(unknown("task", name, choices("task")))
    own = OmegaConf.load(CONF / "task" / f"{name}.yaml")
    assert isinstance(own, DictConfig)
    own.pop("defaults", None)
    member = OmegaConf.merge(OmegaConf.structured(TaskConfig), own)
    assert isinstance(member, DictConfig)
    if group.data_dir is not None:
        member.data_dir = group.data_dir
    if group.num_fewshot:
        member.num_fewshot = group.num_fewshot
    return member


def unknown(what: str, name: object, valid: list[str]) -> str:
    """``unknown method 'chia' (did you mean 'chai'?); valid: chai, mha``."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown {what} '{name}'{hint}; valid: {', '.join(valid)}"


def check_overrides(arguments: list[str], *, multirun: bool = False) -> None:
    """Verify a command line's overrides, sweeps included, before anything is started or written.

    Raises:
        ConfigError: an unknown group choice, key or value, or a line that isn't an override at all.
    """
    register()
    try:
        parsed = OverridesParser.create().parse_overrides(arguments)
    except Exception as error:  # Hydra raises several unrelated types here
        raise ConfigError(f"can't read the command line: {_one_line(error)}; expected key=value ...") from None
    own = [override for override in parsed if not override.key_or_group.startswith("hydra")]
    for override in parsed:
        if override not in own and override.is_sweep_override():
            raise ConfigError(f"{override.input_line} can't be a sweep; expected one {override.key_or_group}=VALUE")
        if override.key_or_group.startswith("hydra.sweep"):
            raise ConfigError(
                f"{override.key_or_group} has no effect: a sweep's record is below results_dir, in sweeps/"
            )
        if (group := override.key_or_group) in HYDRA_GROUPS:
            for choice in _values(override):
                if choice not in choices(group):
                    raise ConfigError(unknown(group, choice, choices(group)))
                if choice != "basic" and not multirun:
                    raise ConfigError(f"{group}={choice} is for sweeps: add -m")
    for override in own:
        if override.is_sweep_override() and not multirun:
            raise ConfigError(f"{override.input_line} is a sweep: add -m (a list of numbers is written '[1,2]')")
        if override.key_or_group in groups():
            if override.is_add() or override.is_delete() or override.package is not None:
                raise ConfigError(f"can't read {override.input_line}; expected {override.key_or_group}=NAME")
            for choice in _values(override):
                if choice not in choices(override.key_or_group):
                    raise ConfigError(unknown(override.key_or_group, choice, choices(override.key_or_group)))
    if settings := [o for o in parsed if o.key_or_group.startswith("hydra.launcher.")]:
        chosen = [str(o.input_line) for o in parsed if o.key_or_group == "hydra/launcher"]
        base = compose_config(chosen, with_hydra=True)
        for override in settings:
            _check_key(base, override)
    selections = [o for o in own if o.key_or_group in groups()]
    settings = [o for o in own if o.key_or_group not in groups()]
    for combination in itertools.product(*([f"{o.key_or_group}={v}" for v in _values(o)] for o in selections)):
        base = _compose(list(combination))
        for override in settings:
            _check_key(base, override)
        _compose([*combination, *(str(o.input_line) for o in parsed if o not in own)])
        firsts = [_single(o, 0) for o in settings]
        for index, override in enumerate(settings):
            for value in range(len(_values(override))):
                candidate = [*combination, *firsts[:index], _single(override, value), *firsts[index + 1 :]]
                check_values(_compose(candidate))
        check_values(_compose([*combination, *firsts]))


def check_values(config: DictConfig) -> None:
    """Verify what types alone don't say.

    Raises:
        ConfigError: names the key, its value and the valid ones.
    """
    try:
        OmegaConf.resolve(resolved := config.copy())
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from None
    if resolved.model.dtype not in DTYPES:
        raise ConfigError(f"model.dtype is '{resolved.model.dtype}'; valid: {', '.join(DTYPES)}")
    if resolved.logger.mode not in (None, "online", "offline"):
        raise ConfigError(f"logger.mode is '{resolved.logger.mode}'; valid: online, offline, null")
    if resolved.logger.timeout <= 0:
        raise ConfigError(f"logger.timeout is {resolved.logger.timeout}; valid: more than 0 seconds")
    for key in ("limit", "batch_size"):
        if resolved[key] is not None and resolved[key] < 1:
            raise ConfigError(f"{key} is {resolved[key]}; valid: 1 or more")
    if resolved.task.num_fewshot < 0:
        raise ConfigError(f"task.num_fewshot is {resolved.task.num_fewshot}; valid: 0 or more")
    if resolved.task.num_fewshot and resolved.task.data_dir is not None:
        raise ConfigError("task.num_fewshot is more than 0, but task.data_dir has only the items that are scored")
    if not resolved.task.members and not resolved.task.harness:
        raise ConfigError(f"task '{resolved.task.name}' names neither task.harness nor task.members")
    if resolved.task.data_dir is not None and not resolved.task.members and not resolved.task.data_file:
        raise ConfigError(f"task '{resolved.task.name}' has no task.data_file to look for in task.data_dir")
    check_device_map(resolved.model.device_map)
    if not DEVICES.fullmatch(resolved.device):
        raise ConfigError(f"device is '{resolved.device}'; valid: auto, cpu, cuda, cuda:0, mps")
    check_clusters(resolved)


def check_device_map(value: Any) -> None:
    """Refuse a device map that is neither a known name nor a dictionary from modules to devices.

    Raises:
        ConfigError: names what is wrong and what is valid.
    """
    if isinstance(value, DictConfig) and len(value):
        for module, device in value.items():
            index = isinstance(device, int) and not isinstance(device, bool) and device >= 0
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
    """Refuse a method that needs cluster counts where neither the command line nor the model gives any.

    Raises:
        ConfigError: says how to give them.
    """
    given = config.method.get("clusters"), config.method.get("profile"), config.profile
    if "clusters" in config.method and all(one is None for one in given):
        raise ConfigError(
            f"model '{config.model.name}' has no cluster counts of its own: give method.clusters, a list with one "
            "count for each layer ('[8,6,4,4]'), one count for all, or a preset's name; or method.profile=FOLDER"
        )


def to_dataclass(cls: type[T], section: DictConfig, where: str) -> T:
    """``section`` (without its ``name``) as an instance of ``cls``, types checked.

    Raises:
        ConfigError: a missing, unknown or ill-typed key, or a value that ``cls`` itself refuses.
    """
    values = OmegaConf.to_container(section, resolve=True)
    assert isinstance(values, dict)
    values.pop("name", None)
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(unknown(f"key {where}", key, sorted(fields)))
    for key, value in values.items():
        expected = str(fields[key].type)
        if not _fits(value, expected):
            raise ConfigError(f"{where}.{key} is {value!r}; expected {expected}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_one_line(error)}") from None


def _fits(value: object, expected: str) -> bool:
    """Whether a YAML value fits an annotation made of plain types (``list[int] | int | str``); others pass."""
    plain: dict[str, type | tuple[type, ...]] = {
        "int": int,
        "float": (int, float),
        "str": str,
        "bool": bool,
        "None": type(None),
    }
    for part in (part.strip() for part in expected.split("|")):
        if part == "list[int]":
            if isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
                return True
        elif part not in plain or (isinstance(value, plain[part]) and (part == "bool" or not isinstance(value, bool))):
            return True
    return False


def _compose(overrides: list[str]) -> DictConfig:
    try:
        return compose_config(overrides)
    except Exception as error:  # Hydra and OmegaConf raise many unrelated types here
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        key = getattr(cause, "full_key", None)
        raise ConfigError(f"{key}: {_one_line(cause)}" if key else _one_line(cause)) from None


def _check_key(base: DictConfig, override: Override) -> None:
    """Refuse a key that the composed configuration doesn't have."""
    node: Any = base
    parts = override.key_or_group.split(".")
    if parts[1:] == ["name"] and parts[0] in ("experiment", "method", "task", "logger"):
        raise ConfigError(f"{override.key_or_group} is what {parts[0]}=... sets; valid: {', '.join(choices(parts[0]))}")
    if parts[0] == "task" and base.task.members and parts[1:] not in (["data_dir"], ["num_fewshot"]):
        raise ConfigError(
            f"{override.key_or_group} can't be set for a group of tasks; valid for '{base.task.name}': "
            "task.data_dir, task.num_fewshot"
        )
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            if override.is_add() and isinstance(node, DictConfig) and ".".join(parts[:depth]) in OPEN:
                return
            where = ".".join(parts[:depth])
            valid = sorted(str(key) for key in node) if isinstance(node, DictConfig) else []
            name = f"key '{override.key_or_group}'"
            if not valid:
                raise ConfigError(f"unknown {name}: {where} has no keys below it")
            close = difflib.get_close_matches(part, valid, n=1)
            hint = f" (did you mean '{'.'.join([*parts[:depth], close[0]])}'?)" if close else ""
            raise ConfigError(f"unknown {name}{hint}; valid{f' in {where}' if where else ''}: {', '.join(valid)}")
        node = node._get_node(part)


def _values(override: Override) -> list[str]:
    """The values of an override as text; several for a sweep."""
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    try:
        return [str(value) for value in override.sweep_string_iterator()]
    except HydraException:
        raise ConfigError(f"can't list the values of {override.input_line}; write them out: a,b,c") from None


def _single(override: Override, index: int) -> str:
    """The override with one of its values."""
    if override.is_delete():
        return str(override.input_line)
    values = _values(override)
    prefix = "+" if override.is_add() else ""
    return f"{prefix}{override.get_key_element().lstrip('+~')}={values[min(index, len(values) - 1)]}"


def _one_line(error: BaseException) -> str:
    """The first telling line of an error; with the valid names where Hydra lists them below it."""
    text = str(error).partition("Config search path")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    listed = any(line.startswith("Available options") for line in lines)
    return (" ".join(lines) if listed else lines[0]) if lines else type(error).__name__
