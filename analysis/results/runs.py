"""Find the finished runs of an experiment in a results folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from pandas.api.types import is_numeric_dtype

from analysis.results.files import SkippedRun, read_json, read_table, require

T = TypeVar("T")
ALWAYS = ("model", "method", "run_id")  # fields of every result.json
#: Types of the fields of result.json; an optional field may be null.
TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str, "method": str, "run_id": str, "task": str, "metric": str, "dtype": str, "device": str,
    "device_name": str, "versions": dict, "metrics": dict, "stderr": dict, "savings": dict, "heads_kept": list,
    "heads": int, "layers": int, "key_heads": int, "n": int, "batch_size": int, "seconds": (int, float),
}  # fmt: skip
#: Numeric columns of measurements.parquet.
NUMERIC = ("length", "ms", "ms_p25", "ms_p75", "rounds", "speedup", "limit", "cache_bytes", "formula_bytes")
MAIN = ("llama7b",)  # the paper's main model: its runs are preferred
RANDOM = "-random"  # ends the name of a model with random weights


class MissingRun(Exception):
    """Raised when no finished run matches a query; the message names what was searched and what is available."""

    def __init__(self, message: str, *commands: str, model: str | None = None):
        super().__init__(message)
        self.commands = commands  # make such a run
        self.model = model  # the requested models, if any


def optional(find: Callable[..., T], *arguments: Any) -> T | None:
    """Call a function; return ``None`` if it raises :class:`MissingRun`."""
    try:
        return find(*arguments)
    except MissingRun:
        return None


@dataclass(frozen=True)
class RunQuery:
    """The runs that a figure, table or number is made from."""

    experiment: str
    columns: tuple[str, ...] = ()  # required of measurements.parquet; none: the file is not read
    fields: tuple[str, ...] = ()  # required of result.json
    command: str = ""  # makes such a run
    small_command: str = ""  # makes one of the embedded model, without a GPU

    def command_for(self, models: str | None) -> str:
        """Return the command that makes such runs of some models (separated by commas), one command for each."""
        if models is None:
            return self.command + (f" (without a GPU: {self.small_command})" if self.small_command else "")
        return "; ".join(self._command_of(model) for model in split_models(models))

    def _command_of(self, model: str) -> str:
        base = base_name(model)
        command = self.small_command if base == "tiny" and self.small_command else self.command
        words = [word for word in command.split() if not re.match(r"model[.=]", word)]
        return " ".join([*words, f"model={base}", *(["model.random_init=true"] if base != model else [])])


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    folder: Path
    result: dict[str, Any]  # result.json
    updated: float  # end of the run, seconds since 1970; 0 if it is not recorded
    table: pd.DataFrame  # measurements.parquet; empty if the query names no columns
    experiment: str
    model: str
    method: str
    device: str
    dtype: str
    versions: dict[str, str]  # of the project, its code and the libraries

    @property
    def finished(self) -> str:
        """End of the run in UTC."""
        return f"{datetime.fromtimestamp(self.updated, timezone.utc):%Y-%m-%d %H:%M}"

    def __str__(self) -> str:
        name = self.model if self.method == "none" else f"{self.method} on {self.model}"
        return f"{self.folder} ({name}, {self.device}, {self.dtype}, finished {self.finished} UTC)"


@dataclass
class Results:
    """A results folder, optionally narrowed to models and a device."""

    root: Path
    model: str | None = None  # one or several, separated by commas; None: any
    device: str | None = None  # part of the device's name in any case; None: any
    without: tuple[str, ...] = ()  # models to exclude, also with random weights
    used: list[Run] = field(default_factory=list)  # runs handed out so far
    skipped: dict[Path, str] = field(default_factory=dict)  # folders that cannot be used, with the reason

    @property
    def models(self) -> tuple[str, ...]:
        """The requested models; empty: any."""
        return split_models(self.model or "")

    def of(self, model: str, with_random: bool = False) -> Results:
        """Narrow to a model, optionally also with random weights; ``used`` and ``skipped`` stay the same."""
        return replace(self, model=f"{model},{model}{RANDOM}" if with_random else model)

    def runs(self, query: RunQuery) -> list[Run]:
        """Return the finished runs that match, by folder; add those that cannot be used to ``skipped``."""
        runs = []
        folders = {
            folder
            for model in self.models or ("*",)
            for folder in (self.root / query.experiment).glob(f"{model}/*/*/*")
        }
        for folder in sorted(folders):
            if not folder.is_dir() or base_name(folder.parents[2].name) in self.without:
                continue
            run = self.attempt(folder, _load, folder, query)
            if run is not None and (self.device or "").lower() in run.device.lower():
                runs.append(run)
        return runs

    def attempt(self, folder: Path, load: Callable[..., T], *arguments: Any) -> T | None:
        """Call a loader; if it raises :class:`SkippedRun`, add the folder to ``skipped`` and return ``None``."""
        try:
            return load(*arguments)
        except SkippedRun as reason:
            self.skipped[folder] = str(reason)
            return None

    def ranked(
        self, query: RunQuery, usable: Callable[[Run], bool] | None = None, prefer: Sequence[str] = MAIN
    ) -> list[Run]:
        """Return the usable runs, best first: of a preferred model (also with random weights), of CHAI, the newest.

        Raises:
            MissingRun: no run is usable.
        """

        def rank(run: Run) -> tuple[int, bool, float]:
            places = [place for place, name in enumerate(prefer) if run.model.startswith(name)]
            return -min(places, default=len(prefer)), run.method == "chai", run.updated

        runs = [run for run in self.runs(query) if usable is None or usable(run)]
        if not runs:
            raise self.missing(query)
        return sorted(runs, key=rank, reverse=True)

    def newest(self, query: RunQuery, usable: Callable[[Run], bool] | None = None) -> Run:
        """Return the first of :meth:`ranked` and add it to ``used``."""
        best = self.ranked(query, usable)[0]
        self.used.append(best)
        return best

    def missing(self, query: RunQuery) -> MissingRun:
        """Return the error that names the runs of the experiment that are available instead."""
        wanted = f" of model {' or '.join(map(repr, self.models))}" if self.models else ""
        wanted += f" on a device named '{self.device}'" if self.device else ""
        runs = Results(self.root, without=self.without).runs(RunQuery(query.experiment))
        available = sorted({f"{run.method} on {run.model}, {run.device}" for run in runs})
        others = f" could be used (available: {'; '.join(available)})" if available else ""
        message = f"no finished {query.experiment} run{wanted} in {self.root}{others}"
        return MissingRun(message, query.command, model=self.model)


def split_models(names: str) -> tuple[str, ...]:
    """Split names at commas, without repetitions."""
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def base_name(model: str) -> str:
    """Return a model's name without the suffix of random weights."""
    return model.removesuffix(RANDOM)


