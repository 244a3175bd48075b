"""Shared by the benchmarks: the run around them, fair timing, filled caches, the machine's peak, peak memory."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel

from chai.cache import append_random
from chai.loading import load_model
from chai.methods.base import Method
from chai.patching.devices import describe_devices, input_device
from chai.patching.model_info import num_kv_heads
from experiments.config.remedies import with_remedy
from experiments.config.schema import ConfigError
from experiments.runs.experiment import Run, check_method, require_minimum, run_single
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError
from experiments.runs.identity import settings_id
from experiments.runs.model import computed_on, loaded_architecture
from experiments.system.console import log_info

Timers = dict[str, Callable[[], object]]  # by the name of what is timed
Times = dict[str, list[float]]  # milliseconds of each round
#: Steps profiled at a time: torch's profiler fails on the memory events of more steps of a large model.
PROFILED_STEPS = 4


@dataclass
class BenchmarkOptions:
    """``experiment.*`` of all benchmarks."""

    lengths: list[int] | None = None  # in tokens; None: powers of two
    rows: int = 1  # sequences in a batch

    def __post_init__(self) -> None:
        require_minimum(self, rows=1)
        if self.lengths is not None and min(self.lengths, default=0) < 8:
            raise ValueError(f"lengths is {self.lengths}; valid: a list of numbers of 8 or more")

    def check(self, num_heads: int) -> None:
        """Raise a ConfigError for options that do not suit a model with ``num_heads`` heads."""


OptionsT = TypeVar("OptionsT", bound=BenchmarkOptions)


@dataclass
class BenchmarkContext(Generic[OptionsT]):
    """A loaded model, and what to measure on it."""

    model: PreTrainedModel
    name: str  # of the method
    method: Method
    lengths: list[int]  # in tokens
    options: OptionsT


def run_benchmark(
    config: DictConfig,
    options_type: type[OptionsT],
    measure: Callable[[BenchmarkContext[OptionsT]], tuple[pd.DataFrame, dict[str, Any]]],
    show: Callable[[Path], None],
) -> int:
    """Run a benchmark, whose ``measure`` returns measurements and fields of ``result.json``; return the exit code."""

    def check(run: Run[OptionsT]) -> None:
        check_method(run.method, run.architecture)
        run.options.check(run.architecture.get_text_config().num_attention_heads)
        lengths = pick_lengths(run)
        log_info(f"{run.config.method.name} on {run.config.model.name}: {', '.join(map(str, lengths))} tokens")

    @torch.no_grad()
    def work(run: Run[OptionsT]) -> dict[str, Any]:
        lengths = pick_lengths(run)
        model = load_for_benchmark(run, max(lengths))
        with torch.cuda.device(model.device if model.device.type == "cuda" else -1):  # of CUDA events and graphs
            rows, fields = measure(BenchmarkContext(model, run.config.method.name, run.method, lengths, run.options))
        write_atomically(run.folder.path / "measurements.parquet", lambda path: rows.to_parquet(path, index=False))
        sizes = model.config.get_text_config()
        return {
            "layers": sizes.num_hidden_layers,
            "heads": sizes.num_attention_heads,
            "key_heads": num_kv_heads(sizes),
            "heads_kept": run.method.heads_kept(model.config),
            "architecture": loaded_architecture(model.config, run.config),
            "savings": {"kind": run.method.saving},
            "batch_size": run.options.rows,
            "settings_id": settings_id(run.config),
            **computed_on(model),
            **fields,
        }

    return run_single(config, options_type, check=check, work=work, show=lambda path, options: show(path))


def pick_lengths(run: Run[OptionsT]) -> list[int]:
    """Return the requested sequence lengths, or powers of two up to 2,048; a trained model limits both."""
    sizes, requested = run.architecture.get_text_config(), run.options.lengths
    positions = getattr(sizes, "max_position_embeddings", None)
    limit = None if run.source.random_init else positions  # None: such as relative positions, for any length
    if requested is None:
        return [length for length in (128, 256, 512, 1024, 2048) if limit is None or length <= limit] or [positions]
    if limit is not None and (too_long := [length for length in requested if length > limit]):
        raise ConfigError(f"experiment.lengths has {too_long[0]}; the model has {positions} positions")
    return sorted(set(requested))


def load_for_benchmark(run: Run[OptionsT], max_length: int) -> PreTrainedModel:
    """Load a model for the method on one device; random weights get positions for ``max_length`` tokens."""
    source = run.source
    if source.random_init:
        positions = max(getattr(run.architecture, "max_position_embeddings", 0), max_length)
        source = dataclasses.replace(source, architecture=source.architecture | {"max_position_embeddings": positions})
    model = load_model(source)
    if "," in (devices := describe_devices(model)) or model.device.type == "meta":
        raise RunError(
            f"model.device_map={run.config.model.device_map} divides the model ({devices}, or offloaded weights): "
            "a benchmark measures one device; set model.device_map=null and device=..."
        )
    try:
        run.method.check_weights(model)
    except ValueError as error:
        raise RunError(f"method: {with_remedy(error)}") from None
    return model


def elapsed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Run ``work`` and return its milliseconds until the device is idle.

    A GPU's cache is emptied first, for within a model the weights of other layers have passed through it. That keeps
    the GPU busy for some 60 microseconds, in which the first kernels are launched.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        _flushed(device).zero_()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end)
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


@cache
def _flushed(device: torch.device) -> Tensor:
    """Return a tensor that is larger than the cache of any GPU."""
    return torch.empty(1 << 28, dtype=torch.int8, device=device)


def interleave(timers: Timers, rounds: int, device: torch.device, after: Timers | None = None) -> Times:
    """Return the milliseconds of each timer, run in turn (A B C, B C A, ...), after one discarded round."""
    times: Times = {name: [] for name in timers}
    names = deque(timers)
    for _ in range(rounds + 1):
        for name in names:
            times[name].append(elapsed_ms(timers[name], device))
            if after and name in after:  # not timed
                after[name]()
        names.rotate(-1)
    return {name: elapsed[1:] for name, elapsed in times.items()}


def machine_peak(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the peak FLOP/s of a large matrix product, and the bandwidth of reading a large tensor."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    large = torch.randn(1 << (30 if device.type == "cuda" else 26), device=device)
    times = interleave({"product": lambda: left @ right, "read": lambda: large.sum()}, 5, device)
    return {
        "gflop_per_s": 2 * size**3 / min(times["product"]) / 1e6,
        "gb_per_s": large.nbytes / min(times["read"]) / 1e6,
    }


def twin(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Return another model object over the same weights, with its own attention implementation."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.set_attn_implementation(implementation)
    return other


def stock_attentions(model: PreTrainedModel) -> list[str]:
    """Return which of transformers' implementations of attention, ``eager`` and ``sdpa``, the model can run."""
    if getattr(model.config, "attn_logit_softcapping", None):
        return ["eager"]  # sdpa has no soft caps
    names = []
    for name in ("eager", "sdpa"):
        try:
            switched = twin(model, name).config._attn_implementation == name  # some models ignore the request
        except ValueError:  # others refuse it
            switched = False
        names += [name] if switched else []
    return names


