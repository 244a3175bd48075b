"""Scoring with lm-evaluation-harness: its prompts, requests and metrics, on the KV cache of a method."""

from __future__ import annotations

import functools
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval.evaluator
import lm_eval.utils
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chai.methods.base import Method
from chai.patching.devices import input_device
from experiments.evaluation.batches import Batches
from experiments.evaluation.responses import Request, SavedResponses, batch_key, make_batches, text_key
from experiments.evaluation.samples import sample_rows, split_metrics
from experiments.evaluation.savings import cache_stats, mean_savings
from experiments.runs.folder import RunError
from experiments.system.distributed import ProcessGroup

#: With this variable set, lm-eval computes the bootstrap of a metric without a pool of processes.
ONE_PROCESS = "DISABLE_MULTIPROC"


class MethodLM(HFLM):
    """lm-eval's Hugging Face model, whose forward passes run on a cache of the applied method, which is then measured.

    ``progress`` is called with the number of scored requests of this process and their total. ``seed`` is that of
    sampled texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        batch_size: int | str,
        saved: SavedResponses | None = None,
        progress: Callable[[int, int], None] | None = None,
        group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        self.is_automatic = batch_size == "auto"
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1 if self.is_automatic else batch_size)
        self._device = input_device(model)  # HFLM takes model.device, which is meta where weights are offloaded
        self.method = method
        self.saved = saved
        self.progress = progress
        self.group = group or ProcessGroup()
        self.seed = seed
        self.cache_stats: list[dict[str, Any]] = []  # of each batch, of all processes
        self._batch_stats: list[dict[str, Any]] = []  # where the sizes of the batch's cache go
        self._context_lengths: dict[tuple[int, ...], int] = {}

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score the requests in lm-eval's own batches, this process its shard of them."""
        self._choose_batch_size([len(context) + len(continuation) for _, context, continuation in requests])
        return self._score(requests, make_batches(requests, override_bs or self.batch_size), disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in lm-eval's own windows and batches of them."""
        windows: list[Request] = []
        counts = []  # of the windows of each text
        for request in requests:
            cut = rolling_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length)
            windows += cut
            counts.append(len(cut))
        self._choose_batch_size([len(context) + len(continuation) for _, context, continuation in windows])
        positions = range(len(windows))
        batches = [list(positions[start : start + self.batch_size]) for start in positions[:: self.batch_size]]
        nats = iter(self._score(windows, batches, disable_tqdm=disable_tqdm))
        return [sum(value for value, _ in itertools.islice(nats, count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue the prompts in lm-eval's own batches, this process its shard of them."""
        settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self._choose_batch_size([n + own["max_gen_toks"] for n, own in zip(lengths, settings, strict=True)])
        # As in lm-eval: prompts with the same settings, the longest first.
        ordered = Collator(
            list(enumerate(requests)),
            sort_fn=lambda item: (-lengths[item[0]], item[1].args[0]),
            group_fn=lambda item: item[1].args[1],
            group_by="gen_kwargs",
        )
        positions = [[position for position, _ in batch] for batch in ordered.get_batched(n=self.batch_size)]
        # Sampled prompts may be repeated: the number tells their batches apart.
        batches = self._batches(
            positions, lambda number, batch: f"{number}-{text_key([requests[position].args for position in batch])}"
        )
        for batch in batches.missing("Running generate_until requests", disable_tqdm=disable_tqdm):
            self._batch_stats = batch.cache_stats
            if settings[batch.positions[0]]["do_sample"]:  # a resumed run draws the same numbers
                torch.manual_seed(zlib.crc32(f"{self.seed}-{batch.key}".encode()))
            chosen = [requests[position] for position in batch.positions]
            batch.responses = super().generate_until(chosen, disable_tqdm=True)
        return self._gather(batches)

    def _choose_batch_size(self, lengths: list[int]) -> None:
        """Set the batch size for rows of up to that many tokens, if it is automatic."""
        if self.is_automatic:
            size = auto_batch_size(self.model, min(max(lengths, default=1), self.max_length))
            self.batch_size_per_gpu = min(self.group.all_gather(size))

    def _score(
        self, requests: list[Request], positions: list[list[int]], *, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihoods of the requests, which are scored in these batches of their positions."""
        self._context_lengths = context_lengths(requests, self.max_length)
        batches = self._batches(positions, lambda _, batch: batch_key([requests[position] for position in batch]))
        for batch in batches.missing("Running loglikelihood requests", disable_tqdm=disable_tqdm):
            self._batch_stats = batch.cache_stats
            chosen = [requests[position] for position in batch.positions]
            batch.responses = super()._loglikelihood_tokens(chosen, disable_tqdm=True)
            for nats, _ in batch.responses:
                if not math.isfinite(nats):
                    raise RunError(
                        f"non-finite log-likelihood ({nats}): NaN/inf in the weights, or overflow in float16; "
                        "try model.dtype=bfloat16 or float32"
                    )
        return self._gather(batches)

    def _batches(self, positions: list[list[int]], key: Callable[[int, list[int]], str]) -> Batches:
        return Batches(positions, key, self.saved, self.group, self.progress)

    def _gather(self, batches: Batches) -> list[Any]:
        """Return the responses of all processes, and note the cache sizes."""
        responses, stats = batches.gather()
        self.cache_stats += stats
        return responses

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits ``[batch_size, kv_len, vocabulary]`` of token ids ``[batch_size, kv_len]``."""
        cache = self.method.new_cache(self.model)
        lengths = [self._context_lengths[_strip_padding(tokens)] for tokens in inps.tolist()]
        self.method.set_context_lengths(cache, torch.tensor(lengths))
        with torch.no_grad():
            logits = self.model(inps, past_key_values=cache, use_cache=True).logits
        self._batch_stats.append(cache_stats(cache, len(inps)))
        return logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Return the token ids ``[batch_size, up to max_length]`` of prompts, padded on the left, and what follows."""
        cache = self.method.new_cache(self.model)
        tokens = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        self._batch_stats.append(cache_stats(cache, len(context)))
        return tokens

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


def rolling_windows(tokens: list[int], prefix_token: int, max_length: int) -> list[Request]:
    """Cut a text into lm-eval's windows, in which each token is scored once; the token before them is their context."""
    windows = get_rolling_token_windows(tokens, prefix_token, max_seq_len=max_length, context_len=1)
    return [(None, *make_disjoint_window(window)) for window in windows]


def auto_batch_size(model: PreTrainedModel, length: int) -> int:
    """Return the largest power of two, up to 64, of rows of ``length`` tokens whose forward pass should fit in memory.

    Counted by arithmetic in place of trials, so that a run that is resumed has the same batches: the logits with
    lm-eval's log-softmax of them, the KV cache twice, and the activations of a layer, in half of the device's memory
    without the weights.
    """
    config, device = model.config.get_text_config(), input_device(model)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # other processes share it
    weights = sum(weight.nbytes for weight in model.parameters())
    size = model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    row = config.vocab_size * (size + 8)
    row += 4 * config.num_hidden_layers * config.hidden_size * size + 4 * (config.hidden_size + inner) * size
    rows = (memory - weights) // 2 // (length * row)
    return 2 ** min(max(int(rows), 1).bit_length() - 1, 6)


@contextmanager
def cached_templates() -> Iterator[None]:
    """Compile each of lm-eval's prompt templates once instead of for every item (half of a small model's time)."""
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # uncovers the method of the class


class RecordingManager(TaskManager):
    """lm-eval's task manager, which keeps the tasks that it has made."""

    def __init__(self) -> None:
        super().__init__(include_defaults=False)
        self.made: dict[str, Any] = {}

    def load(self, task_list: Any) -> Any:
        """Make the tasks."""
        loaded = super().load(task_list)
        self.made = loaded["tasks"]
        return loaded


@contextmanager
def without_environment() -> Iterator[None]:
    """Keep lm-eval from listing the machine's packages after a task, which takes a second and is not saved."""
    add_env_info = lm_eval.evaluator.add_env_info
    lm_eval.evaluator.add_env_info = lambda storage: None
    try:
        yield
    finally:
        lm_eval.evaluator.add_env_info = add_env_info


@contextmanager
def in_one_process() -> Iterator[None]:
    """Let lm-eval resample scores here, with the same numbers: its pool forks a process with threads, and may hang."""
    before = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ONE_PROCESS]
        else:
            os.environ[ONE_PROCESS] = before


def score(
    lm: MethodLM,
    spec: dict[str, Any],
    *,
    limit: float | None,
    num_fewshot: int | None,
    apply_chat_template: bool = False,
    columns: Sequence[str] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the first ``limit`` items of a task with the method of ``lm``; return fields of the result, and samples.

    The samples have ``columns`` of the items as well.
    """
    manager = RecordingManager()
    with cached_templates(), without_environment(), in_one_process(), lm.method(lm.model):
        output = simple_evaluate(
            model=lm,
            tasks=[spec],
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            log_samples=True,
        )
    name = spec["task"]
    task = manager.made[name]
    samples = sample_rows(output["samples"][name], task.aggregation(), columns)
    metrics, stderr = split_metrics(output["results"][name])
    output_type = task.get_config("output_type") or task.OUTPUT_TYPE
    return {"metrics": metrics, "stderr": stderr, "n": len(samples), "output_type": output_type}, samples