def _load(folder: Path, query: RunQuery) -> Run:
    # Skip runs that are not done.
    status = read_json(folder / "status.json")
    if status.get("state") != "done":
        error = f": {status['error']}" if status.get("error") else ""
        raise SkippedRun(f"unfinished, its state is {status.get('state')}{error}")

    # Check the fields that are required, and the types of all known ones.
    result = read_json(folder / "result.json")
    fields = (*ALWAYS, *query.fields)
    require("result.json", fields, result)
    for name, kind in TYPES.items():
        if name in result and not isinstance(result[name], kind) and (name in fields or result[name] is not None):
            raise SkippedRun(f"result.json is corrupt: {name} is {json.dumps(result[name])[:40]}")
    if not all(type(k) is int and k > 0 for k in result.get("heads_kept") or []):
        raise SkippedRun("result.json is corrupt: heads_kept are not positive integers")

    # Read the measurements only where they are needed: it takes the most time.
    table = pd.DataFrame()
    if query.columns:
        table = read_table(folder / "measurements.parquet", query.columns)
        for name in query.columns:
            if name in NUMERIC and not is_numeric_dtype(table[name]):
                raise SkippedRun(f"measurements.parquet is corrupt: {name} is not numeric")
    updated = status.get("updated")
    return Run(
        folder, result, updated if isinstance(updated, (int, float)) else 0.0, table, query.experiment,
        result["model"], result["method"],
        device=str(result.get("device_name") or result.get("device") or "unknown device"),
        dtype=str(result.get("dtype", "unknown dtype")),
        versions=result.get("versions") or {},
    )  # fmt: skip
