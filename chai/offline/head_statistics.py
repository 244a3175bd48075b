"""Statistics of the heads of a model over a corpus, gathered in the offline phase (paper, Sections 3.1 and 3.2).

Attention matrices are never stored: a block of query rows at a time is reduced to squared distances between heads,
``[H, H]``, which is all that clustering needs (:mod:`chai.clustering.kmeans`), and a few sums. Features of a head h in
a sample of T tokens, with its attention ``A_h [T, T]``:

    causal      x_h = (A_h[t, s] for s <= t < T)     the whole causal matrix
    last_row    x_h = (A_h[T-1, s] for s < T)        one decoding step, as in the authors' release and Figure 2

The squared distances ``D_hg = |x_h - x_g|^2`` of a sample give its clustering error. Their sum over the samples is that
of the features of all samples side by side. For ``last_row`` the mean of the features over the samples is gathered too
(samples of different lengths are aligned at their start, and weigh nothing after their end).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from chai.clustering.distances import Metric, head_costs, output_errors, squared_distances
from chai.clustering.kmeans import pairwise_distances, sweep
from chai.clustering.metrics import within_and_between
from chai.heads import repeat_kv
from chai.offline.evidence import EVIDENCE_TOKENS

Features = Literal["causal", "last_row"]
BLOCK_BYTES = 1 << 24  # of attention weights at a time
#: Metrics that follow from the squared distances of the attention, and its norms.
BY_DISTANCE = ("attention", "cosine")
ENTROPY_ROWS = 64  # evenly spread rows of a sample whose entropy is averaged


class StatisticsError(ValueError):
    """Raised for a file that holds no statistics, or those of other options."""


@dataclass(frozen=True)
class StatisticsOptions:
    """What to gather."""

    layers: int  # layers of the model
    heads: int  # query heads of each layer, H
    features: Features = "causal"  # see the module
    tokens: int = 512  # length of the longest sample
    saved_samples: int = 4  # samples whose maps and correlations are saved one by one
    map_tokens: int = 32  # tokens of the saved maps
    trace_tokens: int = 20  # tokens up to which the clusters are tracked
    trace_samples: int = 64  # samples in which they are
    metrics: tuple[Metric, ...] = ()  # further distances between heads (:mod:`chai.clustering.distances`)
    joint: bool = False  # products of the errors of the output of all pairs of heads


@dataclass
class LayerSamples:
    """Statistics of one layer for a batch of samples; tensors on the model's device."""

    distances: Tensor  # [B, H, H], squared, of the features
    squares: Tensor  # [B, H], squared norms of the features
    steps: Tensor  # [B, trace_tokens, H, H], squared distances of each of the first rows alone
    row: Tensor  # [B, H, T], attention of the last token
    map_row: Tensor  # [B, H, map_tokens], attention of the last token of the map
    entropy: Tensor  # [B, H], relative to that of uniform attention, mean of some rows
    first_token: Tensor  # [B, H], share of the attention on the first token, mean of the rows but the first
    own_token: Tensor  # [B, H], share of the attention on the token itself, mean of the rows but the first
    costs: dict[Metric, Tensor] = field(default_factory=dict)  # [B, H, H] of each further metric
    gram: Tensor | None = None  # [B, H * H, H * H], products of the errors of the output, if asked for
    early: Tensor | None = None  # [B, len(EVIDENCE_TOKENS), H, H], errors of the output over the first tokens alone


