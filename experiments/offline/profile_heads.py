"""``experiment=profile``: make a head profile (cluster counts, static clusters) of a model and a corpus (Section 3)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import psutil
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai.clustering.num_clusters import budget, check_saving, knee, plateau
from chai.loading import load_model, load_tokenizer
from chai.offline import head_statistics
from chai.offline.head_profile import build_profile, model_shape
from chai.offline.head_statistics import Features, HeadStatistics, LayerSamples, StatisticsError, StatisticsOptions
from chai.offline.stability import Rule, Stability, measure_stability
from chai.patching.apply import capture
from chai.patching.devices import input_device
from chai.patching.model_info import check_family, num_kv_heads
from experiments.config.schema import ConfigError
from experiments.offline.corpus import describe_source, is_shuffled, read_texts
from experiments.offline.training_loop import progress_bar
from experiments.runs.code import versions
from experiments.runs.experiment import Run, require_minimum, run_single
from experiments.runs.files import digest, write_atomically
from experiments.runs.folder import RunError
from experiments.runs.identity import run_identity, settings_id
from experiments.runs.model import computed_on, loaded_architecture
from experiments.system.console import console, log_info
from experiments.tables.head_profile import show_head_profile

STATISTICS = "statistics.safetensors"
CHECKPOINT_SECONDS = 30.0
WARMUP_TOKENS = 5  # after which CHAI clusters (paper, section 3.3)
#: Options that are applied to the statistics: changing them needs no other pass over the corpus.
RULE_OPTIONS = ("combine", "rule", "tolerance", "saving", "error")
RuleName = Literal["plateau", "knee", "saving", "error"]


@dataclass
class Options:
    """``profile.*``: see conf/experiment/profile.yaml."""

    samples: int
    tokens: int
    features: Features
    combine: Literal["per_sample", "concatenated", "averaged"]
    rule: RuleName
    tolerance: float
    saving: float
    error: float
    kept: int
    map_tokens: int
    history: int
    history_samples: int

    def __post_init__(self) -> None:
        require_minimum(self, samples=1, kept=1, map_tokens=2, history_samples=1, history=WARMUP_TOKENS + 1)
        if self.tokens < self.history:
            raise ValueError(f"tokens is {self.tokens}; valid: {self.history} (history) or more")
        for name, maximum in {"tolerance": 1.0, "saving": 0.5, "error": 1.0}.items():
            if not 0 < getattr(self, name) < maximum:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: between 0 and {maximum:g}")
        if self.combine == "averaged" and self.features != "last_row":
            raise ValueError("combine=averaged needs features=last_row: causal matrices are too large to keep")


def run(config: DictConfig) -> int:
    """Make a head profile, unless it is complete; return the exit code."""

    def show(path: Path, options: Options) -> None:
        show_head_profile(path)

    return run_single(config, Options, check=_check, work=_work, show=show, section="profile", keep=(STATISTICS,))


def _check(run: Run[Options]) -> None:
    """Refuse a model family that is not supported, and a saving beyond what the model allows."""
    options = run.options
    try:
        check_family(run.architecture)
        check_saving(options.saving if options.rule == "saving" else None, num_kv_heads(run.architecture))
    except ValueError as error:
        raise ConfigError(f"profile: {error}") from None


def _work(run: Run[Options]) -> dict[str, Any]:
    """Make and save the head profile; return the run's part of ``result.json``."""
    began = time.perf_counter()
    config, options = run.config, run.options
    statistics = _statistics(run)
    stability = _stability(run, statistics)
    parameter = "tolerance" if options.rule == "plateau" else options.rule
    about = {
        "model": {
            "name": config.model.name,
            "id": config.model.hub_id if config.model.path is None else None,
            "fingerprint": config.model.fingerprint,
            **model_shape(run.architecture),
        },
        "corpus": {
            "name": config.corpus.name,
            "source": describe_source(config.corpus),
            "fingerprint": config.corpus.fingerprint,
            "samples": statistics.samples,
            "tokens": statistics.seen_tokens,
            "longest": statistics.longest,
            "seed": config.seed,
        },
        "features": options.features,
        "rule": {
            "name": "budget" if options.rule in ("saving", "error") else options.rule,
            **({} if options.rule == "knee" else {parameter: getattr(options, parameter)}),
            "combine": options.combine,
        },
        "rules": counts_of_every_rule(statistics, options, num_kv_heads(run.architecture)),
        "stability": stability.to_json() if stability else None,
        "versions": versions(),
    }
    num_clusters = about["rules"][options.rule]
    profile = build_profile(statistics, num_clusters, about, WARMUP_TOKENS)
    profile.save(run.folder.path, lambda path, content: write_atomically(path, lambda part: part.write_bytes(content)))
    error = profile.arrays["error"]
    remaining = sum(error[layer, k - 1] for layer, k in enumerate(profile.num_clusters))
    return {
        **{name: about["model"][name] for name in ("layers", "heads", "key_heads")},
        "heads_kept": profile.num_clusters,
        "architecture": loaded_architecture(run.architecture, config),
        "stability": about["stability"],
        "metrics": {
            "kv_saved": profile.about["saving"],
            "error": float(remaining / error[:, 0].sum()),
            "agreement": float(profile.arrays["agreement"][:, WARMUP_TOKENS - 1].mean()),
        },
        "n": statistics.samples,
        "stderr": {},
        "savings": {"kind": "none", "kv_bytes": 0, "kv_bytes_mha": 0, "heads_kept": profile.num_clusters},
        "statistics_bytes": statistics.nbytes,
        "seconds": round(time.perf_counter() - began, 3),
        "batch_size": config.batch_size,
        "settings_id": settings_id(config),
        **statistics.made,
    }


