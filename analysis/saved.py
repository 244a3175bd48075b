"""Finished runs read back from a results folder, without the code that made them (fields: docs/results.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pandas.api.types import is_numeric_dtype

ALWAYS = ("model", "method", "run_id")  # fields that every result.json has
#: What fields of result.json are, where they are there; what is None is not.
KINDS: dict[str, type | tuple[type, ...]] = {
    "model": str, "method": str, "run_id": str, "task": str, "metric": str, "dtype": str, "device": str,
    "device_name": str, "versions": dict, "metrics": dict, "stderr": dict, "savings": dict, "heads_kept": list,
    "heads": int, "layers": int, "key_heads": int, "n": int, "batch_size": int, "seconds": (int, float),
}  # fmt: skip
#: Columns of measurements.parquet that are numbers in every row.
NUMBERS = ("length", "ms", "ms_p25", "ms_p75", "rounds", "speedup", "limit", "cache_bytes", "formula_bytes")
MAIN = ("llama7b",)  # the paper's main model, whose runs are drawn rather than others


class MissingRun(Exception):
    """No finished run has what is wanted; the message says what was looked for and what is there.

    Attributes:
        model: the one whose run is missing, where a certain one was asked for.
    """

    def __init__(self, message: str, model: str | None = None):
        super().__init__(message)
        self.model = model


class LeftOut(Exception):
    """Why a folder doesn't count."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        result: its ``result.json``.
        updated: when it finished, seconds since 1970.
        table: its ``measurements.parquet``; empty if no columns of it were asked for.
    """

    folder: Path
    result: dict[str, Any]
    updated: float
    table: pd.DataFrame

    @property
    def model(self) -> str:
        """The name that it is filed under."""
        return str(self.result["model"])

    @property
    def method(self) -> str:
        """Likewise."""
        return str(self.result["method"])

    @property
    def device(self) -> str:
        """What it was measured on."""
        return str(self.result.get("device_name") or self.result.get("device") or "unknown device")

    def __str__(self) -> str:
        day = datetime.fromtimestamp(self.updated, timezone.utc)
        who = self.model if self.method == "none" else f"{self.method} on {self.model}"
        what = f"{who}, {self.device}, {self.result.get('dtype', 'unknown dtype')}"
        return f"{self.folder} ({what}, finished {day:%Y-%m-%d %H:%M} UTC)"


@dataclass
class Results:
    """A results folder, narrowed to models and a device where some are wanted.

    Attributes:
        root: the folder.
        model: the only model wanted, as it is filed, or several with commas between; ``None``: any.
        device: a part of the device's name, in either case; ``None``: any.
        without: models whose runs don't count, nor those of their shape with random weights.
        used: the runs that were handed out, in order.
        left_out: folders that don't count, and why.
    """

    root: Path
    model: str | None = None
    device: str | None = None
    without: tuple[str, ...] = ()
    used: list[Run] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """The only models wanted; none: any."""
        return tuple(dict.fromkeys(name.strip() for name in (self.model or "").split(",") if name.strip()))

    def of(self, model: str) -> Results:
        """The same narrowed to one model; what it hands out and leaves out is kept here too."""
        return replace(self, model=model)

    def runs(self, experiment: str, columns: Sequence[str] = (), fields: Sequence[str] = ()) -> list[Run]:
        """Finished runs of an experiment, by folder; the others go to ``left_out``.

        Args:
            experiment: its name.
            columns: of ``measurements.parquet`` that must be there; none: the file isn't read.
            fields: of ``result.json`` that must be there.
        """
        found = []
        models = self.models or ("*",)
        for folder in sorted({folder for name in models for folder in (self.root / experiment).glob(f"{name}/*/*/*")}):
            if not folder.is_dir() or base_name(folder.parents[2].name) in self.without:
                continue
            try:
                run = _load(folder, columns, (*ALWAYS, *fields))
            except LeftOut as reason:
                self.left_out[folder] = str(reason)
                continue
            if self.device is None or self.device.lower() in run.device.lower():
                found.append(run)
        return found

    def ranked(
        self,
        experiment: str,
        columns: Sequence[str] = (),
        fields: Sequence[str] = (),
        usable: Callable[[Run], bool] = lambda run: True,
        prefer: Sequence[str] = MAIN,
    ) -> list[Run]:
        """Runs to draw, best first: of a preferred model rather than others; then of CHAI; then the newest.

        Args:
            experiment: its name.
            columns: see :meth:`runs`.
            fields: see :meth:`runs`.
            usable: whether a run measured what is wanted.
            prefer: models, the most wanted first; with random weights, they count as the same.

        Raises:
            MissingRun: there is none.
        """

        def rank(run: Run) -> tuple[int, bool, float]:
            wanted = [place for place, name in enumerate(prefer) if run.model.startswith(name)]
            return -min(wanted, default=len(prefer)), run.method == "chai", run.updated

        runs = [run for run in self.runs(experiment, columns, fields) if usable(run)]
        if not runs:
            raise self.missing(experiment)
        return sorted(runs, key=rank, reverse=True)

    def newest(
        self,
        experiment: str,
        columns: Sequence[str] = (),
        fields: Sequence[str] = (),
        usable: Callable[[Run], bool] = lambda run: True,
    ) -> Run:
        """The first of :meth:`ranked`, noted as used."""
        best = self.ranked(experiment, columns, fields, usable)[0]
        self.used.append(best)
        return best

    def missing(self, experiment: str) -> MissingRun:
        """What to raise when no run of an experiment can be drawn."""
        wanted = f" of model {' or '.join(map(repr, self.models))}" if self.models else ""
        wanted += f" on a device named '{self.device}'" if self.device else ""
        every = Results(self.root, without=self.without)
        there = sorted({f"{run.method} on {run.model}, {run.device}" for run in every.runs(experiment)})
        others = f" could be used (there are: {'; '.join(there)})" if there else ""
        return MissingRun(f"no finished {experiment} run{wanted} in {self.root}{others}", self.model)


def base_name(model: str) -> str:
    """A model's name without what says that its weights are random."""
    return model.removesuffix("-random")


