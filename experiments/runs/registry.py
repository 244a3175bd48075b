"""Tasks, groups and tags that lm-evaluation-harness knows by name, found without loading their data or their code.

Imports lm-eval only where a task of it is looked up, and no torch.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from chai.folders import cache_folder
from experiments.config.schema import ConfigError
from experiments.runs.definitions import (
    GROUP_ONLY,
    check_definition,
    data_files,
    function_keys,
    refuse_functions,
    split_files,
)
from experiments.runs.files import content_digest, digest, read_json, write_json
from experiments.runs.identity import resolve_fingerprints


@dataclass
class Entry:
    """A name: a task (with a YAML file), a group (the same, with members) or a tag (with members alone)."""

    path: str | None
    members: list[Any] | None = None  # names, or dictionaries that override keys of a member


@dataclass
class Definition:
    """A task with the keys that its groups set."""

    name: str
    path: Path | None  # None: the overrides are the whole definition
    overrides: dict[str, Any] = field(default_factory=dict)

    def load(self, *, resolve: bool) -> dict[str, Any]:
        """Return the definition; without ``resolve``, its functions are named instead of imported."""
        from lm_eval.tasks._yaml_loader import load_yaml

        spec = load_yaml(self.path, resolve_func=resolve) if self.path is not None else {}
        return {key: value for key, value in (spec | self.overrides).items() if key not in ("tag", "task_list")}


def registered_members(config: DictConfig) -> list[DictConfig]:
    """Return one configuration for each task of the chosen name; a ConfigError for what cannot be scored."""
    task = config.task
    found = {definition.name: definition for definition in find_definitions(task.name, task.include_path)}
    if not found:
        raise ConfigError(f"'{task.name}' of lm-eval has no tasks")
    singles = []
    for definition in found.values():
        chosen = _container(task)
        spec = definition.load(resolve=False)
        for key, value in chosen.items():  # the parts that are set, of a dictionary
            is_part = isinstance(value, dict) and isinstance(spec.get(key), dict)
            if is_part and definition.path is not None and key in function_keys(definition.path):
                raise ConfigError(
                    f"task.overrides sets a part of '{key}', in which task '{definition.name}' has a !function; "
                    "valid: a definition of your own (task.include_path)"
                )
            definition.overrides = definition.overrides | {key: spec[key] | value if is_part else value}
        overrides = definition.overrides
        spec |= overrides
        single = config.copy()
        single.task.name = definition.name
        check_definition(single.task, spec)
        single.task.overrides = _plain(overrides, definition.name) or None
        resolve_fingerprints(single)
        single.task.fingerprint = _fingerprint(single.task, spec, definition.path)
        singles.append(single)
    return singles


def group_metrics(task: DictConfig) -> list[dict[str, Any]]:
    """Return the means over its tasks that a group's definition asks for; empty for other names."""
    entry = Index(task.include_path).get(task.name) if task.registered else None
    if entry is None or entry.members is None or entry.path is None:
        return []
    listed = Definition(task.name, Path(entry.path)).load(resolve=False).get("aggregate_metric_list") or []
    return [listed] if isinstance(listed, dict) else list(listed)


def find_definition(task: DictConfig) -> Definition:
    """Return the definition of a registered task of a run, whose groups are resolved."""
    entry = Index(task.include_path).get(task.name)
    return Definition(task.name, Path(entry.path) if entry is not None and entry.path else None, _container(task))


def find_definitions(name: str, include_path: str | None) -> Iterator[Definition]:
    """Yield the tasks of a name; a ConfigError with similar names if there is none."""
    yield from _expand(name, {}, Index(include_path), ())


def _expand(name: str, overrides: dict[str, Any], index: Index, parents: tuple[str, ...]) -> Iterator[Definition]:
    """Yield the tasks of a name, with the keys that groups above it set; the outermost group counts."""
    if name in parents:
        raise ConfigError(f"lm-eval's group '{name}' contains itself")
    entry = index.get(name)
    if entry is None:
        index.refuse(name, parents)
        return
    if entry.members is None:
        yield Definition(name, Path(entry.path) if entry.path else None, overrides)
        return
    spec = {}
    if entry.path:
        refuse_functions(name, Path(entry.path))
        spec = Definition(name, Path(entry.path)).load(resolve=False)
    yield from _expand_members(name, spec | {"task": entry.members}, overrides, index, parents)


