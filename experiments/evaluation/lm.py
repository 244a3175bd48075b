"""Scoring with lm-evaluation-harness: its prompts, log-likelihoods and metrics; ours is only the cache it runs on."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import lm_eval.utils
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from chai.cache import cache_bytes
from chai.devices import input_device
from chai.methods.base import Method
from experiments.evaluation.responses import Answered, Answers, batch_key, batches
from experiments.runs.folder import RunError
from experiments.system.distributed import ALONE, Team


@dataclass
class KvLedger:
    """Bytes of the caches that the scored batches really held, summed from the live tensors."""

    sequences: int = 0
    held: int = 0
    held_mha: int = 0
    key_heads: list[list[int]] = field(default_factory=list)  # of each batch, for each layer

    def add(self, cache: Cache, sequences: int) -> None:
        """Note a batch's cache, just after its forward pass."""
        held = cache_bytes(cache)
        self.sequences += sequences
        self.held += held
        self.held_mha += getattr(cache, "nbytes_mha", held)  # the stock cache holds just that
        self.key_heads.append([layer.keys.shape[1] for layer in cache.layers])

    def extend(self, other: KvLedger) -> None:
        """Note all batches of another ledger."""
        self.sequences += other.sequences
        self.held += other.held
        self.held_mha += other.held_mha
        self.key_heads += other.key_heads

    def per_sequence(self) -> dict[str, Any]:
        """Mean bytes of a sequence, and the mean number of key heads in memory of each layer."""
        batches = len(self.key_heads)
        return {
            "kv_bytes": round(self.held / self.sequences),
            "kv_bytes_mha": round(self.held_mha / self.sequences),
            "key_heads_stored": [round(sum(layer) / batches, 2) for layer in zip(*self.key_heads, strict=True)],
        }


class MethodLM(HFLM):
    """lm-eval's own Hugging Face model; each forward pass runs on a cache of the method, which is then measured.

    Args:
        model: to score with, to which the method is applied.
        tokenizer: of the model.
        method: makes the caches.
        batch_size: rows of a forward pass.
        answers: where answered batches are saved, and those of an earlier start are found.
        progress: told how many requests of how many are answered, of those that this process has.
        team: the processes that share the requests.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        batch_size: int,
        answers: Answers | None = None,
        progress: Callable[[int, int], None] | None = None,
        team: Team = ALONE,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._device = input_device(model)  # HFLM takes model.device, where nothing can be sent if it is offloaded
        self.method = method
        self.answers = answers
        self.progress = progress
        self.team = team
        self.ledger = KvLedger()
        self.contexts: dict[tuple[int, ...], int] = {}

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Answer the requests in lm-eval's own batches, each by itself, so that it can be saved.

        Where the context of each request ends is noted, for methods to which that makes a difference.
        """
        self.contexts = {}
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
            length = max(len(tokens) - len(continuation) + 1, 1)
            # Requests of the same tokens share a row: nothing that is a continuation in one of them may be context.
            key = _without_padding(tokens)
            self.contexts[key] = min(length, self.contexts.get(key, length))
        parts = self.team.share(lambda: self._own_part(requests, override_bs or self.batch_size, disable_tqdm))
        self.ledger = KvLedger()
        found: dict[int, tuple[float, bool]] = {}
        for answers, held, _ in parts:
            found |= answers
            self.ledger.extend(KvLedger(**held))
        if self.answers is not None:
            self.answers.restored = sum(restored for _, _, restored in parts)
        return [found[position] for position in range(len(requests))]

    def _own_part(
        self, requests: list[Any], size: int, disable_tqdm: bool
    ) -> tuple[dict[int, tuple[float, bool]], dict[str, Any], int]:
        """The batches of this process: answers by their request's position, the ledger, how many were there already."""
        found: dict[int, tuple[float, bool]] = {}
        own = self.team.own(batches(requests, size))
        total = sum(map(len, own))
        disable = disable_tqdm or not self.team.leads
        with tqdm(total=total, desc="Running loglikelihood requests", disable=disable) as bar:
            for positions in own:
                answered = self._answer([requests[position] for position in positions])
                found.update(zip(positions, answered, strict=True))
                bar.update(len(positions))
                if self.progress is not None:
                    self.progress(bar.n, total)
        return found, asdict(self.ledger), self.answers.restored if self.answers is not None else 0

    def _answer(self, batch: list[Any]) -> list[tuple[float, bool]]:
        """Answers to one batch: those that were saved, or from a forward pass, and then they are saved."""
        key = batch_key(batch)
        saved = self.answers.find(key) if self.answers is not None else None
        if saved is not None:
            self.ledger.extend(KvLedger(**saved.held))
            return saved.answers
        began = time.perf_counter()
        total, self.ledger = self.ledger, KvLedger()
        answers = super()._loglikelihood_tokens(batch, disable_tqdm=True)
        part, self.ledger = self.ledger, total
        self.ledger.extend(part)
        broken = next((nats for nats, _ in answers if not math.isfinite(nats)), None)
        if broken is not None:
            raise RunError(
                f"a log-likelihood is no number ({broken}): the weights hold such, or the model overflows in this "
                "dtype; try model.dtype=bfloat16 or float32"
            )
        if self.answers is not None:
            self.answers.add(key, Answered(answers, asdict(part), time.perf_counter() - began))
        return answers

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        cache = self.method.new_cache(self.model)
        if hasattr(cache, "contexts"):
            cache.contexts = torch.tensor([self.contexts[_without_padding(row)] for row in inps.tolist()])
        with torch.no_grad():
            logits = self.model(inps, past_key_values=cache, use_cache=True).logits
        self.ledger.add(cache, len(inps))
        return logits


