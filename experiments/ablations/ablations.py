"""``experiment=ablations``: the choices that the paper leaves open, measured on the same texts.

Each choice is simulated by a pass over the texts (:mod:`experiments.ablations.mapped`) and compared with multi-head
attention: divergence of the next-token distribution, and loss, in nats per token. Only positions from ``first_scored``
on count, which no choice uses as warm-up tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai.loading import load_model, load_tokenizer
from chai.patching.devices import input_device
from chai.patching.model_info import check_family
from experiments.ablations.costs import output_costs
from experiments.ablations.measure import Reference, by_position, logits_of
from experiments.ablations.observed import OBSERVED, PROPERTIES, ObservedPass
from experiments.ablations.questions import EVERY_CORPUS, QUESTIONS, Choices, Scope
from experiments.ablations.rows import measured_rows
from experiments.ablations.saved import FILE, Saved
from experiments.ablations.settings import PAPER_TOKENS, Passes, Setting, StaticSource
from experiments.ablations.texts import Text, check_domains, further_corpora, measured_texts, offline_texts
from experiments.config.schema import ConfigError, CorpusConfig, unknown_name
from experiments.offline.corpus import describe_source
from experiments.runs.experiment import Run, require_minimum, run_single
from experiments.runs.files import read_json, write_atomically
from experiments.runs.folder import RunError
from experiments.runs.identity import settings_id
from experiments.runs.model import computed_on
from experiments.system.console import log_info
from experiments.tables.layout import make_table, print_table

COSTS = "costs.safetensors"
SAMPLES = "samples.parquet"
#: Bytes of fp32 logits up to which texts share a pass.
LOGIT_BYTES = 1 << 28


@dataclass
class Options:
    """``experiment.*``: see conf/experiment/ablations.yaml."""

    questions: list[str] | None
    texts: int
    tokens: int
    first_scored: int
    clusters: int | None
    samples: int
    sample_tokens: int
    domains: list[str]
    other_text: str | None

    def __post_init__(self) -> None:
        require_minimum(self, texts=1, first_scored=PAPER_TOKENS, samples=1, sample_tokens=2)
        if self.tokens < self.first_scored + 2:
            raise ValueError(f"tokens is {self.tokens}; valid: {self.first_scored + 2} (first_scored + 2) or more")
        for name in self.questions or ():
            if name not in QUESTIONS:
                raise ValueError(unknown_name("question", name, list(QUESTIONS)))
        check_domains(self.domains)

    @property
    def asked(self) -> list[str]:
        """The questions, in the order of :data:`QUESTIONS`."""
        return [name for name in QUESTIONS if self.questions is None or name in self.questions]


def run(config: DictConfig) -> int:
    """Measure, unless the run is complete; return the exit code."""

    def show(path: Path, options: Options) -> None:
        show_ablations(path)

    return run_single(config, Options, check=_check, work=_work, show=show, keep=(FILE, COSTS))


def _check(run: Run[Options]) -> None:
    """Refuse a model family that is not supported, texts beyond the model's positions, and a wrong k."""
    options = run.options
    try:
        check_family(run.architecture)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    positions = run.architecture.max_position_embeddings
    if options.tokens > positions:
        raise ConfigError(f"experiment.tokens is {options.tokens}; the model has {positions} positions")
    heads = run.architecture.num_attention_heads
    if not 1 <= _clusters(run) <= heads:
        raise ConfigError(f"experiment.clusters is {_clusters(run)}; valid: 1 to {heads}")


def _clusters(run: Run[Options]) -> int:
    """Return k of every layer: the option, or the model's if it is one number."""
    given = run.config.model.clusters if run.options.clusters is None else run.options.clusters
    if not isinstance(given, int):
        raise ConfigError("the model has no single number of clusters for all layers; set experiment.clusters=K")
    return given


def _work(run: Run[Options]) -> dict[str, Any]:
    """Measure all choices; return the run's part of ``result.json``."""
    began = time.perf_counter()
    config, options = run.config, run.options
    model, tokenizer = load_model(run.source), load_tokenizer(run.source)
    further = further_corpora(options.domains, options.other_text)
    further.pop(config.corpus.name, None)
    scope = Scope(
        paper=Setting(_clusters(run)), num_heads=model.config.num_attention_heads, first_scored=options.first_scored,
        samples=options.samples, corpora=(config.corpus.name, *further),
    )  # fmt: skip
    asked = {name: QUESTIONS[name](scope) for name in options.asked}
    own, read = measured_texts(config.corpus, config.seed, tokenizer, options.tokens, options.texts)
    if not own:
        raise RunError(f"corpus {config.corpus.name} has no text of {options.tokens} tokens (experiment.tokens)")
    texts = list(own)
    if set(EVERY_CORPUS) & set(asked):
        for corpus in further.values():
            found, _ = measured_texts(corpus, config.seed, tokenizer, options.tokens, options.texts)
            texts += found
    log_info(f"{len(asked)} questions on {len(own)} texts of {config.corpus.name}, {options.tokens} tokens each")
    # Offline passes for the static maps.
    wanted = {choice.static for choices in asked.values() for choice in choices.values() if choice.static is not None}
    corpora = {config.corpus.name: (config.corpus, read)} | {name: (corpus, 0) for name, corpus in further.items()}
    costs = _costs(run, model, tokenizer, wanted, corpora)
    asked = {name: _available(choices, costs) for name, choices in asked.items()}
    # Measure.
    saved = Saved(run.folder.path / FILE)
    _measure_all(run, Passes(model, costs), model, tokenizer, asked, texts, saved)
    frame = measured_rows(asked, texts, config.corpus.name, saved)
    write_atomically(run.folder.path / SAMPLES, lambda path: frame.to_parquet(path, index=False))
    paper = saved.values.get(scope.paper.key, {})
    divergence = [paper[text.name]["kl"] for text in own if text.name in paper]
    return {
        "metric": "kl",
        "metrics": {"kl": float(np.mean(divergence))} if divergence else {},
        "stderr": {},
        "n": len(own),
        "questions": list(asked),
        "corpus": describe_source(config.corpus),
        "further": {name: describe_source(corpus) for name, corpus in further.items()},
        "tokens": options.tokens,
        "first_scored": options.first_scored,
        "sample_tokens": options.sample_tokens,
        "clusters": _clusters(run),
        "heads": scope.num_heads,
        "properties": PROPERTIES,
        "seconds": round(time.perf_counter() - began, 3),
        "settings_id": settings_id(config),
        **computed_on(model),
    }


