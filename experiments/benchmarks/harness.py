"""What the probes share: fair timing, caches filled to a length, the machine's own peak, and the run around it all."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel

from chai.cache import ClusteredCache, ClusteredLayer
from chai.cascade import CascadeCache
from chai.costs import layer_shape
from chai.devices import describe_devices, input_device
from chai.methods import load_method
from chai.methods.base import Method
from chai.models import ModelError, load_config, load_model
from experiments.config.schema import ConfigError
from experiments.config.validate import check_clusters, to_dataclass
from experiments.evaluation.accuracy import model_source
from experiments.runs.code import versions
from experiments.runs.experiment import Ending, give_up, record
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.identity import check_profile, settings_id
from experiments.runs.resolve import resolve_runs
from experiments.system.console import log_info
from experiments.system.device import device_name

OBSERVED = 4  # steps whose memory events are held at a time: torch's profiler fails on more of a large model
FIRST = 5  # tokens that really go through a model whose cache is then filled


@dataclass
class ProbeOptions:
    """``experiment.*`` that all probes have.

    Attributes:
        lengths: of the sequences, in tokens; ``None``: powers of two.
        rows: sequences in a batch.
    """

    lengths: list[int] | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}; valid: 1 or more")
        if self.lengths is not None and min(self.lengths, default=0) < 8:
            raise ValueError(f"lengths is {self.lengths}; valid: a list of numbers of 8 or more")

    def check(self, heads: int) -> None:
        """Refuse what a model with so many heads can't run with."""


P = TypeVar("P", bound=ProbeOptions)


@dataclass
class Subject:
    """What is probed: a model, a method and its name, sequence lengths; and where the numbers go."""

    model: PreTrainedModel
    name: str
    method: Method
    lengths: list[int]
    folder: RunFolder

    def write(self, rows: pd.DataFrame) -> None:
        """Save the measurements."""
        write_atomically(self.folder.path / "measurements.parquet", lambda path: rows.to_parquet(path, index=False))


def run_probe(
    config: DictConfig,
    options_type: type[P],
    measure: Callable[[Subject, P], dict[str, Any]],
    show: Callable[[Path], None],
) -> int:
    """A probe from its configuration to its table; returns the exit code.

    Args:
        config: as composed.
        options_type: of ``experiment.*``; has ``lengths`` and ``rows``.
        measure: does the work, writes its rows, returns what is particular in ``result.json``.
        show: prints the table of a run's folder.

    Raises:
        ConfigError: options, or a method, that the model can't run with. Nothing is written then.
    """
    (config,) = resolve_runs(config)
    check_clusters(config)
    check_profile(config)
    options = to_dataclass(options_type, config.experiment, "experiment")
    method = to_dataclass(load_method(config.method.name), config.method, "method")
    folder = RunFolder(config)
    if folder.is_done and not config.force:
        log_info(f"done already: {folder.path} (force=true does it again)")
        show(folder.path)
        return 0
    source = model_source(config)
    try:
        architecture = load_config(source)
    except ModelError as error:
        give_up([folder], str(error))
        return 1
    try:
        method.check(architecture)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None
    options.check(architecture.num_attention_heads)
    positions = architecture.max_position_embeddings
    lengths = pick_lengths(options.lengths, positions, source.random_init)
    if source.random_init:  # positions that aren't trained anyway
        shape = {**source.architecture, "max_position_embeddings": max(positions, *lengths)}
        source = dataclasses.replace(source, architecture=shape)
    if note := method.note(architecture):
        log_info(note)
    log_info(f"{config.method.name} on {config.model.name}: {', '.join(map(str, lengths))} tokens")

    def work() -> dict[str, Any]:
        with torch.no_grad():
            model = load_model(source)
            if "," in (devices := describe_devices(model)) or model.device.type == "meta":
                raise RunError(
                    f"model.device_map={config.model.device_map} divides the model ({devices}, or offloaded weights): "
                    "a probe measures one device; give model.device_map=null and device=..."
                )
            try:
                method.check_weights(model)
            except ValueError as error:
                raise RunError(f"method: {error}") from None
            subject = Subject(model, config.method.name, method, lengths, folder)
            return common(config, subject, options) | measure(subject, options)

    ending = record(folder, work)
    if ending is Ending.DONE:
        show(folder.path)
    return ending.code


