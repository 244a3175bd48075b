"""``experiment=latency``: time to first and next token, of attention, a layer and the model (paper, Figure 12).

The method and the baselines run in turn in one process on the same weights. Every time stands beside the best baseline
and beside what arithmetic allows (:mod:`chai.costs`).
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from chai.attention import causal_mask
from chai.clustering import HeadClusters
from chai.costs import LayerShape, layer_shape, model_decode_entries, model_prefill_flops
from chai.flops import method_flops
from chai.kernels import all_heads_attention, attend, shared_values_attention
from chai.kernels.plan import HeadPlan
from chai.methods import Mha
from chai.methods.base import ClusteredMethod, Method
from experiments.benchmarks.harness import (
    ProbeOptions,
    Subject,
    fill,
    interleave,
    machine_peak,
    random_tokens,
    run_probe,
    twin,
)
from experiments.config.schema import ConfigError
from experiments.tables.benchmarks import show_latency

PARTS, PHASES = ("attention", "layer", "model"), ("prefill", "decode")


@dataclass
class Options(ProbeOptions):
    """``experiment.*``: see conf/experiment/latency.yaml."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    phases: list[str] = field(default_factory=lambda: list(PHASES))
    clusters: list[int] | None = None
    rounds: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, valid in (("parts", PARTS), ("phases", PHASES)):
            wrong = [value for value in getattr(self, name) if value not in valid]
            if wrong or not getattr(self, name):
                raise ValueError(f"{name} has {wrong[0] if wrong else 'nothing'!r}; valid: {', '.join(valid)}")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; valid: 1 or more")
        if self.clusters is not None and min(self.clusters, default=0) < 1:
            raise ValueError(f"clusters is {self.clusters}; valid: a list of numbers of 1 or more")

    def check(self, heads: int) -> None:
        """Refuse more clusters than heads."""
        if self.clusters and max(self.clusters) > heads:
            raise ConfigError(f"experiment.clusters has {max(self.clusters)}; the model has {heads} heads")


def run(config: DictConfig) -> int:
    """Measure, unless it is done; returns the exit code."""
    return run_probe(config, Options, _measure, show_latency)


@dataclass
class Implementation:
    """A way of running the model: the model object and its empty caches."""

    model: PreTrainedModel
    new_cache: Callable[[], Any]


@dataclass
class Probe:
    """What is measured, on what, and how."""

    model: PreTrainedModel
    name: str  # the method's
    method: Method
    options: Options

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    @property
    def shares_values(self) -> bool:
        """Whether the method drops values as it drops keys."""
        return isinstance(self.method, ClusteredMethod) and self.method.shares_values

    @property
    def counts(self) -> list[int]:
        """Cluster counts for the attention and the layer alone."""
        if not isinstance(self.method, ClusteredMethod):
            return [self.model.config.num_attention_heads]
        return self.options.clusters or sorted(set(self.method.heads_kept(self.model.config)))

    def implementations(
        self, stack: ExitStack, model: PreTrainedModel, method: Method | None
    ) -> dict[str, Implementation]:
        """The baselines and the method, unless it is one of them, applied until ``stack`` is left."""
        found = {}
        for name in ("eager", "sdpa"):
            found[name] = Implementation(twin(model, name), DynamicCache)
        if method is not None and not isinstance(method, Mha):
            own = stack.enter_context(method(twin(model, "sdpa")))
            found[self.name] = Implementation(own, lambda: method.new_cache(own))
        return found

    def prefill(self, kinds: dict[str, Implementation], length: int, decoder_only: bool) -> dict[str, list[float]]:
        """Time to first token; the membership is part of it."""
        ids = random_tokens(self.model, self.options.rows, length)

        def work(kind: Implementation) -> Callable[[], object]:
            if decoder_only:
                return lambda: kind.model.get_decoder()(ids, past_key_values=kind.new_cache(), use_cache=True)
            return lambda: kind.model(ids, past_key_values=kind.new_cache(), use_cache=True, logits_to_keep=1)

        works = {name: work(kind) for name, kind in kinds.items()}
        return interleave(works, self.options.rounds, self.device)

    def decode(self, kinds: dict[str, Implementation], length: int, decoder_only: bool) -> dict[str, list[float]]:
        """Time to next token: the ``length``-th."""
        token = random_tokens(self.model, self.options.rows, 1)
        works, after = {}, {}
        for name, kind in kinds.items():
            cache = kind.new_cache()
            fill(kind.model, cache, self.options.rows, length - 1)
            called = kind.model.get_decoder() if decoder_only else kind.model
            works[name] = lambda called=called, cache=cache: called(token, past_key_values=cache, use_cache=True)
            after[name] = lambda cache=cache: cache.crop(-1)
        return interleave(works, self.options.rounds * 3, self.device, after)


