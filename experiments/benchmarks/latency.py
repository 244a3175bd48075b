"""``experiment=latency``: time to first and next token, of attention, a layer, the model and the engine (Figure 12)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median
from typing import Any, Literal

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from chai.methods import baseline
from chai.patching.model_info import UncountedError
from experiments.benchmarks import harness
from experiments.benchmarks.baselines import Implementation, attention_baselines, forget_last_token, model_baselines
from experiments.benchmarks.engines import check_engine, engine_times
from experiments.benchmarks.harness import BenchmarkContext, BenchmarkOptions, Times
from experiments.benchmarks.roofline import headline, required_work, summarize
from experiments.config.schema import ConfigError
from experiments.runs.experiment import require_minimum
from experiments.runs.folder import RunError
from experiments.system.console import log_info
from experiments.tables.benchmarks import CONTROL, show_latency

Part = Literal["attention", "layer", "model", "engine"]
Phase = Literal["prefill", "decode"]


@dataclass
class Options(BenchmarkOptions):
    """``experiment.*``: see conf/experiment/latency.yaml."""

    parts: list[Part] = field(default_factory=lambda: ["attention", "layer", "model"])
    phases: list[Phase] = field(default_factory=lambda: ["prefill", "decode"])
    clusters: list[int] | None = None
    rounds: int = 9  # at least 9, or tables and figures mark it

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("parts", "phases"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; valid: one or more")
        require_minimum(self, rounds=1)
        if self.clusters is not None and min(self.clusters, default=0) < 1:
            raise ValueError(f"clusters is {self.clusters}; valid: a list of numbers of 1 or more")

    def check(self, num_heads: int) -> None:
        """Refuse more clusters than heads."""
        if self.clusters and max(self.clusters) > num_heads:
            raise ConfigError(f"experiment.clusters has {max(self.clusters)}; the model has {num_heads} heads")


Context = BenchmarkContext[Options]


def run(config: DictConfig) -> int:
    """Measure, unless the run is complete; return the exit code."""
    return harness.run_benchmark(config, Options, measure, show_latency)


def measure(context: Context) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure all parts, phases and lengths."""
    model, method, options = context.model, context.method, context.options
    peak = harness.machine_peak(model.device, model.dtype)
    num_heads = model.config.get_text_config().num_attention_heads
    counts = method.benchmark_counts(model.config, options.clusters)
    single = one_layer(model) if "layer" in options.parts else None
    # Of each part: cluster counts, and the function that times it.
    parts = {
        "attention": (counts, partial(attention_times, context)),
        "layer": (counts, partial(model_times, context, single)),
        "model": ([None], partial(model_times, context, model)),
        "engine": ([None], partial(in_engine, context)),
    }
    if "engine" in options.parts:
        check_engine(method, max(context.lengths), model)
    if "attention" in options.parts:
        try:
            method.layer_shape(model)
        except UncountedError as error:
            if options.parts == ["attention"]:
                raise RunError(f"{error}; valid: experiment.parts=[layer,model]") from None
            log_info(f"attention alone is not measured: {error}")
            del parts["attention"]
    rows: list[dict[str, Any]] = []
    for phase, length, part in itertools.product(options.phases, context.lengths, parts):
        if part in options.parts:
            required = partial(required_work, method, model, options.rows, part, phase, length)
            part_counts, time_part = parts[part]
            for k in part_counts:
                case = {"part": part, "phase": phase, "length": length, "k": k}
                rows += summarize(case, time_part(phase, length, k), context.name, required, peak, num_heads)
    frame = pd.DataFrame(rows).astype({"k": "Int64"})
    return frame, {"metrics": headline(frame), "membership": clustering_times(context), "peak": peak}


