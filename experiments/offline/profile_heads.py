"""``experiment=profile``: the offline phase, from a model and a corpus to counts and membership (paper, section 3)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from chai import elbow
from chai.devices import describe_devices, input_device
from chai.models import ModelError, load_config, load_model, load_tokenizer
from chai.observe import observed
from chai.profile import Profile, build_profile, model_shape
from chai.runtime import check_family
from chai.statistics import Features, Gathering, HeadStatistics, Samples, StatisticsError, gather
from experiments.config.schema import ConfigError
from experiments.config.validate import to_dataclass
from experiments.evaluation.accuracy import model_source
from experiments.offline.corpus import source, texts
from experiments.runs.code import versions
from experiments.runs.experiment import Ending, give_up, record
from experiments.runs.files import digest, write_atomically
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.identity import run_identity, settings_id
from experiments.runs.resolve import resolve_runs
from experiments.system.console import console, log_info
from experiments.system.device import device_name
from experiments.tables.head_profile import show_profile

STATISTICS = "statistics.safetensors"
CHECKPOINT = 30.0  # seconds between two of them
DECIDE = 5  # tokens after which CHAI decides (paper, section 3.3)
AFTERWARDS = ("combine", "rule", "tolerance", "saving", "error")  # options that need no other pass over the corpus


@dataclass
class Options:
    """``profile.*``: see conf/experiment/profile.yaml."""

    samples: int
    tokens: int
    features: Features
    combine: str
    rule: str
    tolerance: float
    saving: float
    error: float
    kept: int
    map_tokens: int
    history: int
    history_samples: int

    def __post_init__(self) -> None:
        choices = {
            "features": ("causal", "last_row"),
            "combine": ("per_sample", "concatenated", "averaged"),
            "rule": ("plateau", "knee", "saving", "error"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is '{getattr(self, name)}'; valid: {', '.join(valid)}")
        for name, least in {
            "samples": 1,
            "kept": 1,
            "map_tokens": 2,
            "history_samples": 1,
            "history": DECIDE + 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: {least} or more")
        if self.tokens < self.history:
            raise ValueError(f"tokens is {self.tokens}; valid: {self.history} (history) or more")
        for name, most in {"tolerance": 1.0, "saving": 0.5, "error": 1.0}.items():
            if not 0 < getattr(self, name) < most:
                raise ValueError(f"{name} is {getattr(self, name)}; valid: between 0 and {most:g}")
        if self.combine == "averaged" and self.features != "last_row":
            raise ValueError("combine=averaged needs features=last_row: causal matrices are too large to keep")


def run(config: DictConfig) -> int:
    """Make a profile, unless it is done; returns the exit code.

    Raises:
        ConfigError: options, or a model, that can't be profiled. Nothing is written then.
    """
    options = to_dataclass(Options, config.profile, "profile")
    (config,) = resolve_runs(config)
    folder = RunFolder(config)
    if folder.is_done and not config.force:
        log_info(f"done already: {folder.path} (force=true does it again)")
        show_profile(folder.path)
        return 0
    try:
        architecture = load_config(model_source(config))
    except ModelError as error:
        give_up([folder], str(error))
        return 1
    try:
        check_family(architecture)
        shape = model_shape(architecture)
        elbow.check_saving(options.saving if options.rule == "saving" else None, shape["key_heads"])
    except ValueError as error:
        raise ConfigError(f"profile: {error}") from None
    ending = record(folder, lambda: _work(config, folder, options, architecture), keep=(STATISTICS,))
    if ending is Ending.DONE:
        show_profile(folder.path)
    return ending.code


def _work(config: DictConfig, folder: RunFolder, options: Options, architecture: PreTrainedConfig) -> dict[str, Any]:
    """From the statistics to the profile, which is saved; returns the run's result."""
    began = time.perf_counter()
    statistics = _statistics(config, folder, options, architecture)
    about = {
        "model": {
            "name": config.model.name,
            "id": config.model.hub_id if config.model.path is None else None,
            "fingerprint": config.model.fingerprint,
            **model_shape(architecture),
        },
        "corpus": {
            "name": config.corpus.name,
            "source": source(config.corpus),
            "fingerprint": config.corpus.fingerprint,
            "samples": statistics.samples,
            "tokens": statistics.seen_tokens,
            "longest": statistics.longest,
        },
        "features": options.features,
        "rule": _rule(options),
        "versions": versions(),
    }
    profile = build_profile(statistics, choose(statistics, options, architecture), about, DECIDE)
    profile.save(folder.path, lambda path, content: write_atomically(path, lambda part: part.write_bytes(content)))
    return _result(config, folder, profile, statistics, time.perf_counter() - began)


def choose(statistics: HeadStatistics, options: Options, architecture: PreTrainedConfig) -> list[int]:
    """Clusters of each layer by the rule that was asked for."""
    error = statistics.errors(options.combine)
    if options.rule == "plateau":
        return elbow.plateau(error, options.tolerance)
    if options.rule == "knee":
        return elbow.knee(error)
    key_heads = model_shape(architecture)["key_heads"]
    if options.rule == "saving":
        return elbow.budget(error, key_heads, saving=options.saving)
    return elbow.budget(error, key_heads, share=options.error)


def _rule(options: Options) -> dict[str, Any]:
    parameter = "tolerance" if options.rule == "plateau" else options.rule
    chosen = {} if options.rule == "knee" else {parameter: getattr(options, parameter)}
    name = "budget" if options.rule in ("saving", "error") else options.rule
    return {"name": name, **chosen, "combine": options.combine}