def _measure(subject: Subject, options: Options) -> dict[str, Any]:
    """All parts, phases and lengths."""
    model = subject.model
    probe = Probe(model, subject.name, subject.method, options)
    peak, shape, rows = machine_peak(probe.device, model.dtype), layer_shape(model, probe.shares_values), []
    single = one_layer(model) if "layer" in options.parts else None
    for phase, length in itertools.product(options.phases, subject.lengths):
        works: list[tuple[str, int | None, dict[str, list[float]], Cost]] = []
        if "attention" in options.parts:
            cost = attention_cost(probe, shape, phase, length)
            works += [("attention", k, attention_times(probe, shape, phase, length, k), cost) for k in probe.counts]
        if single is not None:
            cost = layer_cost(probe, shape, phase, length)
            works += [("layer", k, model_times(probe, single, phase, length, k), cost) for k in probe.counts]
        if "model" in options.parts:
            times = model_times(probe, model, phase, length, None)
            works.append(("model", None, times, model_cost(probe, phase, length)))
        for part, k, times, cost in works:
            rows += summarize(part, phase, length, k, times, cost, peak, shape.heads)
    frame = pd.DataFrame(rows).astype({"k": "Int64"})
    subject.write(frame)
    return {"metrics": headline(frame), "membership": membership_times(probe), "peak": peak}


def one_layer(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same shape with a single layer and random weights: its decoder is that layer."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    config.vocab_size = min(config.vocab_size, 1024)  # the embeddings aren't measured
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device(model.device):
        return AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()


def model_times(probe: Probe, model: PreTrainedModel, phase: str, length: int, k: int | None) -> dict[str, list[float]]:
    """Times of the whole model, or of a layer with ``k`` clusters; a method without clusters isn't one of a layer."""
    method: Method | None = probe.method
    if k is not None:
        method = probe.method.with_count(k) if isinstance(probe.method, ClusteredMethod) else None
    with ExitStack() as stack:
        kinds = probe.implementations(stack, model, method)
        measure = probe.prefill if phase == "prefill" else probe.decode
        return measure(kinds, length, decoder_only=k is not None)


def balanced(rows: int, heads: int, k: int, device: torch.device) -> HeadClusters:
    """Clusters of sizes as equal as can be: for a given k the least favourable to grouping."""
    assignment = (torch.arange(heads, device=device) % k).expand(rows, -1)
    return HeadClusters(assignment, torch.arange(k, device=device).expand(rows, -1))


def attention_times(probe: Probe, shape: LayerShape, phase: str, length: int, k: int) -> dict[str, list[float]]:
    """Times of the attention alone, from queries, cached keys and values to its output ``[B, T, H, D]``."""
    rows, device, dtype = probe.options.rows, probe.device, probe.model.dtype
    count = length if phase == "prefill" else 1

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(rows, heads, tokens, shape.size, device=device).to(dtype)

    query, key, value = random(shape.heads, count), random(shape.key_heads, length), random(shape.key_heads, length)
    scaling = shape.size**-0.5
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = shape.heads // shape.key_heads, True
    module.eval()
    hidden = None
    if count > 1:
        seen = causal_mask(count, length, device)
        hidden = torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def stock() -> Tensor:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0]

    works: dict[str, Callable[[], object]] = {
        "eager": lambda: eager_attention_forward(module, query, key, value, hidden, scaling)[0],
        "sdpa": stock,
    }
    if device.type == "cuda" and importlib.util.find_spec("xformers") and shape.heads == shape.key_heads:
        works["xformers"] = _xformers(query, key, value, scaling)
    if isinstance(probe.method, ClusteredMethod):
        if k == shape.heads:
            works[probe.name] = lambda: all_heads_attention(query, key, value, scaling, None, stock)
        else:
            plan = HeadPlan.with_read_keys(balanced(rows, shape.heads, k, device), shape.key_heads)
            kept = key.gather(1, plan.kept[:, :, None, None].expand(-1, -1, length, shape.size))
            chosen = query[:, :k].contiguous()
            if probe.shares_values:
                read = value.gather(1, plan.kept[:, :, None, None].expand(-1, -1, length, shape.size))
                works[probe.name] = lambda: shared_values_attention(chosen, kept, read, plan, scaling, None)
            else:
                works[probe.name] = lambda: attend(chosen, kept, value, plan, scaling, None)
    if device.type == "cuda" and phase == "decode":
        works = {name: _graphed(work) for name, work in works.items()}
    return interleave(works, probe.options.rounds * (1 if count > 1 else 5), device)