def random_tokens(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    """Return random token ids ``[batch_size, length]``, never 0 (often padding or an unknown token)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (batch_size, length), generator=generator)
    return ids.to(input_device(model))


def fill_cache(model: PreTrainedModel, method: Method, cache: Cache, batch_size: int, kv_len: int) -> None:
    """Fill a cache with ``kv_len`` tokens: the first through the model, so that it is clustered, then random ones."""
    prefix = method.real_prefix(kv_len)
    model(random_tokens(model, batch_size, prefix), past_key_values=cache, use_cache=True)
    if (missing := kv_len - int(cache.get_seq_length())) > 0:
        append_random(cache, missing)


def peak_memory(device: torch.device, prepare: Callable[[], object], step: Callable[[], object], steps: int) -> int:
    """Return the most bytes alive at once during some steps, including what ``prepare`` leaves."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        prepare()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # On the CPU, use the allocator's own events: they count live bytes rather than those of the process.
    alive, _ = _profile_memory(prepare, 1)
    peak = alive
    for begin in range(0, steps, PROFILED_STEPS):
        change, rise = _profile_memory(step, min(PROFILED_STEPS, steps - begin))
        peak = max(peak, alive + rise)
        alive += change
    return peak


def _profile_memory(work: Callable[[], object], count: int) -> tuple[int, int]:
    """Return by how much ``count`` calls change the live bytes, and by how much these rise at most meanwhile."""
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(count):
            work()
    alive = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return alive, peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard the process's standard error: the profiler announces each start and stop there."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)
