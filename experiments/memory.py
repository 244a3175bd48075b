"""``experiment=memory``: bytes of the K,V cache, and the peak while decoding, by sequence length (paper, Figure 11)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from transformers import Cache, PreTrainedModel

from chai.cache import ClusteredCache, cache_bytes
from chai.costs import layer_shape
from chai.methods import load_method
from chai.methods.base import Method
from chai.methods.mha import Mha
from chai.models import load_config, load_model
from experiments.accuracy import model_source
from experiments.config import ConfigError, to_dataclass
from experiments.console import say
from experiments.probe_tables import show_memory
from experiments.probes import (
    device_name,
    fill,
    formula_bytes,
    peak_memory,
    pick_lengths,
    prepare,
    random_tokens,
    record,
)
from experiments.runs import RunFolder, settings_id, versions, write_atomically


@dataclass
class Options:
    """``experiment.*``: see conf/experiment/memory.yaml."""

    lengths: list[int] | None = None
    steps: int = 512
    rows: int = 1
    reserve: bool = False

    def __post_init__(self) -> None:
        for name, least in {"steps": 0, "rows": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: {least} or more")
        if self.lengths is not None and min(self.lengths, default=0) < 8:
            raise ValueError(f"lengths is {self.lengths}; valid: a list of numbers of 8 or more")


def run(config: DictConfig) -> int:
    """Measure, unless it is done; returns the exit code.

    Raises:
        ConfigError: options, or a method, that the model can't run with.
    """
    config = prepare(config)
    options = to_dataclass(Options, config.experiment, "experiment")
    method = to_dataclass(load_method(config.method.name), config.method, "method")
    folder = RunFolder(config)
    if folder.is_done and not config.force:
        say(f"done already: {folder.path} (force=true does it again)")
        show_memory(folder.path)
        return 0
    source = model_source(config)
    architecture = load_config(source)
    try:
        method.check(architecture)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from None
    if note := method.note(architecture):
        say(note)
    positions = architecture.max_position_embeddings
    lengths = pick_lengths(options.lengths, positions, source.random_init)
    if source.random_init:  # positions that aren't trained anyway
        source = dataclasses.replace(
            source, architecture={**source.architecture, "max_position_embeddings": max(positions, *lengths)}
        )

    def work() -> dict[str, Any]:
        with torch.no_grad():
            return _measure(config, folder, load_model(source), method, options, lengths)

    code = record(folder, work)
    if code == 0:
        show_memory(folder.path)
    return code


def _measure(
    config: DictConfig, folder: RunFolder, model: PreTrainedModel, method: Method, options: Options, lengths: list[int]
) -> dict[str, Any]:
    say(f"{config.method.name} on {config.model.name}: lengths {lengths}, up to {options.steps} tokens decoded")
    methods = {"mha": Mha()} | {config.method.name: method}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rows = []
    for length in lengths:
        for name, own in methods.items():
            rows.append(
                {"method": name, "length": length, "weights_bytes": weights} | decode(model, own, length, options)
            )
    frame = pd.DataFrame(rows)
    write_atomically(folder.path / "measurements.parquet", lambda path: frame.to_parquet(path, index=False))
    longest = frame[frame.length == frame.length.max()].set_index("method")
    mine = longest.loc[config.method.name]
    return {
        "experiment": config.experiment.name,
        "method": config.method.name,
        "model": config.model.name,
        "task": config.task.name,
        "metrics": {
            "kv_bytes": int(mine.cache_bytes),
            "kv_bytes_mha": int(longest.loc["mha"].cache_bytes),
            "kv_saved": float(1 - mine.cache_bytes / longest.loc["mha"].cache_bytes),
            "peak_over_cache": float(mine.peak_bytes / mine.cache_bytes),
        },
        "savings": {"kind": method.saving},
        "layers": model.config.num_hidden_layers,
        "heads": model.config.num_attention_heads,
        "heads_kept": method.heads_kept(model.config),
        "batch_size": options.rows,
        "seed": config.seed,
        "settings_id": settings_id(config),
        "run_id": folder.id,
        "device": str(model.device),
        "device_name": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def decode(model: PreTrainedModel, method: Method, length: int, options: Options) -> dict[str, Any]:
    """Bring a cache to ``length`` tokens, the last ``steps`` of them by decoding under observation.

    Returns:
        columns of a row: live, allocated and arithmetical bytes of the cache, peak bytes, tokens decoded.
    """
    steps = min(options.steps, length - 8)
    token = random_tokens(model, options.rows, 1)

    def prepare() -> Cache:
        cache = method.new_cache(model, reserve=length if options.reserve else 0)
        fill(model, cache, options.rows, length - steps)
        return cache

    held: list[Cache] = []

    def work(cache: Cache) -> None:
        held.append(cache)
        for _ in range(steps):
            model(token, past_key_values=cache, use_cache=True)

    with method(model):
        peak = peak_memory(model.device, prepare, work)
    cache = held.pop()
    live = cache_bytes(cache)
    counts = method.heads_kept(model.config)
    return {
        "steps": steps,
        "cache_bytes": live,
        "allocated_bytes": cache.nbytes_allocated if isinstance(cache, ClusteredCache) else live,
        "formula_bytes": formula_bytes(cache, counts, layer_shape(model), model.dtype.itemsize, options.rows),
        "peak_bytes": peak,
    }
