"""Scoring with lm-evaluation-harness: its prompts, log-likelihoods and metrics, on the KV cache of a method."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lm_eval.evaluator
import lm_eval.utils
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai.methods.base import Method
from chai.patching.devices import input_device
from experiments.evaluation.responses import BatchResponses, Request, SavedResponses, batch_key, make_batches
from experiments.evaluation.savings import cache_stats, mean_savings
from experiments.runs.folder import RunError
from experiments.system.distributed import ProcessGroup


class MethodLM(HFLM):
    """lm-eval's Hugging Face model, whose forward passes run on a cache of the applied method, which is then measured.

    ``progress`` is called with the number of scored requests of this process and their total.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        batch_size: int,
        saved: SavedResponses | None = None,
        progress: Callable[[int, int], None] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._device = input_device(model)  # HFLM takes model.device, which is meta where weights are offloaded
        self.method = method
        self.saved = saved
        self.progress = progress
        self.group = group or ProcessGroup()
        self.cache_stats: list[dict[str, Any]] = []  # of each batch
        self._context_lengths: dict[tuple[int, ...], int] = {}

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score the requests in lm-eval's own batches, this process its shard of them."""
        self._context_lengths = context_lengths(requests, self.max_length)
        batches = self.group.shard(make_batches(requests, override_bs or self.batch_size))
        responses: dict[int, tuple[float, bool]] = {}  # by the position of their request
        stats: list[dict[str, Any]] = []
        total = sum(map(len, batches))
        disable_tqdm = disable_tqdm or not self.group.is_main_process
        with tqdm(total=total, desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for positions in batches:
                batch = self._score_batch([requests[position] for position in positions])
                responses.update(zip(positions, batch.responses, strict=True))
                stats.append(batch.cache_stats)
                bar.update(len(positions))
                if self.progress is not None:
                    self.progress(bar.n, total)
        # Gather the shards of all processes.
        self.cache_stats, restored = [], 0
        for shard in self.group.all_gather((responses, stats, self.saved.restored if self.saved else 0)):
            responses |= shard[0]
            self.cache_stats += shard[1]
            restored += shard[2]
        if self.saved:
            self.saved.restored = restored
        return [responses[position] for position in range(len(requests))]

    def _score_batch(self, requests: list[Request]) -> BatchResponses:
        """Restore the responses of a batch, or score and save them."""
        key = batch_key(requests)
        batch = self.saved.find(key) if self.saved else None
        if batch is not None:
            return batch
        began = time.perf_counter()
        self.cache_stats = []
        responses = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        for nats, _ in responses:
            if not math.isfinite(nats):
                raise RunError(
                    f"non-finite log-likelihood ({nats}): NaN/inf in the weights, or overflow in float16; "
                    "try model.dtype=bfloat16 or float32"
                )
        (stats,) = self.cache_stats  # a batch is one forward pass
        batch = BatchResponses(responses, stats, time.perf_counter() - began)
        if self.saved:
            self.saved.add(key, batch)
        return batch

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits ``[batch_size, kv_len, vocabulary]`` of token ids ``[batch_size, kv_len]``."""
        cache = self.method.new_cache(self.model)
        lengths = [self._context_lengths[_strip_padding(tokens)] for tokens in inps.tolist()]
        self.method.set_context_lengths(cache, torch.tensor(lengths))
        with torch.no_grad():
            logits = self.model(inps, past_key_values=cache, use_cache=True).logits
        self.cache_stats.append(cache_stats(cache, len(inps)))
        return logits

    def savings(self) -> dict[str, Any]:
        """Return the mean live bytes of a sequence's cache, and each layer's mean number of stored KV heads."""
        return mean_savings(self.cache_stats)


def context_lengths(requests: list[Request], max_length: int) -> dict[tuple[int, ...], int]:
    """Return the context length of each input row, by the row's tokens without padding."""
    lengths: dict[tuple[int, ...], int] = {}
    for _, context, continuation in requests:
        # A row is cut to the model's length on the left, and lacks the last token, which is only predicted.
        tokens = (context + continuation)[-(max_length + 1) :][:-1]
        length = max(len(tokens) - len(continuation) + 1, 1)
        # Requests of the same tokens share a row: no continuation of any of them may count as context.
        key = _strip_padding(tokens)
        lengths[key] = min(length, lengths.get(key, length))
    return lengths


def _strip_padding(tokens: list[int]) -> tuple[int, ...]:
    """Return tokens without the zeros at their end, with which lm-eval pads."""
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
        del environment.from_string  # uncovers the method of the class


@contextmanager
def without_environment() -> Iterator[None]:
    """Keep lm-eval from listing the machine's packages after a task, which takes a second and is not saved."""
    add_env_info = lm_eval.evaluator.add_env_info
    lm_eval.evaluator.add_env_info = lambda storage: None
    try:
        yield
    finally:
        lm_eval.evaluator.add_env_info = add_env_info


def score(
    lm: MethodLM, task: dict[str, Any], *, limit: int | None, num_fewshot: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the first ``limit`` items of a task with the method of ``lm``; return fields of the result, and samples."""
    with cached_templates(), without_environment(), lm.method(lm.model):
        output = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            num_fewshot=num_fewshot or None,
            log_samples=True,
        )
    name = task["task"]
    samples = [sample_row(sample) for sample in output["samples"][name]]
    # The keys carry the name of a filter: "acc_norm,none".
    values = {key.partition(",")[0]: value for key, value in output["results"][name].items()}
    values = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "sample_len"}
    stderr = {key.removesuffix("_stderr"): value for key, value in values.items() if key.endswith("_stderr")}
    metrics = {key: value for key, value in values.items() if not key.endswith("_stderr")}
    return {"metrics": metrics, "stderr": stderr, "n": len(samples)}, samples


def sample_row(sample: dict[str, Any]) -> dict[str, Any]:
    """Return what is saved of an item: enough to pair it with another method's, and to score it again."""
    responses = [response[0] for response in sample["resps"]]
    row = {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "target": str(sample["target"]),
        "loglikelihoods": [float(nats) for nats, _ in responses],
        "greedy": [bool(greedy) for _, greedy in responses],
    }
    return row | {metric: float(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample}
