"""Every figure drawn into memory, several at a time: its picture, its data, its runs; or the command that it lacks."""

from __future__ import annotations

import base64
import gzip
import io
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.figures import _catalogue, _look
from analysis.saved import MissingRun, Results, Run

DPI = 180
LARGEST = 40_000  # bytes of a CSV that is embedded as it is; a larger one is compressed


@dataclass(frozen=True)
class Drawn:
    """A figure on the page.

    Attributes:
        name: of the figure.
        title: its heading.
        picture: data URI; empty: it isn't drawn.
        width: of the picture, pixels.
        height: likewise.
        data: data URI of its CSV.
        data_name: file name for that.
        runs: that it is drawn from.
        command: what makes its input, where that isn't there.
        error: why it isn't drawn although its input is there.
        left_out: folders that don't count, and why.
    """

    name: str
    title: str
    picture: str = ""
    width: int = 0
    height: int = 0
    data: str = ""
    data_name: str = ""
    runs: Sequence[Run] = ()
    command: str = ""
    error: str = ""
    left_out: Sequence[tuple[Path, str]] = ()


def draw_all(parts: Sequence[Results]) -> list[list[Drawn]]:
    """All figures of each part, in order.

    Args:
        parts: results, narrowed; a part of one model draws that model's.
    """
    names = _catalogue.names()
    jobs = [(name, results) for results in parts for name in names]
    if not jobs:
        return [[] for _ in parts]
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(draw, *zip(*jobs, strict=True)))
    return [drawn[part * len(names) : (part + 1) * len(names)] for part in range(len(parts))]


def draw(name: str, results: Results) -> Drawn:
    """One figure. A mistake in it, or in what it is drawn from, is said in its place and is no other's.

    Args:
        name: of the figure.
        results: what it is drawn from.
    """
    module = _catalogue.load(name)
    results = replace(results, used=[], left_out={})
    try:
        with rc_context(_look.STYLE):
            figure, data = module.draw(results)
            picture, (width, height) = picture_uri(figure)
        shown = Drawn(name, module.TITLE, picture, width, height, *csv_uri(name, data))
    except MissingRun:
        command = _catalogue.command(module, results.model) if results.model else module.COMMAND
        shown = Drawn(name, module.TITLE, command=command)
    except Exception as error:
        used = ", ".join(str(run.folder) for run in results.used)
        shown = Drawn(
            name, module.TITLE, error=f"{type(error).__name__}: {error}{f' (drawn from {used})' if used else ''}"
        )
    runs = [replace(run, table=pd.DataFrame()) for run in results.used]
    return replace(shown, runs=runs, left_out=list(results.left_out.items()))


def picture_uri(figure: Figure) -> tuple[str, tuple[int, int]]:
    """A figure as lossless WebP, a third of a PNG's size, and its width and height in pixels."""
    out = io.BytesIO()
    figure.savefig(out, format="webp", dpi=DPI, pil_kwargs={"lossless": True, "method": 2})
    width, height = (round(inches * DPI) for inches in figure.get_size_inches())
    return uri("image/webp", out.getvalue()), (width, height)


def csv_uri(name: str, data: pd.DataFrame) -> tuple[str, str]:
    """Plotted data as a data URI and its file name."""
    text = data.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    if len(text) <= LARGEST:
        return uri("text/csv", text), f"{name}.csv"
    return uri("application/gzip", gzip.compress(text, mtime=0)), f"{name}.csv.gz"


def uri(kind: str, content: bytes) -> str:
    """Content as a link that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def tell(drawn: Sequence[Drawn]) -> None:
    """Figures that went wrong, to standard error."""
    for one in drawn:
        if one.error:
            print(f"not drawn: {one.name}: {one.error}", file=sys.stderr)