def common(config: DictConfig, subject: Subject, options: ProbeOptions) -> dict[str, Any]:
    """What the results of all probes say of themselves."""
    model = subject.model
    return {
        "experiment": config.experiment.name,
        "method": config.method.name,
        "model": config.model.name,
        "task": config.task.name,
        "layers": model.config.num_hidden_layers,
        "heads": model.config.num_attention_heads,
        "key_heads": layer_shape(model).key_heads,
        "heads_kept": subject.method.heads_kept(model.config),
        "savings": {"kind": subject.method.saving},
        "batch_size": options.rows,
        "seed": config.seed,
        "settings_id": settings_id(config),
        "run_id": subject.folder.id,
        "device": describe_devices(model),
        "device_name": device_name(input_device(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def pick_lengths(asked: list[int] | None, positions: int, random_init: bool) -> list[int]:
    """The sequence lengths to probe: those asked for, or powers of two up to 2,048 that the model has positions for.

    Raises:
        ConfigError: a length beyond the model's positions.
    """
    if asked is None:
        return [length for length in (128, 256, 512, 1024, 2048) if random_init or length <= positions] or [positions]
    beyond = [length for length in asked if length > positions]
    if beyond and not random_init:
        raise ConfigError(f"experiment.lengths has {beyond[0]}; the model has {positions} positions")
    return sorted(set(asked))


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs another and returns its milliseconds, from idle to idle device."""
    if device.type == "cuda":

        def on_gpu(work: Callable[[], object]) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            return begin.elapsed_time(end)

        return on_gpu

    def on_cpu(work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3

    return on_cpu


def interleave(
    works: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    after: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each work, round by round in turn (A B C, B C A, ...), after one discarded round.

    Args:
        works: what to time, by name.
        rounds: times of each.
        device: that it runs on.
        after: what to do, untimed, after a work, by its name.
    """
    timed = stopwatch(device)
    found: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            took = timed(works[name])
            if after and name in after:
                after[name]()
            if turn:
                found[name].append(took)
    return found


def machine_peak(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine reaches on its own: a large matrix product, and reading a large tensor."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    large = torch.randn(1 << (30 if device.type == "cuda" else 26), device=device)
    times = interleave({"product": lambda: left @ right, "read": lambda: large.sum()}, 5, device)
    return {
        "gflop_per_s": 2 * size**3 / min(times["product"]) / 1e6,
        "gb_per_s": large.nbytes / min(times["read"]) / 1e6,
    }


def twin(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """The same weights as another model object, with an attention implementation of its own."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    other.set_attn_implementation(implementation)
    return other


def random_tokens(model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids ``[rows, length]``; never zeros, whose attention would be like no text's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (rows, length), generator=generator)
    return ids.to(input_device(model))


def fill(model: PreTrainedModel, cache: Cache, rows: int, length: int) -> None:
    """Bring a cache to ``length`` tokens: the first through the model, so that memberships are real, then random ones.

    A token's time and memory don't depend on what the cache holds, and filling takes no prefill of the whole; but where
    the method chooses among all tokens of a context.
    """
    first = length if hasattr(cache, "contexts") else min(FIRST, length)
    model(random_tokens(model, rows, first), past_key_values=cache, use_cache=True)
    missing = length - cache.get_seq_length()
    if missing <= 0:
        return
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        new = [tensor.new_empty(*tensor.shape[:2], missing, tensor.shape[3]).normal_() for tensor in (keys, values)]
        layer.update(*new)


def formula_bytes(cache: Cache, heads: list[int], shape: Any, itemsize: int, rows: int) -> int:
    """What the cache must hold by arithmetic: in each layer the key heads that are read, and all values or as many.

    With grouped queries the membership says which key heads are read; without, there is one for each representative.
    Of a pruned context, each layer's share of the tokens, and keys and values of the heads that are left.
    """
    total = 0
    for index, (layer, k) in enumerate(zip(cache.layers, heads, strict=True)):
        kept = shape.kept_keys(k)
        if isinstance(cache, CascadeCache):
            context = math.ceil(cache.rule.tokens[index] * cache.split - 1e-9)
            both = 2 * (layer.left.stored.shape[1] if layer.left is not None else shape.key_heads)
            total += rows * (context + cache.get_seq_length() - cache.split) * shape.size * both * itemsize
            continue
        if isinstance(layer, ClusteredLayer) and shape.key_heads != shape.heads and isinstance(cache, ClusteredCache):
            clusters = cache.clusters(index)
            assert clusters is not None
            groups = clusters.representatives // (shape.heads // shape.key_heads)
            kept = max(len(set(row)) for row in groups.tolist())
        values = kept if isinstance(layer, ClusteredLayer) and layer.shares_values else shape.key_heads
        total += rows * cache.get_seq_length() * shape.size * (kept + values) * itemsize
    return total


def peak_memory(device: torch.device, prepare: Callable[[], object], step: Callable[[], object], steps: int) -> int:
    """The most bytes alive at once during some steps, what is left of ``prepare`` before them included.

    On the CPU from the allocator's own events, which count what is alive, not what the system has handed out. A few
    steps are observed at a time, for their events are many.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        prepare()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    alive, _ = _observed(prepare)
    most = alive
    for begin in range(0, steps, OBSERVED):

        def some(count: int = min(OBSERVED, steps - begin)) -> None:
            for _ in range(count):
                step()

        change, highest = _observed(some)
        most = max(most, alive + highest)
        alive += change
    return most


def _observed(work: Callable[[], object]) -> tuple[int, int]:
    """By how much the bytes alive change while ``work`` runs, and by how much they rise at most meanwhile."""
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    alive = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return alive, most


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Nothing that is written to the process's standard error shows: the profiler announces each start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