def _without_padding(tokens: list[int]) -> tuple[int, ...]:
    """Tokens without the zeros at their end: lm-eval pads with these."""
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])


@contextmanager
def cached_templates() -> Iterator[None]:
    """Compile each of lm-eval's prompt templates once instead of for every item (half of a small model's time)."""
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the class's own method shows again


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    task: dict[str, Any],
    *,
    batch_size: int,
    limit: int | None,
    num_fewshot: int,
    answers: Answers | None = None,
    progress: Callable[[int, int], None] | None = None,
    team: Team = ALONE,
) -> tuple[dict[str, Any], list[dict[str, Any]], KvLedger]:
    """One task under one method.

    Args:
        model: to score with.
        tokenizer: of the model.
        method: to apply to it.
        task: as lm-eval defines it.
        batch_size: rows of a forward pass.
        limit: score the first so many items only.
        num_fewshot: solved items in each prompt.
        answers: see :class:`MethodLM`.
        progress: see :class:`MethodLM`.
        team: see :class:`MethodLM`.

    Returns:
        metrics and standard errors as ``{"metrics", "stderr", "n"}``; one row for each item; the K,V ledger.

    Raises:
        RunError: log-likelihoods that are no numbers.
        OSError: answers can't be saved.
    """
    lm, name = MethodLM(model, tokenizer, method, batch_size, answers, progress, team), task["task"]
    with cached_templates(), method(model):
        output = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            num_fewshot=num_fewshot or None,
            log_samples=True,
        )
    samples = [sample_row(sample) for sample in output["samples"][name]]
    metrics, stderr = {}, {}
    for key, value in output["results"][name].items():
        metric, _, _ = key.partition(",")  # keys carry the name of a filter: "acc_norm,none"
        if not isinstance(value, (int, float)) or metric == "sample_len":
            continue
        if metric.endswith("_stderr"):
            stderr[metric.removesuffix("_stderr")] = value
        else:
            metrics[metric] = value
    return {"metrics": metrics, "stderr": stderr, "n": len(samples)}, samples, lm.ledger


def sample_row(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one item: enough to pair it with another method's, and to score it again."""
    answers = [response[0] for response in sample["resps"]]
    row = {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "target": str(sample["target"]),
        "loglikelihoods": [float(answer[0]) for answer in answers],
        "greedy": [bool(answer[1]) for answer in answers],
    }
    return row | {metric: float(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample}
