"""``experiment=perplexity``: negative log-likelihood of a corpus under a method, by document.

The tokens of a document are cut into windows. Each window is one forward pass on a cache of the method, and each token
of it that no window before has scored is scored, given the tokens before it in the window. The first token of a window
has none before it, so it is scored only where special tokens precede it, or in a later part of an overlapping window.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as functional
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai.loading import load_model, load_tokenizer
from chai.methods.base import Method
from chai.patching.devices import input_device
from experiments.config.remedies import with_remedy
from experiments.config.schema import ConfigError, CorpusConfig
from experiments.evaluation.responses import FILE, BatchResponses, SavedResponses, batch_key
from experiments.evaluation.resume import open_responses
from experiments.evaluation.savings import cache_stats, count_flops, mean_savings
from experiments.offline.corpus import describe_source, read_texts
from experiments.runs.experiment import Run, check_method, require_minimum, run_single
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError
from experiments.runs.identity import settings_id
from experiments.runs.model import computed_on
from experiments.system.console import log_info
from experiments.system.distributed import ProcessGroup
from experiments.tables.perplexity import show_perplexity

#: Between the texts of a corpus that is one document, as is usual for WikiText.
SEPARATOR = "\n\n"
#: More than any text has in the mean.
CHARACTERS_PER_TOKEN = 32
#: Bytes of fp32 logits up to which windows share a forward pass.
LOGIT_BYTES = 1 << 30


@dataclass
class Options:
    """``experiment.*``: see conf/experiment/perplexity.yaml."""

    window: int
    stride: int | None
    tokens: int | None
    document_tokens: int | None
    special_tokens: bool

    def __post_init__(self) -> None:
        require_minimum(self, window=2)
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise ValueError(f"stride is {self.stride}; valid: 1 to {self.window} (the window), or null")
        for name in ("tokens", "document_tokens"):
            if getattr(self, name) is not None:
                require_minimum(self, **{name: 2})


@dataclass
class Document:
    """A tokenized text.

    Attributes:
        ids: Tokens, without special ones.
        byte_ends: Long ``[len(ids)]``, where each token ends in the text's UTF-8; ``None`` if the tokenizer has no
            offsets.
    """

    ids: list[int]
    byte_ends: np.ndarray | None


@dataclass
class Window:
    """One forward pass: the tokens from position ``first`` on are scored."""

    document: int
    tokens: list[int]
    first: int
    bytes: int  # of the scored tokens' text


def run(config: DictConfig) -> int:
    """Measure, unless the run is complete; return the exit code."""

    def show(path: Path, options: Options) -> None:
        show_perplexity([path], Path(config.results_dir))

    return run_single(config, Options, check=_check, work=_work, show=show, until_done=(FILE,))


def _check(run: Run[Options]) -> None:
    """Refuse windows longer than the model's positions, and an endless corpus without a limit."""
    check_method(run.method, run.architecture)
    positions = getattr(run.architecture.get_text_config(), "max_position_embeddings", None)
    if positions is not None and run.options.window > positions:
        raise ConfigError(f"experiment.window is {run.options.window}; the model has {positions} positions")
    corpus, limit = run.config.corpus, run.config.limit
    is_endless = corpus.path is corpus.python is corpus.hub_id is None
    if is_endless and limit is None and (run.options.tokens is None or is_joined(corpus)):
        raise ConfigError(
            f"corpus {corpus.name} is endless: set {'' if is_joined(corpus) else 'experiment.tokens or '}limit"
        )
    if limit is not None and is_text_file(corpus) and is_joined(corpus):
        raise ConfigError("a text file is one document, which limit does not shorten; set experiment.tokens")
    log_info(f"{run.config.method.name} on {run.config.model.name}: perplexity of {corpus.name}")