def make_rule(options: Options, num_kv_heads: int) -> Rule:
    """Return the requested rule as a function from errors ``[..., L, H]`` to counts ``[..., L]``."""

    def rule(error: np.ndarray) -> np.ndarray:
        if options.rule == "plateau":
            return plateau(error, options.tolerance)
        if options.rule == "knee":
            return knee(error)
        if options.rule == "saving":
            return budget(error, num_kv_heads, saving=options.saving)
        return budget(error, num_kv_heads, share=options.error)

    return rule


def counts_of_every_rule(statistics: HeadStatistics, options: Options, num_kv_heads: int) -> dict[str, list[int]]:
    """Return the counts of each rule with the run's parameters; without a saving that the model cannot reach."""
    error, counts = statistics.errors(options.combine), {}
    for name in get_args(RuleName):
        try:
            counts[name] = make_rule(replace(options, rule=name), num_kv_heads)(error).tolist()
        except ValueError:  # the requested rule itself has been checked before
            continue
    return counts


def _stability(run: Run[Options], statistics: HeadStatistics) -> Stability | None:
    """Measure how far the counts depend on the texts; say why if that cannot be known."""
    options, errors = run.options, statistics.sample_errors
    if options.combine != "per_sample":
        log_info(f"no interval of the numbers of clusters: combine={options.combine} has no error of single texts")
    elif errors is None:
        log_info(
            "no interval of the numbers of clusters: the statistics are of an earlier version, without the errors of "
            "single texts (force=true gathers them again)"
        )
    else:
        return measure_stability(errors, make_rule(options, num_kv_heads(run.architecture)), run.config.seed)
    return None