def _xformers(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Callable[[], object]:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    inputs = [tensor.transpose(1, 2).contiguous() for tensor in (query, key, value)]
    bias = LowerTriangularMask() if query.shape[2] > 1 else None
    return lambda: memory_efficient_attention(*inputs, attn_bias=bias, scale=scaling)


def _graphed(work: Callable[[], object]) -> Callable[[], object]:
    """The same as a CUDA graph, so that a token's few short kernels aren't timed by their launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


Cost = Callable[[int | None], float]  # operations (prefill) or bytes (decode) for k; None: for the method's counts


def attention_cost(probe: Probe, shape: LayerShape, phase: str, length: int) -> Cost:
    """Of the attention alone, with k clusters."""
    rows, size = probe.options.rows, probe.model.dtype.itemsize
    if phase == "prefill":
        return lambda k: rows * shape.attention_flops(length, k or shape.heads)
    return lambda k: rows * size * shape.cache_entries(length, k or shape.heads)


def layer_cost(probe: Probe, shape: LayerShape, phase: str, length: int) -> Cost:
    """Of a layer with k clusters; the weights are read once for all rows."""
    rows, size = probe.options.rows, probe.model.dtype.itemsize
    if phase == "prefill":
        return lambda k: rows * shape.prefill_flops(length, k or shape.heads)
    return lambda k: size * (shape.weights(k or shape.heads) + rows * shape.cache_entries(length, k or shape.heads))


def model_cost(probe: Probe, phase: str, length: int) -> Cost:
    """Of the model: with all heads for k = H, under the method for ``None``.

    What a method without clusters must read for a token isn't known: NaN.
    """
    model, rows = probe.model, probe.options.rows

    def cost(k: int | None) -> float:
        config = model.config
        if k is None and not isinstance(probe.method, ClusteredMethod):
            return rows * method_flops(model, probe.method, length) if phase == "prefill" else math.nan
        counts = probe.method.heads_kept(config) if k is None else [k] * config.num_hidden_layers
        if phase == "prefill":
            return rows * model_prefill_flops(model, length, counts, probe.shares_values)
        once, whole = (model_decode_entries(model, tokens, counts, probe.shares_values) for tokens in (0, length))
        return model.dtype.itemsize * (once + rows * (whole - once))

    return cost


def summarize(
    part: str,
    phase: str,
    length: int,
    k: int | None,
    times: dict[str, list[float]],
    cost: Cost,
    peak: dict[str, float],
    heads: int,
) -> list[dict[str, Any]]:
    """One row for each implementation; see docs/results.md."""
    baselines = [name for name in times if name in ("eager", "sdpa", "xformers")]
    best = min(baselines, key=lambda name: median(times[name]))
    rows = []
    for name, taken in times.items():
        own = name not in baselines
        low, _, high = quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        ratios = [base / time for base, time in zip(times[best], taken, strict=True)]
        full, needed = cost(heads), cost(k if own else heads)
        unit, most = ("GFLOP/s", peak["gflop_per_s"]) if phase == "prefill" else ("GB/s", peak["gb_per_s"])
        rate = needed / median(taken) / 1e6
        rows.append(
            {
                "part": part,
                "phase": phase,
                "length": length,
                "k": k,
                "implementation": name,
                "baseline": not own,
                "ms": median(taken),
                "ms_p25": low,
                "ms_p75": high,
                "rounds": len(taken),
                "speedup": median(ratios),
                "best_baseline": best,
                "limit": full / needed,
                "of_limit": median(ratios) * needed / full,
                "rate": rate,
                "rate_unit": unit,
                "of_peak": rate / most,
            }
        )
    return rows


def membership_times(probe: Probe) -> dict[str, float] | None:
    """Milliseconds of deciding the memberships of all layers, alone and with the pass over the first tokens."""
    method, model = probe.method, probe.model
    if not isinstance(method, ClusteredMethod) or not method.first_tokens:
        return None
    shape, rows = layer_shape(model), probe.options.rows
    counts = method.heads_kept(model.config)
    layers = [index for index, k in enumerate(counts) if k < shape.heads]
    if not layers:
        return None
    tokens = method.first_tokens
    query = torch.randn(len(layers), rows, shape.heads, tokens, shape.size, device=probe.device)
    key = torch.randn(len(layers), rows, shape.key_heads, tokens, shape.size, device=probe.device)
    ids = random_tokens(model, rows, tokens)
    with method(twin(model, "sdpa")) as own:
        times = interleave(
            {
                "decide": lambda: method.decide(layers, [counts[i] for i in layers], query, key, shape.size**-0.5),
                "first": lambda: own(ids, past_key_values=method.new_cache(own), use_cache=True, logits_to_keep=1),
            },
            probe.options.rounds,
            probe.device,
        )
    return {"decide_ms": median(times["decide"]), "first_tokens_ms": median(times["first"])}


def headline(frame: pd.DataFrame) -> dict[str, float]:
    """The method's speed-up at the longest length, by part and phase (and k)."""
    own = frame[~frame.baseline & (frame.length == frame.length.max())]
    return {
        f"{row.part}_{row.phase}" + ("" if pd.isna(row.k) else f"_k{row.k}"): float(row.speedup)
        for row in own.itertuples()
    }