def _load(folder: Path, columns: Sequence[str], fields: Sequence[str]) -> Run:
    status = read_object(folder / "status.json")
    if status.get("state") != "done":
        error = f": {status['error']}" if status.get("error") else ""
        raise LeftOut(f"unfinished, its state is {status.get('state')}{error}")
    result = read_object(folder / "result.json")
    lacking = [name for name in fields if name not in result]
    if lacking:
        raise LeftOut(f"result.json has no {', '.join(lacking)}")
    for name, kind in KINDS.items():
        if name in result and not isinstance(result[name], kind) and (name in fields or result[name] is not None):
            raise LeftOut(f"result.json is corrupt: {name} is {json.dumps(result[name])[:40]}")
    kept = result.get("heads_kept") or []
    if not all(type(count) is int and count > 0 for count in kept):
        raise LeftOut("result.json is corrupt: heads_kept aren't whole numbers")
    updated = status.get("updated")
    table = _table(folder / "measurements.parquet", columns) if columns else pd.DataFrame()
    return Run(folder, result, updated if isinstance(updated, (int, float)) else 0.0, table)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        LeftOut: it is missing or anything else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise LeftOut(f"no {path.name}") from None
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise LeftOut(f"{path.name} is corrupt")
    return value


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise LeftOut(f"no {path.name}") from None
    except (OSError, ValueError, pa.ArrowException):
        raise LeftOut(f"{path.name} is corrupt") from None
    lacking = [name for name in columns if name not in table]
    if lacking:
        raise LeftOut(f"{path.name} has no {', '.join(lacking)}")
    words = [name for name in columns if name in NUMBERS and not is_numeric_dtype(table[name])]
    if words:
        raise LeftOut(f"{path.name} is corrupt: {words[0]} isn't a number")
    return table
