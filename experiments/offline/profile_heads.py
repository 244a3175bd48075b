"""``experiment=profile``: make a head profile (cluster counts, static clusters) of a model and a corpus (Section 3)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import DictConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai.clustering.num_clusters import knee, plateau
from chai.loading import load_model, load_tokenizer
from chai.offline import head_statistics
from chai.offline.head_profile import build_profile, model_shape
from chai.offline.head_statistics import HeadStatistics, LayerSamples, StatisticsError, StatisticsOptions
from chai.offline.stability import Stability, measure_stability
from chai.patching.apply import AttentionInputs, capture
from chai.patching.devices import input_device
from chai.patching.model_info import check_family
from chai.patching.outputs import HeadOutputs
from experiments.config.schema import ConfigError
from experiments.offline.corpus import describe_source, is_shuffled, long_texts
from experiments.offline.profile_options import RULE_OPTIONS, WARMUP_TOKENS, Options
from experiments.offline.refits import fit_to_profile
from experiments.offline.sensitivities import SENSITIVITIES, Sensitivity, check_budget, measured_sensitivity
from experiments.offline.training_loop import progress_bar
from experiments.runs.code import versions
from experiments.runs.experiment import Run, run_single
from experiments.runs.files import digest, write_atomically
from experiments.runs.folder import RunError
from experiments.runs.identity import run_identity, settings_id
from experiments.runs.model import computed_on, loaded_architecture
from experiments.system.console import console, log_info
from experiments.tables.head_profile import show_head_profile

STATISTICS = "statistics.safetensors"
CHECKPOINT_SECONDS = 30.0
#: Up to this many heads, the products of the errors of all pairs of heads are kept (H^4 numbers for each layer).
JOINT_HEADS = 16


def run(config: DictConfig) -> int:
    """Make a head profile, unless it is complete; return the exit code."""

    def show(path: Path, options: Options) -> None:
        show_head_profile(path)

    return run_single(
        config, Options, check=_check, work=_work, show=show, section="profile", keep=(STATISTICS, SENSITIVITIES)
    )


def _check(run: Run[Options]) -> None:
    """Refuse a model family that is not supported, and a saving beyond what the model allows."""
    options = run.options
    try:
        check_family(run.architecture)
        if options.rule == "sensitivity":
            check_budget(options, run.architecture)
    except ValueError as error:
        raise ConfigError(f"profile: {error}") from None


def _work(run: Run[Options]) -> dict[str, Any]:
    """Make and save the head profile; return the run's part of ``result.json``."""
    began = time.perf_counter()
    config, options = run.config, run.options
    statistics = _statistics(run)
    sensitivity = measured_sensitivity(run, statistics) if options.sensitivity_texts else None
    stability = _stability(run, statistics, sensitivity)
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
            "name": options.rule,
            **rule_parameters(options),
            "combine": options.combine,
        },
        "rules": counts_of_every_rule(statistics, options, sensitivity),
        "sensitivity": None if sensitivity is None else sensitivity.to_json(),
        "stability": stability.to_json() if stability else None,
        "versions": versions(),
    }
    num_clusters = about["rules"][options.rule]
    further = {} if sensitivity is None else {"sensitivity": sensitivity.kl}
    profile = build_profile(statistics, num_clusters, about, WARMUP_TOKENS, further)
    if options.refit_texts is not None:
        profile.about["refit"] = fit_to_profile(run, profile)
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


def rule_parameters(options: Options) -> dict[str, Any]:
    """Return what the requested rule depends on, as it is written to ``profile.json``."""
    if options.rule == "plateau":
        return {"tolerance": options.tolerance}
    if options.rule == "sensitivity":
        amount = {"heads": options.heads, "kv_bytes": options.saving, "kl": options.kl}[options.budget]
        return {"budget": options.budget, "amount": amount, "metric": options.metric}
    return {}


def counts_of_every_rule(
    statistics: HeadStatistics, options: Options, sensitivity: Sensitivity | None
) -> dict[str, list[int]]:
    """Return the counts of each rule with the run's parameters; those by sensitivity if it was measured."""
    error = statistics.errors(options.combine)
    counts = {"plateau": plateau(error, options.tolerance).tolist(), "knee": knee(error).tolist()}
    if sensitivity is not None and options.rule == "sensitivity":
        counts["sensitivity"] = sensitivity.rule(options)(sensitivity.losses.mean(0)).tolist()
    return counts


def _stability(run: Run[Options], statistics: HeadStatistics, sensitivity: Sensitivity | None) -> Stability | None:
    """Measure how far the counts depend on the texts; say why if that cannot be known."""
    options, errors = run.options, statistics.sample_errors
    if options.rule == "sensitivity":
        assert sensitivity is not None
        return measure_stability(sensitivity.losses, sensitivity.rule(options), run.config.seed)
    if options.combine != "per_sample":
        log_info(f"no interval of the numbers of clusters: combine={options.combine} has no error of single texts")
    elif errors is None:
        log_info(
            "no interval of the numbers of clusters: the statistics are of an earlier version, without the errors of "
            "single texts (force=true gathers them again)"
        )
    else:
        tolerance = options.tolerance
        rule = knee if options.rule == "knee" else lambda error: plateau(error, tolerance)
        return measure_stability(errors, rule, run.config.seed)
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
        metrics=options.gathered,
        joint="output" in options.gathered and architecture.num_attention_heads <= JOINT_HEADS,
    )
    identity = run_identity(run.config)
    identity["profile"] = {
        key: value for key, value in identity["profile"].items() if key not in (*RULE_OPTIONS, "metrics")
    }
    if options.gathered:
        identity["profile"]["metrics"] = list(options.gathered)
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
    try:
        head_outputs = HeadOutputs(model) if "output" in options.gathered else None
    except ValueError as error:
        raise ConfigError(f"profile.metrics: {error}") from None
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
            texts = [ids for _, ids in batch]
            layers = look(model, texts, statistics.options, head_outputs, statistics.samples)
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
    config = run.config
    for read, ids in long_texts(config.corpus, config.seed, statistics.read, tokenizer, run.options.history):
        yield read, ids[: statistics.options.tokens]


@torch.inference_mode()
def look(
    model: PreTrainedModel,
    batch: list[list[int]],
    wanted: StatisticsOptions,
    head_outputs: HeadOutputs | None = None,
    seed: int = 0,
) -> list[LayerSamples]:
    """Return each layer's attention statistics of a batch of texts, padded on the right, where no real token looks.

    The seed is that of the random projections of this batch (:meth:`chai.patching.outputs.HeadOutputs.sketch`).
    """
    lengths = torch.tensor([len(row) for row in batch], device=input_device(model))
    ids = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(lengths.device)
    layers: list[LayerSamples] = []

    def gather_layer(inputs: AttentionInputs) -> None:
        outputs = sketch = None
        if head_outputs is not None:
            outputs = head_outputs([inputs.layer_idx], inputs.value[None])[0]
            sketch = head_outputs.sketch(inputs.layer_idx, inputs.value, seed) if wanted.joint else None
        layers.append(head_statistics.gather(
            inputs.query, inputs.key, inputs.scaling, inputs.mask, lengths.to(inputs.query.device), wanted,
            inputs.softcap, outputs, sketch,
        ))  # fmt: skip

    with capture(model, gather_layer):
        model.get_decoder()(ids, use_cache=False)
    return layers
