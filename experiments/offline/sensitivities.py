"""The sensitivity of each layer to its number of clusters: measured, saved as it grows, and turned into counts."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedConfig

from chai.clustering.num_clusters import allocate, check_saving
from chai.loading import load_model, load_tokenizer
from chai.offline.head_profile import static_maps
from chai.offline.head_statistics import HeadStatistics
from chai.offline.sensitivity import measure_sensitivity, measured_counts
from chai.patching.model_info import num_kv_heads
from experiments.offline.corpus import long_texts
from experiments.offline.profile_options import RULE_OPTIONS, WARMUP_TOKENS, Options
from experiments.offline.training_loop import progress_bar
from experiments.runs.experiment import Run
from experiments.runs.files import digest, write_atomically
from experiments.runs.folder import RunError
from experiments.runs.identity import run_identity
from experiments.system.console import log_info

SENSITIVITIES = "sensitivity.safetensors"
#: Options that the measured numbers depend on.
MEASURED = ("metric", "sensitivity_texts", "sensitivity_tokens")
#: Bytes of fp32 log-probabilities up to which texts share a pass.
LOGIT_BYTES = 1 << 29


@dataclass
class Sensitivity:
    """Measured sensitivities.

    Attributes:
        kl: ``[N, L, C]`` fp32, nats per token of each text, layer and number of clusters; NaN: not measured yet.
        counts: The C numbers of clusters.
        heads: Query heads of a layer.
        kv_heads: KV heads of a layer.
        group_aware: The clusters read as few KV heads as they can.
        seconds: Time of the measurements.
    """

    kl: np.ndarray
    counts: list[int]
    heads: int
    kv_heads: int
    group_aware: bool
    seconds: float = 0.0

    @property
    def losses(self) -> np.ndarray:
        """``[N, L, C + 1]``: ``kl``, and 0 where a layer keeps all heads."""
        return np.concatenate([self.kl, np.zeros_like(self.kl[..., :1])], -1)

    def rule(self, options: Options) -> Callable[[np.ndarray], np.ndarray]:
        """Return the rule as a function from losses ``[..., L, C + 1]`` to numbers of clusters ``[..., L]``."""
        counts, layers = np.array([*self.counts, self.heads]), self.kl.shape[1]
        read = -(-counts * self.kv_heads // self.heads)
        cost = np.tile(read if options.budget == "kv_bytes" else counts, (layers, 1))
        if options.budget == "kl":
            return lambda losses: counts[allocate(losses, cost, most_loss=options.kl)]
        if options.budget == "kv_bytes":
            most = layers * self.kv_heads * (1 - 2 * options.saving)
        else:
            assert options.heads is not None
            most = layers * options.heads
        return lambda losses: counts[allocate(losses, cost, most_cost=int(most + 1e-9))]

    def to_json(self) -> dict[str, Any]:
        """Return what is written to ``profile.json`` about the array ``sensitivity``."""
        texts = len(self.kl)
        return {
            "counts": self.counts, "texts": texts, "exact_tokens": WARMUP_TOKENS, "group_aware": self.group_aware,
        }  # fmt: skip


def check_budget(options: Options, architecture: PreTrainedConfig) -> None:
    """Refuse a budget that the model cannot meet (ValueError)."""
    heads = architecture.num_attention_heads
    kv_heads = num_kv_heads(architecture)
    least = (_counts(options, heads, kv_heads) or [heads])[0]
    if options.budget == "kv_bytes":
        check_saving(options.saving, kv_heads, -(-least * kv_heads // heads))
    if options.budget == "heads" and options.heads is not None and not least <= options.heads <= heads:
        raise ValueError(f"heads is {options.heads:g}; valid: {least} to {heads}, the mean of the layers")


def _is_group_aware(options: Options, heads: int, kv_heads: int) -> bool:
    """Whether representatives are to read as few KV heads as they can: else grouped queries save no bytes."""
    return options.budget == "kv_bytes" and kv_heads < heads


def _counts(options: Options, heads: int, kv_heads: int) -> list[int]:
    """Return the numbers of clusters to measure; none for a single head, or a single KV head that all read."""
    group = heads // kv_heads
    return list(range(group, heads, group)) if _is_group_aware(options, heads, kv_heads) else measured_counts(heads)


def measured_sensitivity(run: Run[Options], statistics: HeadStatistics) -> Sensitivity:
    """Return the sensitivities, from a run that differs in its budget alone, or measured now; resumes what it saved."""
    options, architecture = run.options, run.architecture
    heads, kv_heads = architecture.num_attention_heads, num_kv_heads(architecture)
    group_aware = _is_group_aware(options, heads, kv_heads)
    counts = _counts(options, heads, kv_heads)
    assert options.sensitivity_texts is not None
    shape = (options.sensitivity_texts, architecture.num_hidden_layers, len(counts))
    sensitivity = Sensitivity(np.full(shape, np.nan, np.float32), counts, heads, kv_heads, group_aware)
    if not counts:
        return sensitivity
    identity = run_identity(run.config)
    kept = {key: value for key, value in identity["profile"].items() if key not in (*RULE_OPTIONS, "metrics")}
    measured = {name: getattr(options, name) for name in MEASURED}
    note = digest(identity | {"profile": kept | measured | {"group_aware": group_aware}})
    path = run.folder.path / SENSITIVITIES
    candidates = [] if run.config.force else [path, *sorted(run.folder.path.parent.glob(f"*/{SENSITIVITIES}"))]
    for candidate in candidates:
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            found = _load(candidate, note, sensitivity)
            if candidate == path or not np.isnan(found.kl).any():
                sensitivity = found
                break
    if np.isnan(sensitivity.kl).any():
        _measure(run, statistics, sensitivity, note)
    if (wrong := np.isnan(sensitivity.kl).any((0, 2))).any():
        layer = int(wrong.argmax())
        raise RunError(f"the sensitivity of layer {layer} is not a number; try model.dtype=bfloat16 or float32")
    _save(path, sensitivity, note)
    return sensitivity


def _measure(run: Run[Options], statistics: HeadStatistics, sensitivity: Sensitivity, note: str) -> None:
    """Measure what is missing; saved after each layer."""
    options, path = run.options, run.folder.path / SENSITIVITIES
    model, tokenizer = load_model(run.source), load_tokenizer(run.source)
    corpus, seed = run.config.corpus, run.config.seed
    tokens = min(options.sensitivity_tokens, model.config.max_position_embeddings)
    # Texts after those of the statistics, which the clusters are made of.
    texts = long_texts(corpus, seed, statistics.read, tokenizer, tokens)
    rows = [ids[:tokens] for _, ids in itertools.islice(texts, len(sensitivity.kl))]
    if not rows:
        raise RunError(
            f"corpus {corpus.name} has no further text of {tokens} tokens after the {statistics.read} texts of the "
            "statistics; set a smaller profile.sensitivity_tokens or profile.samples"
        )
    if len(rows) < len(sensitivity.kl):
        log_info(f"only {len(rows)} further texts of {tokens} tokens (profile.sensitivity_tokens)")
        sensitivity.kl = sensitivity.kl[: len(rows)]
    kl = sensitivity.kl
    maps = static_maps(
        statistics, options.metric, sensitivity.counts, sensitivity.kv_heads if sensitivity.group_aware else None
    )
    size = max(1, min(run.config.batch_size, LOGIT_BYTES // (4 * tokens * model.config.get_text_config().vocab_size)))
    layers, batches = kl.shape[1], range(0, len(rows), size)
    log_info(f"sensitivity of {layers} layers to {len(sensitivity.counts)} numbers of clusters: {len(rows)} texts")
    began = time.perf_counter() - sensitivity.seconds
    with progress_bar("layers") as progress:
        bar = progress.add_task("", total=layers * len(batches), scalars="")
        for number, begin in enumerate(batches):
            part = slice(begin, begin + size)
            done = ~np.isnan(kl[part]).any((0, 2))
            if done.all():
                continue
            found = measure_sensitivity(
                model, torch.tensor(rows[part]), maps, WARMUP_TOKENS, skip=lambda layer, done=done: bool(done[layer])
            )
            for layer, values in found:
                kl[part, layer] = torch.stack([values[k] for k in sensitivity.counts], 1).numpy()
                sensitivity.seconds = time.perf_counter() - began
                _save(path, sensitivity, note)
                progress.update(bar, completed=number * layers + layer + 1)
                run.folder.progress(number * layers + layer + 1, layers * len(batches))


def _save(path: Path, sensitivity: Sensitivity, note: str) -> None:
    metadata = {"note": note, "seconds": json.dumps(sensitivity.seconds)}
    write_atomically(path, lambda part: save_file({"kl": sensitivity.kl}, part, metadata=metadata))


def _load(path: Path, note: str, empty: Sensitivity) -> Sensitivity:
    """Read what :func:`_save` wrote; a ValueError if it is of other settings."""
    with safe_open(path, "np") as file:
        saved = file.metadata() or {}
        if saved.get("note") != note:
            raise ValueError(f"{path} holds other sensitivities")
        return Sensitivity(
            file.get_tensor("kl"), empty.counts, empty.heads, empty.kv_heads, empty.group_aware,
            json.loads(saved["seconds"]),
        )  # fmt: skip