def _statistics(
    config: DictConfig, folder: RunFolder, options: Options, architecture: PreTrainedConfig
) -> HeadStatistics:
    """All statistics: those of an earlier run that differs in its rule alone, or from a pass over the corpus."""
    wanted = Gathering(
        layers=architecture.num_hidden_layers,
        heads=architecture.num_attention_heads,
        features=options.features,
        tokens=min(options.tokens, architecture.max_position_embeddings),
        kept=options.kept,
        map_tokens=options.map_tokens,
        history=options.history,
        history_samples=options.history_samples,
    )
    identity = run_identity(config)
    identity["profile"] = {key: value for key, value in identity["profile"].items() if key not in AFTERWARDS}
    note = {"statistics": digest(identity)}
    own = folder.path / STATISTICS
    there = [] if config.force else [own, *sorted(folder.path.parent.glob(f"*/{STATISTICS}"))]
    begun = HeadStatistics(wanted)
    for path in there:
        try:
            found = HeadStatistics.load(path, wanted, note)
        except StatisticsError:
            continue
        if found.complete or path == own:  # another run's unfinished ones may be growing
            begun = found
            break
    if begun.complete:
        log_info(f"statistics of {begun.samples} samples are there already: only the rule is applied")
    else:
        _pass(config, folder, options, begun, note)
    write_atomically(own, lambda path: begun.save(path, note))
    return begun


def _pass(
    config: DictConfig, folder: RunFolder, options: Options, statistics: HeadStatistics, note: dict[str, Any]
) -> None:
    """The model over the corpus, from where ``statistics`` stand."""
    origin = model_source(config)
    model, tokenizer = load_model(origin), load_tokenizer(origin)
    log_info(f"profile of {config.model.name} on {config.corpus.name}: {options.samples} samples")
    if statistics.samples:
        log_info(f"going on after {statistics.samples} samples")
    process, began, saved = psutil.Process(), time.perf_counter(), time.perf_counter()
    before = highest = process.memory_info().rss
    columns = (
        TextColumn("samples"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=options.samples, completed=statistics.samples)
        for batch in _batches(config, options, statistics, tokenizer):
            layers = look(model, [ids for _, ids in batch], statistics.wanted)
            statistics.add(layers, [tokenizer.convert_ids_to_tokens(ids) for _, ids in batch])
            statistics.read = batch[-1][0]
            highest = max(highest, process.memory_info().rss)
            progress.update(bar, completed=statistics.samples)
            folder.progress(statistics.samples, options.samples)
            if time.perf_counter() - saved > CHECKPOINT:
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
        "seconds_pass": round(time.perf_counter() - began, 3),  # of the last start, if it was stopped
        "host_bytes": highest - before,
        "device": describe_devices(model),
        "device_name": device_name(input_device(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _batches(
    config: DictConfig, options: Options, statistics: HeadStatistics, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[tuple[int, list[int]]]]:
    """Token ids of the next samples, each with how many texts were read until then; short texts are passed over."""
    batch: list[tuple[int, list[int]]] = []
    missing = options.samples - statistics.samples
    for read, text in enumerate(texts(config.corpus, config.seed, statistics.read), statistics.read + 1):
        if missing <= 0:
            break
        ids = tokenizer(text)["input_ids"][: statistics.wanted.tokens]
        if len(ids) < options.history:
            continue
        batch.append((read, ids))
        missing -= 1
        if len(batch) == config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def look(model: PreTrainedModel, batch: list[list[int]], wanted: Gathering) -> list[Samples]:
    """What each layer's heads do in the texts of a batch, which are padded on the right, where no real token looks."""
    lengths = torch.tensor([len(row) for row in batch], device=input_device(model))
    longest = int(lengths.max())
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=input_device(model))
    found: list[Samples] = []

    def gather_layer(
        layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float, mask: torch.Tensor | None
    ) -> None:
        found.append(gather(query, key, scaling, mask, lengths.to(query.device), wanted))

    with observed(model, gather_layer):
        model.get_decoder()(ids, use_cache=False)
    return found


def _result(
    config: DictConfig, folder: RunFolder, profile: Profile, statistics: HeadStatistics, seconds: float
) -> dict[str, Any]:
    """``result.json``."""
    model, arrays = profile.about["model"], profile.arrays
    layers = range(model["layers"])
    chosen = sum(arrays["error"][layer, k - 1] for layer, k in zip(layers, profile.counts, strict=True))
    return {
        "experiment": config.experiment.name,
        "method": config.method.name,
        "model": config.model.name,
        "task": config.task.name,
        "layers": model["layers"],
        "heads": model["heads"],
        "key_heads": model["key_heads"],
        "heads_kept": profile.counts,
        "metrics": {
            "kv_saved": profile.about["saving"],
            "error": float(chosen / arrays["error"][:, 0].sum()),
            "agreement": float(arrays["agreement"][:, DECIDE - 1].mean()),
        },
        "n": statistics.samples,
        "stderr": {},
        "savings": {"kind": "none", "kv_bytes": 0, "kv_bytes_mha": 0, "heads_kept": profile.counts},
        "statistics_bytes": statistics.nbytes,
        "seconds": round(seconds, 3),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "settings_id": settings_id(config),
        "run_id": folder.id,
        "versions": versions(),
        **statistics.made,
    }