def _costs(
    run: Run[Options],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: set[StaticSource],
    corpora: dict[str, tuple[CorpusConfig, int]],
) -> dict[StaticSource, np.ndarray]:
    """Return the costs of the output of each offline pass; saved after each corpus.

    ``corpora`` has, with each corpus, the number of its texts to skip, which are measured.
    """
    options, path = run.options, run.folder.path / COSTS
    arrays = load_file(path) if path.is_file() else {}
    for name, (corpus, skip) in corpora.items():
        counts = sorted(count for source, count in wanted if source == name)
        if not counts or f"{name} done" in arrays:
            continue
        log_info(f"offline pass over {name}: {counts[-1]} texts of {options.sample_tokens} tokens")
        rows = offline_texts(corpus, run.config.seed, tokenizer, options.sample_tokens, skip)
        found = output_costs(model, rows, counts, partial(run.folder.progress, total=counts[-1]))
        for count in counts:
            if count not in found:
                log_info(f"{name} has no {count} further texts of {options.sample_tokens} tokens")
        arrays |= {f"{name} {count}": cost for count, cost in found.items()} | {f"{name} done": np.ones(1)}
        _save_costs(path, arrays)
    return {(source, count): arrays[f"{source} {count}"] for source, count in wanted if f"{source} {count}" in arrays}


def _save_costs(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_atomically(path, lambda part: save_file(arrays, part))


def _available(choices: Choices, costs: dict[StaticSource, np.ndarray]) -> Choices:
    """Leave out static maps from more texts than the corpus has."""
    return {name: choice for name, choice in choices.items() if choice.static is None or choice.static in costs}


def _measure_all(
    run: Run[Options],
    passes: Passes,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[str, Choices],
    texts: list[Text],
    saved: Saved,
) -> None:
    """Measure every choice on the texts of its question, a batch of texts at a time."""
    options, own = run.options, run.config.corpus.name
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, min(run.config.batch_size, LOGIT_BYTES // (4 * options.tokens * vocabulary)))
    batches = list(_batches(texts, size))
    for done, batch in enumerate(batches):
        names = [text.name for text in batch]
        settings = {
            setting.key: setting
            for question, choices in asked.items()
            for setting in choices.values()
            if batch[0].corpus == own or question in EVERY_CORPUS
        }
        left = [setting for key, setting in settings.items() if saved.missing(key, names)]
        if not left and not saved.missing(OBSERVED, names):
            continue
        ids = torch.tensor([text.ids for text in batch], device=input_device(model))
        observed = ObservedPass(_clusters(run))
        first = options.first_scored
        reference = Reference(logits_of(model, observed, ids, first)[:, :-1], ids[:, first + 1 :])
        summaries = observed.summary(reference.losses, tokenizer.batch_decode(ids), ids)
        saved.add(OBSERVED, dict(zip(names, summaries, strict=True)))
        for number, setting in enumerate(left):
            began = time.perf_counter()
            forward_pass = passes.build(setting)
            kl, changes = reference.compare(logits_of(model, forward_pass, ids, first)[:, :-1])
            seconds = (time.perf_counter() - began) / len(batch)
            columns = {"kl": kl.mean(1), "loss": changes.mean(1), "heads": forward_pass.mean_kept()}
            if "length" in asked:
                columns |= by_position(kl, first)
            saved.add(setting.key, {
                name: {column: float(values[row]) for column, values in columns.items()} | {"seconds": seconds}
                for row, name in enumerate(names)
            })  # fmt: skip
            run.folder.progress(done * len(left) + number + 1, len(batches) * len(left))
        log_info(f"{done + 1} of {len(batches)} batches of texts")


def _batches(texts: list[Text], size: int) -> Iterator[list[Text]]:
    """Yield up to ``size`` texts of one corpus at a time."""
    for corpus in dict.fromkeys(text.corpus for text in texts):
        own = [text for text in texts if text.corpus == corpus]
        for begin in range(0, len(own), size):
            yield own[begin : begin + size]


def show_ablations(folder: Path) -> None:
    """Print the mean of each choice."""
    result = read_json(folder / "result.json")
    if result is None:
        return
    frame = pd.read_parquet(folder / SAMPLES)
    means = frame.groupby(["question", "choice", "measure"], observed=True, sort=False)["value"].mean().unstack()
    table = make_table(f"Choices on {result['model']}", ["Question", "Choice"], ["KL", "Loss", "Heads", "Agreement"])
    for row in means.reset_index().to_dict("records"):
        cells = (row.get(name, np.nan) for name in ("kl", "loss", "heads", "agreement"))
        table.add_row(row["question"], row["choice"], *("" if pd.isna(value) else f"{value:.3f}" for value in cells))
    print_table(
        table, "KL: divergence from MHA in nats per token; loss: difference to MHA. Intervals: docs/ablations.md"
    )