def _statistics(run: Run[Options]) -> HeadStatistics:
    """Return all statistics, from a run that differs in its rule alone or from a pass over the corpus."""
    options, architecture, folder = run.options, run.architecture, run.folder
    wanted = StatisticsOptions(
        layers=architecture.num_hidden_layers,
        heads=architecture.num_attention_heads,
        features=options.features,
        tokens=min(options.tokens, architecture.max_position_embeddings),
        saved_samples=options.kept,
        map_tokens=options.map_tokens,
        trace_tokens=options.history,
        trace_samples=options.history_samples,
    )
    identity = run_identity(run.config)
    identity["profile"] = {key: value for key, value in identity["profile"].items() if key not in RULE_OPTIONS}
    note = {"statistics": digest(identity)}
    if is_shuffled(run.config.corpus, run.config.seed):
        note["order"] = "shuffled"  # earlier versions read the first texts whatever the seed
    # Look for saved statistics: this run's, or those that another run has completed.
    path = folder.path / STATISTICS
    candidates = [] if run.config.force else [path, *sorted(folder.path.parent.glob(f"*/{STATISTICS}"))]
    statistics = HeadStatistics(wanted)
    for candidate in candidates:
        with suppress(StatisticsError):
            saved = HeadStatistics.load(candidate, wanted, note)
            if saved.complete or candidate == path:
                statistics = saved
                break
    if statistics.complete:
        log_info(f"reusing statistics of {statistics.samples} samples")
    else:
        _gather_statistics(run, statistics, note)
    write_atomically(path, lambda temporary: statistics.save(temporary, note))
    return statistics


def _gather_statistics(run: Run[Options], statistics: HeadStatistics, note: dict[str, Any]) -> None:
    """Run the model over the rest of the corpus, and add to the statistics."""
    config, options, folder = run.config, run.options, run.folder
    model, tokenizer = load_model(run.source), load_tokenizer(run.source)
    log_info(f"head profile of {config.model.name} on {config.corpus.name}: {options.samples} samples")
    if statistics.samples:
        log_info(f"resuming after {statistics.samples} samples")
    process = psutil.Process()
    before = peak = process.memory_info().rss
    began = saved = time.perf_counter()
    with progress_bar("samples") as progress:
        bar = progress.add_task("", total=options.samples, completed=statistics.samples, scalars="")
        samples = itertools.islice(_samples(run, statistics, tokenizer), options.samples - statistics.samples)
        while batch := list(itertools.islice(samples, config.batch_size)):
            layers = look(model, [ids for _, ids in batch], statistics.options)
            statistics.add(layers, [tokenizer.convert_ids_to_tokens(ids) for _, ids in batch])
            statistics.read = batch[-1][0]
            peak = max(peak, process.memory_info().rss)
            progress.update(bar, completed=statistics.samples)
            folder.progress(statistics.samples, options.samples)
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                write_atomically(folder.path / STATISTICS, lambda path: statistics.save(path, note))
                saved = time.perf_counter()
                if not console.is_terminal:  # a log file has no bar
                    log_info(f"{statistics.samples} of {options.samples} samples")
    statistics.complete = True
    if not statistics.samples:
        raise RunError(f"no text of corpus {config.corpus.name} has {options.history} tokens (profile.history)")
    if statistics.samples < options.samples:
        log_info(
            f"the corpus has only {statistics.samples} texts of {options.history} tokens (profile.history) or more"
        )
    statistics.made = {
        "seconds_pass": round(time.perf_counter() - began, 3),  # of the last attempt, if the pass was resumed
        "host_bytes": peak - before,
        **computed_on(model),
    }


def _samples(
    run: Run[Options], statistics: HeadStatistics, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of texts read so far and the token ids of each text that is not too short."""
    texts = read_texts(run.config.corpus, run.config.seed, statistics.read)
    for read, text in enumerate(texts, statistics.read + 1):
        ids = tokenizer(text)["input_ids"][: statistics.options.tokens]
        if len(ids) >= run.options.history:
            yield read, ids


@torch.inference_mode()
def look(model: PreTrainedModel, batch: list[list[int]], wanted: StatisticsOptions) -> list[LayerSamples]:
    """Return each layer's attention statistics of a batch of texts, padded on the right, where no real token looks."""
    lengths = torch.tensor([len(row) for row in batch], device=input_device(model))
    ids = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(lengths.device)
    layers: list[LayerSamples] = []

    def gather_layer(
        layer: int, query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, softcap: float | None
    ) -> None:
        layers.append(head_statistics.gather(query, key, scaling, mask, lengths.to(query.device), wanted, softcap))

    with capture(model, gather_layer):
        model.get_decoder()(ids, use_cache=False)
    return layers
