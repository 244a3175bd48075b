"""Measure implementations of the same result once for each shape, and remember the fastest.

Which kernel is fastest depends on the GPU, the shape, the type and the number of clusters, and differs by factors. The
choice is kept in a file of the user's cache folder, so it is made once on a machine.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from chai.folders import cache_folder
from chai.kernels import is_interpreted
from chai.kernels.compiler import INSTALLED, triton

Candidates = dict[str, Callable[[], Any]]
#: Rounds of a measurement, in which the candidates take turns, after one that compiles them.
ROUNDS = 7
#: Bytes that are written before each candidate, so that its inputs come from memory, as they do within a model.
FLUSHED = 1 << 29
#: Cycles (about a millisecond) for which the GPU is kept busy while a candidate's kernels are launched: the time of the
#: launches, which a CUDA graph does not have, is not measured.
BUSY_CYCLES = 2_000_000


class FastestChoice:
    """The fastest candidate for each key, measured at its first use.

    Args:
        folder: Where choices are kept; ``None``: below the user's cache folder.
        measure: Returns the milliseconds of each candidate that works; by default, times on the GPU.
    """

    def __init__(
        self, folder: Path | None = None, measure: Callable[[Candidates, torch.device], dict[str, float]] | None = None
    ) -> None:
        self.folder = folder
        self.measure = measure or measure_on_gpu
        self.takes_first = False
        self.names: dict[Hashable, str] = {}  # by device and key, of this process
        self.choices: dict[str, dict[str, str]] = {}  # by machine and key, as in the files

    def name(self, key: Hashable, candidates: Callable[[], Candidates], device: torch.device) -> str:
        """Return the name of the fastest candidate; the first one while a CUDA graph is captured and none is known.

        ``candidates`` is called where a measurement is needed. A name from an earlier process that is no longer among
        them is measured anew.
        """
        if self.takes_first:
            return next(iter(candidates()))
        place = device, key
        if place in self.names:
            return self.names[place]
        machine, runs = describe_device(device), candidates()
        text = f"{key!r} among {zlib.crc32(repr(sorted(runs)).encode()):08x}"  # of these candidates, not of others
        known = self._load(machine)
        if known.get(text) not in runs:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return next(iter(runs))
            times = self.measure(runs, device) if len(runs) > 1 else dict.fromkeys(runs, 0.0)
            if not times:
                raise RuntimeError(f"no implementation of the attention works for {text}: {', '.join(runs)}")
            known[text] = min(times, key=lambda name: times[name])
            self._save(machine)
        self.names[place] = known[text]
        return known[text]

    @contextmanager
    def unmeasured(self) -> Iterator[None]:
        """Take the first candidate inside the block, and remember nothing: for checks of what is computed."""
        before, self.takes_first = self.takes_first, True
        try:
            yield
        finally:
            self.takes_first = before

    def _path(self, machine: str) -> Path:
        return (self.folder or cache_folder("kernels")) / f"{machine}.json"

    def _load(self, machine: str) -> dict[str, str]:
        if machine not in self.choices:
            try:
                loaded = json.loads(self._path(machine).read_text())
            except (OSError, ValueError):  # none yet, not readable, or damaged: measured anew
                loaded = {}
            self.choices[machine] = loaded if isinstance(loaded, dict) else {}
        return self.choices[machine]

    def _save(self, machine: str) -> None:
        """Write the choices; a folder that cannot be written to only means that the next process measures again."""
        path = self._path(machine)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                json.dump(self.choices[machine], file, indent=1)
            os.replace(file.name, path)
        except OSError:
            pass


def describe_device(device: torch.device) -> str:
    """Name the device and the versions on which the fastest kernel depends, as a file name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    version = triton.__version__ if INSTALLED else "none"
    return f"{name}, torch {torch.__version__}, triton {version}".replace("/", "-")


def measure_on_gpu(candidates: Candidates, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each candidate on the GPU; those that fail are left out."""
    if device.type != "cuda":  # interpreted kernels: any time would be meaningless
        assert is_interpreted()
        return dict.fromkeys(candidates, 0.0)
    try:
        flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    except torch.OutOfMemoryError:
        flushed = torch.empty(1, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    for name, run in candidates.items():
        try:
            run()  # compiles
            torch.cuda.synchronize(device)
            events[name] = []
        except Exception:  # a kernel that refuses these shapes, or needs more of a multiprocessor than it has
            continue
    for _ in range(ROUNDS):
        for name, pairs in events.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            torch.cuda._sleep(BUSY_CYCLES)
            begin.record()
            candidates[name]()
            end.record()
            pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return {name: median(begin.elapsed_time(end) for begin, end in pairs) for name, pairs in events.items()}


def length_class(length: int) -> int:
    """Round a number of tokens up to a power of two, or the middle between two: shapes with one choice."""
    power = 1 << max(0, length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


#: The choices of this process.
FASTEST = FastestChoice()
