"""Fit output projections to the clusters of a head profile, and save them beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chai.loading import load_model, load_tokenizer
from chai.offline.head_profile import HeadProfile
from chai.offline.refit import FITTED, RIDGE, fit_outputs, save_fitted
from chai.patching.model_info import num_kv_heads
from experiments.config.schema import ConfigError
from experiments.offline.corpus import long_texts
from experiments.offline.profile_options import WARMUP_TOKENS, Options
from experiments.offline.training_loop import progress_bar
from experiments.runs.experiment import Run
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError
from experiments.system.console import log_info


def fit_to_profile(run: Run[Options], profile: HeadProfile) -> dict[str, Any]:
    """Fit the output projections, save them; return what ``profile.json`` says about them."""
    options, config = run.options, run.config
    model, tokenizer = load_model(run.source), load_tokenizer(run.source)
    tokens = min(options.sensitivity_tokens, model.config.max_position_embeddings)
    aware = (profile.about.get("sensitivity") or {}).get("group_aware")
    kv_heads = num_kv_heads(run.architecture) if aware else None
    clusters = [profile.clusters(layer, k, options.metric, kv_heads) for layer, k in enumerate(profile.num_clusters)]
    log_info(f"output projections fitted to the clusters: {options.refit_texts} texts")
    seen = 0

    def advance(done: int) -> None:
        nonlocal seen
        seen = done
        progress.update(bar, completed=done)

    with progress_bar("texts") as progress:
        bar = progress.add_task("", total=options.refit_texts, scalars="")
        try:
            weights = fit_outputs(model, _batches(run, tokenizer, tokens), clusters, WARMUP_TOKENS, progress=advance)
        except ValueError as error:
            if not seen:
                name = config.corpus.name
                raise RunError(f"corpus {name} has no text of {tokens} tokens (profile.sensitivity_tokens)") from None
            raise ConfigError(f"profile.refit_texts: {error}") from None
    digests: list[str] = []
    write_atomically(run.folder.path / FITTED, lambda path: digests.append(save_fitted(path, weights)))
    return {
        "texts": seen, "tokens": tokens, "ridge": RIDGE, "exact_tokens": WARMUP_TOKENS, "metric": options.metric,
        "group_aware": bool(aware), "sha256": digests[0],
    }  # fmt: skip


def _batches(run: Run[Options], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[Tensor]:
    """Yield batches of the first long texts of the corpus, long ``[B, tokens]``."""
    config = run.config
    texts = long_texts(config.corpus, config.seed, 0, tokenizer, tokens)
    rows = (ids[:tokens] for _, ids in itertools.islice(texts, run.options.refit_texts))
    while batch := list(itertools.islice(rows, config.batch_size)):
        yield torch.tensor(batch)