def _work(run: Run[Options]) -> dict[str, Any]:
    """Score all windows; return the run's part of ``result.json``."""
    began = time.perf_counter()
    config, options, method = run.config, run.options, run.method
    model, tokenizer = load_model(run.source), load_tokenizer(run.source)
    try:
        method.check_weights(model)
    except ValueError as error:
        raise ConfigError(f"method: {with_remedy(error)}") from None
    texts = corpus_texts(config.corpus, config.seed, config.limit, options.tokens)
    documents = read_documents(texts, tokenizer, options.tokens, options.document_tokens)
    prefix = leading_tokens(tokenizer) if options.special_tokens else []
    if len(prefix) >= options.window:
        raise ConfigError(f"experiment.window is {options.window}; valid: more than the {len(prefix)} special tokens")
    windows = [
        window
        for index, document in enumerate(documents)
        for window in cut_windows(index, document, options.window, options.stride or options.window, prefix)
    ]
    if not windows:
        raise RunError(f"corpus {config.corpus.name} has no document of two tokens")
    vocabulary = model.config.get_text_config().vocab_size
    batch_size = min(config.batch_size, max(1, LOGIT_BYTES // (4 * options.window * vocabulary)))
    saved = open_responses(run.folder, model, ProcessGroup())
    with closing(saved):
        nats, stats = score_windows(model, method, windows, batch_size, saved, run.folder.progress)
    seconds = time.perf_counter() - began + saved.seconds
    frame = document_frame(documents, windows, nats)
    write_atomically(run.folder.path / "samples.parquet", lambda path: frame.to_parquet(path, index=False))
    metrics, stderr = corpus_metrics(frame)
    return {
        "metric": "perplexity",
        "metrics": metrics,
        "stderr": stderr,
        "n": int(frame.tokens.sum()),
        "documents": int(frame.doc_id.nunique()),
        "windows": len(windows),
        "corpus": describe_source(config.corpus),
        "savings": {"kind": method.saving, **mean_savings(stats), "heads_kept": method.heads_kept(model.config)},
        "flops": count_flops(method, model),
        "seconds": round(seconds, 3),
        "resumed": saved.restored,
        "settings_id": settings_id(config),
        **computed_on(model),
    }


def read_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, document_tokens: int | None
) -> list[Document]:
    """Return tokenized texts, up to ``document_tokens`` tokens of each and ``max_tokens`` of all (``None``: all)."""
    documents: list[Document] = []
    left = math.inf if max_tokens is None else max_tokens
    for text in texts:
        if left < 1:
            break
        document = tokenize(text, tokenizer)
        size = int(min(left, len(document.ids), math.inf if document_tokens is None else document_tokens))
        ends = document.byte_ends
        documents.append(Document(document.ids[:size], None if ends is None else ends[:size]))
        left -= size
    return documents


def corpus_texts(corpus: CorpusConfig, seed: int, limit: int | None, max_tokens: int | None) -> Iterator[str]:
    """Yield the first ``limit`` texts, or all of them as one, in their own order and enough for ``max_tokens``."""
    if not is_joined(corpus):
        yield from itertools.islice(read_texts(corpus, seed), limit)
    elif is_text_file(corpus):
        try:
            yield Path(corpus.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"cannot read {corpus.path}: {getattr(error, 'strerror', None) or error}") from None
    else:
        texts, size = [], 0
        for text in itertools.islice(read_texts(corpus, seed=0), limit):
            texts.append(text)
            size += len(text)
            if max_tokens is not None and size > CHARACTERS_PER_TOKEN * max_tokens:
                break
        yield SEPARATOR.join(texts)


def is_text_file(corpus: CorpusConfig) -> bool:
    """Whether the corpus is a local file of plain text."""
    return corpus.path is not None and Path(corpus.path).suffix != ".jsonl"


def is_joined(corpus: CorpusConfig) -> bool:
    """Whether all texts are one document: those of a text file, unless ``corpus.joined`` says otherwise."""
    return is_text_file(corpus) if corpus.joined is None else corpus.joined


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    special = set(tokenizer.all_special_ids)
    return list(itertools.takewhile(special.__contains__, tokenizer("a").input_ids))


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Tokenize a text without special tokens."""
    if not tokenizer.is_fast:
        return Document(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, None)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    sizes = np.fromiter((len(character.encode()) for character in text), np.int64, len(text))
    position = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.array([end for _, end in encoded.offset_mapping], np.int64)
    # A character that several tokens share counts for the first of them.
    return Document(encoded.input_ids, np.maximum.accumulate(position[ends]) if len(ends) else ends)


def cut_windows(index: int, document: Document, window: int, stride: int, prefix: Sequence[int]) -> Iterator[Window]:
    """Yield the windows of a document, each token scored once; ``prefix`` precedes the tokens of every window."""
    ids, scored = document.ids, 0
    size = window - len(prefix)
    for begin in range(0, len(ids), min(stride, size)):
        end = min(begin + size, len(ids))
        first = max(scored, begin if prefix else begin + 1)
        if first < end:
            yield Window(index, [*prefix, *ids[begin:end]], first - begin + len(prefix), _bytes(document, first, end))
        scored = end
        if end == len(ids):
            return


def _bytes(document: Document, first: int, end: int) -> int:
    """Return the bytes of the text of tokens ``first`` to ``end``; 0 if unknown."""
    if document.byte_ends is None:
        return 0
    return int(document.byte_ends[end - 1] - (document.byte_ends[first - 1] if first else 0))


def score_windows(
    model: PreTrainedModel,
    method: Method,
    windows: list[Window],
    batch_size: int,
    saved: SavedResponses,
    progress: Any,
) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the nats of each window's scored tokens, and the cache sizes of each batch."""
    nats: list[float] = []
    stats: list[dict[str, Any]] = []
    with method(model):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            contents = [(None, window.tokens[: window.first], window.tokens[window.first :]) for window in batch]
            key = f"{start}-{batch_key(contents)}"  # texts may repeat themselves
            result = saved.find(key)
            if result is None:
                began = time.perf_counter()
                values, sizes = score_batch(model, method, batch)
                if not all(map(math.isfinite, values)):
                    raise RunError(
                        "non-finite log-likelihood: NaN/inf in the weights, or overflow in float16; "
                        "try model.dtype=bfloat16 or float32"
                    )
                result = BatchResponses([(value, False) for value in values], sizes, time.perf_counter() - began)
                saved.add(key, result)
            nats += [value for value, _ in result.responses]
            stats.append(result.cache_stats)
            progress(len(nats), len(windows))
    return nats, stats


@torch.inference_mode()
def score_batch(model: PreTrainedModel, method: Method, batch: list[Window]) -> tuple[list[float], dict[str, Any]]:
    """Score windows in one forward pass, padded on the right, where no real token attends."""
    device = input_device(model)
    rows = [torch.tensor(window.tokens) for window in batch]
    ids = pad_sequence(rows, batch_first=True).to(device)
    cache = method.new_cache(model)
    # Tokens that are scored are no context: a method must not choose by them what it keeps.
    method.set_context_lengths(cache, torch.tensor([window.first for window in batch]))
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    values = []
    for window, row, targets in zip(batch, logits, ids, strict=True):
        scored = slice(window.first, len(window.tokens))
        predicted = row[window.first - 1 : len(window.tokens) - 1].float()
        values.append(float(functional.cross_entropy(predicted, targets[scored].to(row.device), reduction="sum")))
    return values, cache_stats(cache, len(batch))


def document_frame(documents: list[Document], windows: list[Window], nats: list[float]) -> pd.DataFrame:
    """Return a row for each document, or for each window of a corpus that is one document.

    Columns: ``doc_id``, ``doc_hash`` (of its tokens), ``tokens`` (scored), ``bytes`` (of their text), ``nats``.
    """
    rows = pd.DataFrame(
        {
            "doc_id": [window.document for window in windows] if len(documents) > 1 else range(len(windows)),
            "tokens": [len(window.tokens) - window.first for window in windows],
            "bytes": [window.bytes for window in windows],
            "nats": nats,
        }
    )
    rows["doc_hash"] = [hashlib.sha256(np.array(window.tokens, "<i8").tobytes()).hexdigest()[:16] for window in windows]
    frame = rows.groupby("doc_id", as_index=False).agg(
        {"doc_hash": lambda hashes: hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]}
        | {"tokens": "sum", "bytes": "sum", "nats": "sum"}
    )
    return frame


def corpus_metrics(frame: pd.DataFrame) -> tuple[dict[str, float], dict[str, float]]:
    """Return nats per token, perplexity and bits per byte of all tokens, and their standard errors.

    The documents are the sampled units, and the mean is a ratio of sums: its error is linearized, ``sum((nats_i - m
    tokens_i)^2) n / (n - 1) / (sum tokens)^2``.
    """
    total, tokens, size = (float(frame[name].sum()) for name in ("nats", "tokens", "bytes"))
    mean = total / tokens
    metrics = {"nats_per_token": mean, "perplexity": math.exp(mean)}
    stderr: dict[str, float] = {}
    n = len(frame)
    if n > 1:
        error = math.sqrt(float(((frame.nats - mean * frame.tokens) ** 2).sum()) * n / (n - 1)) / tokens
        stderr = {"nats_per_token": error, "perplexity": error * metrics["perplexity"]}
    if size:
        metrics["bits_per_byte"] = total / math.log(2) / size
    return metrics, stderr