def gather(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None,
    lengths: Tensor,
    options: StatisticsOptions,
    softcap: float | None = None,
    outputs: Tensor | None = None,
    sketch: Tensor | None = None,
) -> LayerSamples:
    """Gather the statistics of one layer for a batch of samples.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        scaling: Factor of the scores.
        mask: ``[B or 1, 1, T, T]``, bool (true: attend); ``None`` means causal.
        lengths: ``[B]`` (long), real tokens; the rest is padding.
        options: What to gather; no sample is shorter than ``trace_tokens``.
        softcap: Bound of the scores, ``softcap * tanh(score / softcap)``; ``None``: unbounded.
        outputs: ``[B, H, T, D]``, ``V_h F_h`` for the metric ``output``.
        sketch: ``[B, H, T, width]``, ``V_h W_O,h`` or a random projection of it, for the products.
    """
    batch_size, num_heads, q_len, _ = query.shape
    device, history = query.device, options.trace_tokens
    query, key = query.float() * scaling, repeat_kv(key.float(), num_heads).transpose(2, 3)
    squares, entropy, first_token, own_token = (query.new_zeros(batch_size, num_heads) for _ in range(4))
    distances = query.new_zeros(batch_size, num_heads, num_heads)
    steps = query.new_zeros(batch_size, history, num_heads, num_heads)
    row = query.new_zeros(batch_size, num_heads, q_len)
    map_row = query.new_zeros(batch_size, num_heads, options.map_tokens)
    positions, samples = torch.arange(q_len, device=device), torch.arange(batch_size, device=device)
    last_of_map, shortest = lengths.clamp(max=options.map_tokens) - 1, int(lengths.min())
    entropy_rows = positions[1 :: max(1, q_len // ENTROPY_ROWS)]  # the first row has no choice
    block = min(q_len, max(1, BLOCK_BYTES // (4 * batch_size * num_heads * q_len)))
    costs = {name: torch.zeros_like(distances) for name in options.metrics if name not in BY_DISTANCE}
    gram = query.new_zeros(batch_size, num_heads**2, num_heads**2) if options.joint else None
    early_costs = query.new_zeros(batch_size, len(EVIDENCE_TOKENS), num_heads, num_heads)
    scratch = query.new_empty(2, batch_size * num_heads * block * q_len)  # allocating it for each block is slow
    for begin in range(0, q_len, block):
        # Attention of a block of query rows.
        end = min(begin + block, q_len)
        rows, size = positions[begin:end], batch_size * num_heads * (end - begin) * end
        scores, weights = (part[:size].view(batch_size, num_heads, -1, end) for part in scratch)
        torch.matmul(query[:, :, begin:end], key[..., :end], out=scores)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores[..., begin:].masked_fill_(positions[begin:end] > rows[:, None], -torch.inf)
        if mask is not None:
            scores.masked_fill_(~mask[:, :, begin:end, :end], -torch.inf)
        torch.softmax(scores, -1, out=weights)
        # Single rows: the last of each sample and of its map, and the first ones.
        for tensor, index in ((row, lengths - 1), (map_row, last_of_map)):
            inside = (index >= begin) & (index < end)
            width = min(end, tensor.shape[2])
            tensor[samples[inside], :, :width] = weights[samples[inside], :, index[inside] - begin, :width]
        if begin < history:
            early = weights[:, :, : history - begin].transpose(1, 2)  # [B, rows, H, end]
            steps[:, begin : begin + early.shape[1]] = squared_distances(early)
        # Sums over the rows that are not padding.
        if end > shortest:
            weights *= (rows < lengths[:, None])[:, None, :, None]
        first_token += weights[..., 0].sum(2)
        own_token += weights[:, :, rows - begin, rows].sum(2)
        some = entropy_rows[(entropy_rows >= begin) & (entropy_rows < end)]
        entropy += (torch.special.entr(weights[:, :, some - begin]).sum(-1) / (some + 1).log()).sum(2)
        # Distances between heads, and errors of the output.
        if options.features == "causal":
            for name, cost in costs.items():
                cost += head_costs(name, weights, None if outputs is None else outputs[:, :, :end])
            for place, tokens in enumerate(EVIDENCE_TOKENS):
                if outputs is not None and begin < tokens:
                    first_rows = weights[:, :, : tokens - begin]
                    early_costs[:, place] += head_costs("output", first_rows, outputs[:, :, :end])
            if gram is not None:
                gram += _error_products(weights, sketch)
            flat = weights.flatten(2)
            squares += torch.linalg.vector_norm(flat, dim=2).square()
            distances += squared_distances(flat, in_place=True)
    if options.features == "last_row":
        distances, squares = squared_distances(row), row.square().sum(2)
        costs = {name: head_costs(name, row[:, :, None], outputs) for name in costs}
        gram = None if gram is None else _error_products(row[:, :, None], sketch)
    if "cosine" in options.metrics:  # of the whole vectors, which blocks do not add up to
        norms = squares.sqrt().clamp(min=1e-12)
        products = (squares[:, :, None] + squares[:, None] - distances) / 2
        costs["cosine"] = (1 - products / (norms[:, :, None] * norms[:, None])).clamp(min=0)
    # Means over the rows that have a choice.
    entropy /= (entropy_rows < lengths[:, None]).sum(1, keepdim=True)
    choices = (lengths - 1)[:, None]
    first_token, own_token = (first_token - 1) / choices, (own_token - 1) / choices
    return LayerSamples(
        distances, squares, steps, row, map_row, entropy, first_token, own_token, costs, gram, early_costs
    )


def _error_products(weights: Tensor, sketch: Tensor | None) -> Tensor:
    """Return the products of the errors of the output, ``[B, H * H, H * H]``, from attention ``[B, H, T, S]``."""
    assert sketch is not None
    errors = output_errors(weights, sketch[:, :, : weights.shape[-1]]).flatten(2)
    return errors @ errors.transpose(1, 2)


def correlation(distances: np.ndarray, squares: np.ndarray, entries: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation between features from their distances and norms.

    Args:
        distances: ``[N, H, H]``, squared.
        squares: ``[N, H]``, squared norms.
        entries: ``[N]``, length of the features.
        total: ``[N]``, sum of a head's features (each row of attention sums to 1).

    Returns:
        ``[N, H, H]``; 0 for a head with uniform attention, 1 on the diagonal.
    """
    products = (squares[:, :, None] + squares[:, None] - distances) / 2
    covariance = products - (total**2 / entries)[:, None, None]
    deviation = np.sqrt(np.maximum(covariance.diagonal(axis1=1, axis2=2), 0))
    scale = deviation[:, :, None] * deviation[:, None]
    result = np.clip(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-9), -1, 1)
    heads = np.arange(result.shape[1])
    result[:, heads, heads] = 1
    return result


@dataclass
class HeadStatistics:
    """Sums over the samples seen so far; saved as they are, so that a stopped pass can be resumed.

    Attributes:
        sums: By name, float64: ``error``, ``error_square`` ``[L, H]`` (with k clusters at ``k - 1``),
            ``distances``, ``correlation`` ``[L, H, H]``, ``sizes``, ``sizes_square`` ``[L, H, H]`` (of the i-th
            largest of k clusters at ``k - 1, i``), ``within``, ``between`` ``[L, H]`` (mean correlation of two heads
            that share one of k clusters, and that do not, at ``k - 1``; NaN without such heads), ``entropy``,
            ``first_token``, ``own_token`` ``[L, H]``, for ``last_row`` ``rows`` ``[L, H, tokens]``, ``cost_NAME``
            ``[L, H, H]`` of further metrics, and for ``joint`` ``gram`` ``[L, H * H, H * H]``.
        series: By name, one fp32 array per sample: ``sample_error`` ``[L, H]`` (as ``error``) of every sample; of the
            first ones ``maps`` ``[L, H, map_tokens]``, ``sample_correlation`` ``[L, H, H]``,
            ``steps`` ``[L, trace_tokens, H, H]``, ``whole`` ``[L, H, H]`` (distances of the samples in ``steps``), and
            of the same samples, with the metric ``output``, ``early_output`` ``[L, E, H, H]`` (first tokens alone, see
            :mod:`chai.offline.evidence`), ``whole_output`` ``[L, H, H]`` and ``length`` (tokens).
    """

    options: StatisticsOptions  # what is gathered
    samples: int = 0  # samples seen
    seen_tokens: int = 0  # their tokens
    longest: int = 0  # tokens of the longest
    read: int = 0  # texts read from the corpus, those too short included
    complete: bool = False  # the pass has ended
    made: dict[str, Any] = field(default_factory=dict)  # how they were gathered, JSON
    kept_tokens: list[list[str]] = field(default_factory=list)  # tokens of each saved sample, as text
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    series: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, heads = self.options.layers, self.options.heads
        square = ("distances", "correlation", "sizes", "sizes_square")
        flat = ("error", "error_square", "within", "between", "entropy", "first_token", "own_token")
        shapes = dict.fromkeys(square, (layers, heads, heads)) | dict.fromkeys(flat, (layers, heads))
        shapes |= {f"cost_{name}": (layers, heads, heads) for name in self.options.metrics if name != "attention"}
        if self.options.joint:
            shapes["gram"] = (layers, heads**2, heads**2)
        if self.options.features == "last_row":
            shapes["rows"] = (layers, heads, self.options.tokens)
        self.sums = {name: np.zeros(shape) for name, shape in shapes.items()} | self.sums
        names = (
            "sample_error",
            "maps",
            "sample_correlation",
            "steps",
            "whole",
            "early_output",
            "whole_output",
            "length",
        )
        self.series = {name: [] for name in names} | self.series

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [*self.sums.values(), *(array for arrays in self.series.values() for array in arrays)]
        return sum(array.nbytes for array in arrays)

    def add(self, layers: Sequence[LayerSamples], tokens: list[list[str]]) -> None:
        """Add the statistics of all layers for a batch of samples, whose tokens are given as text."""
        lengths = np.array([len(sample) for sample in tokens], dtype=np.float64)
        heads, causal = self.options.heads, self.options.features == "causal"

        def host(name: str) -> np.ndarray:
            return np.stack([getattr(layer, name).cpu().numpy() for layer in layers])  # [L, B, ...]

        # Correlations and clusterings of every sample by itself.
        distances = host("distances")
        entries, total = (lengths * (lengths + 1) / 2, lengths) if causal else (lengths, np.ones_like(lengths))
        flat, squares = distances.reshape(-1, heads, heads), host("squares").reshape(-1, heads).astype(np.float64)
        alike = correlation(flat, squares, np.tile(entries, len(layers)), np.tile(total, len(layers)))
        error, labels = sweep(flat)
        sizes = -np.sort(-_sizes(labels), 2)
        within, between = within_and_between(alike, labels)
        new = {"error": error, "error_square": error**2, "sizes": sizes, "sizes_square": sizes**2, "correlation": alike}
        new |= {"within": within, "between": between}
        # Sums over the samples.
        for name, value in new.items():
            self.sums[name] += value.reshape(len(layers), len(tokens), *value.shape[1:]).sum(1)
        for name in ("distances", "entropy", "first_token", "own_token"):
            self.sums[name] += host(name).sum(1, dtype=np.float64)
        for name in self.options.metrics:
            if name != "attention":
                cost = np.stack([layer.costs[name].cpu().numpy() for layer in layers])
                self.sums[f"cost_{name}"] += cost.sum(1, dtype=np.float64)
        if self.options.joint:
            self.sums["gram"] += host("gram").sum(1, dtype=np.float64)
        if not causal:
            row = host("row")
            self.sums["rows"][:, :, : row.shape[3]] += row.sum(1, dtype=np.float64)
        # Samples that are saved one by one.
        self.series["sample_error"] += list(error.reshape(len(layers), len(tokens), heads).swapaxes(0, 1).astype("f4"))
        for sample in range(min(len(tokens), self.options.saved_samples - len(self.kept_tokens))):
            self.kept_tokens.append(tokens[sample][: self.options.map_tokens])
            self.series["maps"].append(host("map_row")[:, sample])
            self.series["sample_correlation"].append(alike.reshape(distances.shape)[:, sample].astype(np.float32))
        for sample in range(min(len(tokens), self.options.trace_samples - len(self.series["steps"]))):
            self.series["steps"].append(host("steps")[:, sample])
            self.series["whole"].append(distances[:, sample])
            if "output" in self.options.metrics and causal:
                self.series["early_output"].append(host("early")[:, sample])
                output = [layer.costs["output"][sample].cpu().numpy() for layer in layers]
                self.series["whole_output"].append(np.stack(output))
                self.series["length"].append(np.array(lengths[sample], dtype=np.float32))
        self.samples += len(tokens)
        self.seen_tokens += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))

    def errors(self, combine: str) -> np.ndarray:
        """Return the clustering error ``[L, H]`` with k clusters at ``k - 1``, per sample.

        Args:
            combine: ``per_sample``: each sample is clustered by itself, mean over the samples; ``concatenated``: one
                clustering of the features of all samples side by side; ``averaged``: of their mean.

        Raises:
            ValueError: The mean was not gathered.
        """
        if combine == "per_sample":
            return self.sums["error"] / self.samples
        if combine == "concatenated":
            return sweep(self.distances)[0]
        if "rows" not in self.sums:
            raise ValueError("features are averaged for last_row only: causal matrices are too large to keep a mean of")
        return sweep(pairwise_distances((self.sums["rows"] / self.samples).astype(np.float32)))[0]

    @property
    def sample_errors(self) -> np.ndarray | None:
        """Clustering error ``[N, L, H]`` of each sample; ``None`` if an earlier version saw some of them."""
        errors = self.series["sample_error"]
        return np.stack(errors) if errors and len(errors) == self.samples else None

    @property
    def distances(self) -> np.ndarray:
        """Squared distances ``[L, H, H]`` between heads, mean over the samples."""
        return self.sums["distances"] / self.samples

    def save(self, path: Path, note: dict[str, Any]) -> None:
        """Write everything to one safetensors file, with a note that must be equal when it is loaded."""
        tensors = dict(self.sums)
        for name, arrays in self.series.items():
            if arrays:
                tensors[f"series.{name}"] = np.stack(arrays)
        numbers = ("samples", "seen_tokens", "longest", "read", "complete", "made", "kept_tokens")
        state = {name: getattr(self, name) for name in numbers}
        save_file(tensors, path, metadata={"state": json.dumps(state), "note": json.dumps(note, sort_keys=True)})

    @classmethod
    def load(cls, path: Path, options: StatisticsOptions, note: dict[str, Any]) -> HeadStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            StatisticsError: The file is missing or truncated, or was saved with another note.
        """
        try:
            with safe_open(path, "np") as file:
                saved = file.metadata() or {}
                if saved.get("note") != json.dumps(note, sort_keys=True):
                    raise StatisticsError(f"{path} holds other statistics")
                state = json.loads(saved["state"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, StatisticsError):
                raise
            raise StatisticsError(f"{path} holds no statistics: {error}") from None
        series = {name.removeprefix("series."): list(a) for name, a in arrays.items() if name.startswith("series.")}
        return cls(options, **state, sums={n: a for n, a in arrays.items() if "." not in n}, series=series)


def _sizes(labels: np.ndarray) -> np.ndarray:
    """Count the heads of each cluster: labels ``[N, K, H]`` to sizes ``[N, K, H]``."""
    return (labels[..., None] == np.arange(labels.shape[-1], dtype=labels.dtype)).sum(-2)