def one_layer(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same shape with a single layer of random weights: its decoder is that layer."""
    config = copy.deepcopy(model.config)
    sizes = config.get_text_config()
    sizes.num_hidden_layers = 1
    sizes.vocab_size = min(sizes.vocab_size, 1024)  # the embeddings are not measured
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(sizes, name, None):
            setattr(sizes, name, getattr(sizes, name)[:1])
    with torch.device(model.device):
        return AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()


def implementations(
    stack: ExitStack, context: Context, model: PreTrainedModel, phase: Phase, length: int, k: int | None
) -> dict[str, Implementation]:
    """Return the baselines and, unless it is one of them, the method and its control, applied until ``stack`` is left.

    The control is the same method with as many clusters as heads in every layer.
    """
    entries = model_baselines(model, phase, length)
    # A single layer has k clusters; a method without clusters does not run on it.
    method = context.method if k is None else context.method.with_num_clusters(k)
    if method is None or method == baseline():
        return entries
    methods = {context.name: method}
    num_heads = model.config.get_text_config().num_attention_heads
    control = context.method.with_num_clusters(num_heads)
    if control is not None and set(method.heads_kept(model.config)) != {num_heads}:
        methods[CONTROL] = control
    for name, applied in methods.items():
        patched = stack.enter_context(applied(harness.twin(model, "sdpa")))
        entries[name] = Implementation(patched, applied, partial(applied.new_cache, patched))
    return entries


def model_times(context: Context, model: PreTrainedModel, phase: Phase, length: int, k: int | None) -> Times:
    """Time prefill or a decode step at ``length`` tokens, of a model or of one decoder layer with ``k`` clusters."""
    options, timers, after = context.options, {}, {}
    settings = {"logits_to_keep": 1} if k is None else {}
    with ExitStack() as stack:
        for name, entry in implementations(stack, context, model, phase, length, k).items():
            module = entry.model if k is None else entry.model.get_decoder()
            if phase == "prefill":
                ids = harness.random_tokens(model, options.rows, length)
                timers[name] = partial(prefill, module, ids, entry.new_cache, **settings)
                continue
            cache = entry.new_cache()
            harness.fill_cache(entry.model, entry.method, cache, options.rows, length - 1)
            token = harness.random_tokens(model, options.rows, 1)
            timers[name] = partial(module, token, past_key_values=cache, use_cache=True)
            after[name] = partial(forget_last_token, cache)
        return harness.interleave(timers, options.rounds * (1 if phase == "prefill" else 3), model.device, after)


def in_engine(context: Context, phase: Phase, length: int, k: None) -> Times:
    """Time prefill or a decode step at ``length`` tokens in the engine."""
    return engine_times(context, phase, length, context.options.rounds * (1 if phase == "prefill" else 3))


def prefill(module: PreTrainedModel, ids: Tensor, new_cache: Callable[[], Cache], **settings: int) -> object:
    """Run a prompt on a new cache."""
    return module(ids, past_key_values=new_cache(), use_cache=True, **settings)


def attention_times(context: Context, phase: Phase, length: int, k: int) -> Times:
    """Time attention alone, from queries, cached keys and values to its output ``[B, T, H, D]``."""
    model, method, options = context.model, context.method, context.options
    device, dtype, shape = model.device, model.dtype, method.layer_shape(model)
    q_len = length if phase == "prefill" else 1

    def random(num_heads: int, tokens: int) -> Tensor:
        return torch.randn(options.rows, num_heads, tokens, shape.head_dim, device=device).to(dtype)

    query = random(shape.num_heads, q_len)
    key, value = random(shape.num_kv_heads, length), random(shape.num_kv_heads, length)
    timers = attention_baselines(query, key, value)
    counts = {context.name: k} | ({CONTROL: shape.num_heads} if k < shape.num_heads else {})
    for name, count in counts.items():
        timer = method.attention_timer(query, key, value, count, shape.head_dim**-0.5)
        if timer is not None:
            timers[name] = timer
    if device.type == "cuda":
        timers = {name: graphed(timer) for name, timer in timers.items()}
    return harness.interleave(timers, options.rounds * (1 if q_len > 1 else 5), device)


def graphed(timer: Callable[[], object]) -> Callable[[], object]:
    """Capture a timer as a CUDA graph, so that short kernels are not timed by their launches."""
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            timer()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what the stream has cached is no use to others
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        timer()
    return graph.replay


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def clustering_times(context: Context) -> dict[str, float] | None:
    """Return the milliseconds of clustering all layers, alone and with the pass over the warm-up tokens."""
    model, method, options = context.model, context.method, context.options
    cluster = method.clustering_timer(model, options.rows)
    if cluster is None:
        return None
    ids = harness.random_tokens(model, options.rows, method.warmup_tokens)
    with method(harness.twin(model, "sdpa")) as patched:

        def warm_up() -> object:
            return patched(ids, past_key_values=method.new_cache(patched), use_cache=True, logits_to_keep=1)

        times = harness.interleave({"decide": cluster, "first": warm_up}, options.rounds, model.device)
    return {"decide_ms": median(times["decide"]), "first_tokens_ms": median(times["first"])}