def _expand_members(
    group: str, spec: dict[str, Any], overrides: dict[str, Any], index: Index, parents: tuple[str, ...]
) -> Iterator[Definition]:
    """Yield the tasks of a group's members: names, or dictionaries with a name and keys to override."""
    overrides = {key: value for key, value in spec.items() if key not in GROUP_ONLY} | overrides
    inside = (*parents, group)
    for member in spec["task"]:
        if isinstance(member, str):
            yield from _expand(member, overrides, index, inside)
            continue
        name = member.get("group") or member.get("task")
        keys = {key: value for key, value in member.items() if key not in ("group", "task")}
        if not isinstance(name, str):
            raise ConfigError(f"lm-eval's group '{group}' has a member without a name")
        if index.get(name) is not None:
            yield from _expand(name, overrides | keys, index, inside)
        elif "group" in member:  # defined here
            yield from _expand_members(f"{group}::{name}", member, overrides, index, inside)
        else:
            yield Definition(f"{group}::{name}", None, overrides | keys)


class Index:
    """Names of the user's folder, which count first, and of lm-eval."""

    def __init__(self, include_path: str | None) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"task.include_path={include_path} is not a folder")
        self.include_path = include_path
        self.own = _scan(str(Path(include_path).resolve())) if include_path is not None else {}

    def get(self, name: str) -> Entry | None:
        """Return an entry, or ``None``; lm-eval's own are read only where the user's folder lacks the name."""
        return self.own.get(name) or built_in().get(name)

    def refuse(self, name: str, parents: tuple[str, ...]) -> None:
        """Raise a ConfigError for an unknown name."""
        names = [*self.own, *built_in()]
        near = difflib.get_close_matches(name, names, n=5)
        member = f" in group '{parents[-1]}'" if parents else ""
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        places = f"lm-eval {_version()}" + (f" or {self.include_path}" if self.include_path else "")
        raise ConfigError(f"unknown task '{name}'{member}{hint}; not in {places} (`lm-eval ls tasks` lists all)")


@functools.cache
def built_in() -> dict[str, Entry]:
    """Return the names of the installed lm-eval; its thousands of files are read once, then a cache of the user."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    key = digest({"folder": str(folder), "changed": folder.stat().st_mtime_ns})
    cache = cache_folder("lm_eval") / f"{_version()}-{key}.json"
    saved = read_json(cache)
    if saved is None:
        entries = _scan(str(folder))
        saved = {name: [entry.path, entry.members] for name, entry in entries.items()}
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, saved)
        except OSError:
            pass  # without a cache the files are read again
    return {name: Entry(path, members) for name, (path, members) in saved.items()}


def _scan(folder: str) -> dict[str, Entry]:
    """Return the tasks, groups and tags that the YAML files of a folder define; the first of a name counts."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entries: dict[str, Entry] = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        try:
            spec = load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            if "lm_eval" in path.parts:
                continue
            raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
        if isinstance(spec.get("group"), str) and "class" not in spec:
            members = spec.get("task")
            entries.setdefault(spec["group"], Entry(str(path), members if isinstance(members, list) else []))
        elif isinstance(name := spec.get("task"), str) and name not in entries:
            entries[name] = Entry(str(path))
            tags = spec.get("tag") or []
            for tag in [tags] if isinstance(tags, str) else tags:
                entry = entries.setdefault(tag, Entry(None, []))
                if entry.path is None and entry.members is not None:
                    entry.members = sorted([*entry.members, name])
    return entries


def _container(task: DictConfig) -> dict[str, Any]:
    """Return ``task.overrides`` as a dictionary."""
    overrides: Any = OmegaConf.to_container(task.overrides, resolve=True) if task.overrides else {}
    return overrides


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _plain(overrides: dict[str, Any], name: str) -> dict[str, Any]:
    """Return overrides that a configuration can hold; functions cannot be set by a group."""
    try:
        return json.loads(json.dumps(overrides))
    except TypeError:
        raise ConfigError(f"task '{name}': its group sets values that are no plain YAML") from None


def _fingerprint(task: DictConfig, spec: dict[str, Any], path: Path | None) -> str | None:
    """Return a digest of a definition of the user, and of the task's local data; ``None`` for lm-eval's own."""
    contents = []
    if task.include_path is not None and path is not None:
        folder = Path(task.include_path).resolve()
        if path.is_relative_to(folder):
            text = json.dumps(spec, sort_keys=True, default=str)
            for place in (folder, Path(task.include_path).absolute()):  # the same definition in another folder
                text = text.replace(str(place), "")
            contents = [text, *(str(content_digest(code)) for code in sorted(folder.rglob("*.py")))]
    files = data_files(spec) if task.data_dir is None else [file for _, file in split_files(task, spec)]
    contents += [str(content_digest(file)) for file in files if file.is_file()]
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16] if contents else None
