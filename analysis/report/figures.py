"""Draw every figure into memory, several at a time; name the command that makes a figure's missing input."""

from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import pandas as pd
from matplotlib import rc_context

from analysis import figures
from analysis.plotting.style import STYLE
from analysis.results.runs import MissingRun, Results, Run

DPI = 180
LARGEST = 40_000  # bytes; a larger CSV is compressed


@dataclass(frozen=True)
class Drawn:
    """A figure on the page."""

    name: str
    title: str
    picture: str = ""  # data URI; empty: not drawn
    width: int = 0  # pixels
    height: int = 0
    data: str = ""  # data URI of the CSV
    data_name: str = ""  # its file name
    runs: Sequence[Run] = ()  # source of the figure
    command: str = ""  # makes the input, if it is missing
    error: str = ""  # why the figure is not drawn although its input is available
    skipped: Mapping[Path, str] = field(default_factory=dict)  # folders that cannot be used, with the reason


def draw_all(parts: Sequence[Results]) -> list[list[Drawn]]:
    """Draw all figures of each part, in order; a part that is narrowed to a model draws that model's."""
    with ProcessPoolExecutor() as pool:
        started = [pool.map(draw, figures.names(), repeat(results)) for results in parts]
        return [list(part) for part in started]


def draw(name: str, results: Results) -> Drawn:
    """Draw one figure; an error is shown in its place and does not affect the others."""
    module = figures.load(name)
    results = replace(results, used=[], skipped={})
    drawn = Drawn(name, module.TITLE)
    try:
        with rc_context(STYLE):
            figure, data = module.draw(results)
            # Lossless WebP takes a third of a PNG's size.
            out = io.BytesIO()
            figure.savefig(out, format="webp", dpi=DPI, pil_kwargs={"lossless": True, "method": 2})
        size = [round(inches * DPI) for inches in figure.get_size_inches()]
        drawn = Drawn(name, module.TITLE, uri("image/webp", out.getvalue()), *size, *csv_uri(name, data))
    except MissingRun:
        command = module.QUERY.command_for(results.model) if results.model else module.QUERY.command
        drawn = replace(drawn, command=command)
    except Exception as error:
        used = ", ".join(str(run.folder) for run in results.used)
        drawn = replace(drawn, error=f"{type(error).__name__}: {error}{f' (drawn from {used})' if used else ''}")
    # The tables of the runs are not needed on the page, and are slow to send between processes.
    runs = [replace(run, table=pd.DataFrame()) for run in results.used]
    return replace(drawn, runs=runs, skipped=results.skipped)


def csv_uri(name: str, data: pd.DataFrame) -> tuple[str, str]:
    """Return plotted data as a data URI, and its file name."""
    text = data.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    if len(text) <= LARGEST:
        return uri("text/csv", text), f"{name}.csv"
    return uri("application/gzip", gzip.compress(text, mtime=0)), f"{name}.csv.gz"


def uri(kind: str, content: bytes) -> str:
    """Return a data URI: a link that contains its content."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
