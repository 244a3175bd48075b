"""What the offline phase gathers about the heads of a model, sample by sample (paper, sections 3.1 and 3.2).

Attention matrices are never kept: a block of query rows at a time becomes squared distances between heads, ``[H, H]``,
which is all that clustering needs (:mod:`chai.kernels.kmeans`), and a few sums. Features of a head h in a sample of T
tokens, with its attention ``A_h [T, T]``:

    causal      x_h = (A_h[t, s] for s <= t < T)     the whole causal matrix
    last_row    x_h = (A_h[T-1, s] for s < T)        one decoding step, as in the authors' release and Figure 2

Squared distances ``D_hg = |x_h - x_g|^2`` of single samples give the clustering error per sample; their sum over the
samples is that of the features of all samples side by side; for ``last_row`` the features' mean over the samples is
gathered as well (samples of different lengths begin together, and weigh nothing where they have ended).
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

from chai.attention import expand_heads
from chai.clustering import pairwise_distances
from chai.kernels.kmeans import sweep

Features = Literal["causal", "last_row"]
BLOCK_BYTES = 1 << 24  # of attention at a time
ENTROPY_ROWS = 64  # rows of a sample whose entropy is taken, evenly spread


class StatisticsError(ValueError):
    """A file holds no statistics, or others than are wanted."""


@dataclass(frozen=True)
class Gathering:
    """What is gathered.

    Attributes:
        layers: of the model.
        heads: H, of each layer.
        features: see the module.
        tokens: the longest sample.
        kept: samples of which maps and correlations are kept one by one.
        map_tokens: tokens of the kept maps.
        history: tokens up to which the membership is followed.
        history_samples: samples in which it is.
    """

    layers: int
    heads: int
    features: Features = "causal"
    tokens: int = 512
    kept: int = 4
    map_tokens: int = 32
    history: int = 20
    history_samples: int = 64


@dataclass
class Samples:
    """What some samples tell about one layer; tensors on the model's device.

    Attributes:
        distances: ``[B, H, H]``, squared, of the features.
        squares: ``[B, H]``, squared norms of the features.
        steps: ``[B, history, H, H]``, squared distances of each of the first rows alone.
        row: ``[B, H, T]``, attention of the last token.
        shown: ``[B, H, map_tokens]``, of the last token shown in maps.
        entropy: ``[B, H]``, over that of uniform attention, mean of some rows.
        first_token: ``[B, H]``, share of the attention that goes to the first token, mean of the rows but the first.
        own_token: ``[B, H]``, share that goes to the token itself, likewise.
    """

    distances: Tensor
    squares: Tensor
    steps: Tensor
    row: Tensor
    shown: Tensor
    entropy: Tensor
    first_token: Tensor
    own_token: Tensor


def gather(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, lengths: Tensor, wanted: Gathering
) -> Samples:
    """Some samples, one layer.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_key, T, D]``.
        scaling: factor of the scores.
        mask: ``[B or 1, 1, T, T]``, bool (true: attend); ``None`` means causal.
        lengths: ``[B]`` (long), real tokens; what follows is padding.
        wanted: what to gather; no sample is shorter than its history.
    """
    rows, heads, count, _ = query.shape
    query, key = query.float() * scaling, expand_heads(key.float(), heads).transpose(2, 3)
    squares, entropy, first_token, own_token = (query.new_zeros(rows, heads) for _ in range(4))
    distances, steps = query.new_zeros(rows, heads, heads), query.new_zeros(rows, wanted.history, heads, heads)
    row, shown = query.new_zeros(rows, heads, count), query.new_zeros(rows, heads, wanted.map_tokens)
    places, every = torch.arange(count, device=query.device), torch.arange(rows, device=query.device)
    last_shown, shortest = lengths.clamp(max=wanted.map_tokens) - 1, int(lengths.min())
    looked_at = places[1 :: max(1, count // ENTROPY_ROWS)]  # the first row has no choice
    block = min(count, max(1, BLOCK_BYTES // (4 * rows * heads * count)))
    room = query.new_empty(2, rows * heads * block * count)  # large tensors are slow to allocate again and again
    for begin in range(0, count, block):
        end = min(begin + block, count)
        here, size = places[begin:end], rows * heads * (end - begin) * end
        scores, weights = (one[:size].view(rows, heads, -1, end) for one in room)
        torch.matmul(query[:, :, begin:end], key[..., :end], out=scores)
        scores[..., begin:].masked_fill_(places[begin:end] > here[:, None], -torch.inf)
        if mask is not None:
            scores.masked_fill_(~mask[:, :, begin:end, :end], -torch.inf)
        torch.softmax(scores, -1, out=weights)
        for tensor, index in ((row, lengths - 1), (shown, last_shown)):
            inside = (index >= begin) & (index < end)
            width = min(end, tensor.shape[2])
            tensor[every[inside], :, :width] = weights[every[inside], :, index[inside] - begin, :width]
        if begin < wanted.history:
            early = weights[:, :, : wanted.history - begin].transpose(1, 2)  # [B, rows, H, end]
            steps[:, begin : begin + early.shape[1]] = squared_distances(early)
        if end > shortest:
            weights *= (here < lengths[:, None])[:, None, :, None]  # rows of padding count for nothing
        first_token += weights[..., 0].sum(2)
        own_token += weights[:, :, here - begin, here].sum(2)
        some = looked_at[(looked_at >= begin) & (looked_at < end)]
        entropy += (torch.special.entr(weights[:, :, some - begin]).sum(-1) / (some + 1).log()).sum(2)
        if wanted.features == "causal":
            flat = weights.flatten(2)
            squares += torch.linalg.vector_norm(flat, dim=2).square()
            distances += squared_distances(flat, in_place=True)
    if wanted.features == "last_row":
        distances, squares = squared_distances(row), row.square().sum(2)
    entropy /= (looked_at < lengths[:, None]).sum(1, keepdim=True)
    choosing = (lengths - 1)[:, None]
    return Samples(
        distances, squares, steps, row, shown, entropy, (first_token - 1) / choosing, (own_token - 1) / choosing
    )


def squared_distances(points: Tensor, *, in_place: bool = False) -> Tensor:
    """Squared distances ``[..., H, H]`` between ``[..., H, F]``, by a product; ``in_place`` may change the points."""
    mean = points.mean(-2, keepdim=True)  # near points differ by little: their products would cancel
    points = points.sub_(mean) if in_place else points - mean
    products = points @ points.transpose(-1, -2)
    squares = products.diagonal(dim1=-2, dim2=-1)
    return (squares[..., :, None] + squares[..., None, :] - 2 * products).clamp(min=0)


def correlation(distances: np.ndarray, squares: np.ndarray, entries: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Pearson's correlation between features from their distances and norms.

    Args:
        distances: ``[N, H, H]``, squared.
        squares: ``[N, H]``, squared norms.
        entries: ``[N]``, length of the features.
        total: ``[N]``, sum of a head's features (each row of attention sums to one).

    Returns:
        ``[N, H, H]``; 0 for a head that attends to all alike, 1 to itself.
    """
    products = (squares[:, :, None] + squares[:, None] - distances) / 2
    covariance = products - (total**2 / entries)[:, None, None]
    deviation = np.sqrt(np.maximum(covariance.diagonal(axis1=1, axis2=2), 0))
    scale = deviation[:, :, None] * deviation[:, None]
    found = np.clip(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-9), -1, 1)
    heads = np.arange(found.shape[1])
    found[:, heads, heads] = 1
    return found


@dataclass
class HeadStatistics:
    """Sums over the samples seen so far; saved as they are, so that a stopped pass goes on.

    Attributes:
        wanted: what is gathered.
        samples: seen.
        seen_tokens: of these samples.
        longest: of these samples, tokens.
        read: texts taken from the corpus, those too short included.
        complete: nothing more is to come.
        made: how they were gathered, JSON.
        kept_tokens: the tokens of each kept sample, as text.
        sums: by name, float64: ``error``, ``error_square`` ``[L, H]`` (with k clusters at ``k - 1``), ``distances``,
            ``correlation`` ``[L, H, H]``, ``sizes``, ``sizes_square`` ``[L, H, H]`` (of the i-th largest of k clusters
            at ``k - 1, i``), ``entropy``, ``first_token``, ``own_token`` ``[L, H]``, and for ``last_row`` ``rows``
            ``[L, H, tokens]``.
        series: by name, one array a sample, fp32: ``maps`` ``[L, H, map_tokens]``, ``sample_correlation``
            ``[L, H, H]``, ``steps`` ``[L, history, H, H]``, ``whole`` ``[L, H, H]`` (distances of the samples that
            ``steps`` has).
    """

    wanted: Gathering
    samples: int = 0
    seen_tokens: int = 0
    longest: int = 0
    read: int = 0
    complete: bool = False
    made: dict[str, Any] = field(default_factory=dict)
    kept_tokens: list[list[str]] = field(default_factory=list)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    series: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, heads = self.wanted.layers, self.wanted.heads
        square = ("distances", "correlation", "sizes", "sizes_square")
        flat = ("error", "error_square", "entropy", "first_token", "own_token")
        shapes = dict.fromkeys(square, (layers, heads, heads)) | dict.fromkeys(flat, (layers, heads))
        if self.wanted.features == "last_row":
            shapes["rows"] = (layers, heads, self.wanted.tokens)
        self.sums = {name: np.zeros(shape) for name, shape in shapes.items()} | self.sums
        self.series = {name: [] for name in ("maps", "sample_correlation", "steps", "whole")} | self.series

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [*self.sums.values(), *(array for arrays in self.series.values() for array in arrays)]
        return sum(array.nbytes for array in held)

    def add(self, layers: Sequence[Samples], tokens: list[list[str]]) -> None:
        """Take in what some samples tell about every layer.

        Args:
            layers: one for each layer.
            tokens: of each sample, as text.
        """
        lengths = np.array([len(sample) for sample in tokens], dtype=np.float64)
        heads, causal = self.wanted.heads, self.wanted.features == "causal"

        def host(name: str) -> np.ndarray:
            return np.stack([getattr(layer, name).cpu().numpy() for layer in layers])  # [L, B, ...]

        distances = host("distances")
        entries, total = (lengths * (lengths + 1) / 2, lengths) if causal else (lengths, np.ones_like(lengths))
        flat, squares = distances.reshape(-1, heads, heads), host("squares").reshape(-1, heads).astype(np.float64)
        alike = correlation(flat, squares, np.tile(entries, len(layers)), np.tile(total, len(layers)))
        error, labels = sweep(flat)
        sizes = -np.sort(-_sizes(labels), 2)
        new = {"error": error, "error_square": error**2, "sizes": sizes, "sizes_square": sizes**2, "correlation": alike}
        for name, value in new.items():
            self.sums[name] += value.reshape(len(layers), len(tokens), *value.shape[1:]).sum(1)
        for name in ("distances", "entropy", "first_token", "own_token"):
            self.sums[name] += host(name).sum(1, dtype=np.float64)
        if not causal:
            row = host("row")
            self.sums["rows"][:, :, : row.shape[3]] += row.sum(1, dtype=np.float64)
        for sample in range(min(len(tokens), self.wanted.kept - len(self.kept_tokens))):
            self.kept_tokens.append(tokens[sample][: self.wanted.map_tokens])
            self.series["maps"].append(host("shown")[:, sample])
            self.series["sample_correlation"].append(alike.reshape(distances.shape)[:, sample].astype(np.float32))
        for sample in range(min(len(tokens), self.wanted.history_samples - len(self.series["steps"]))):
            self.series["steps"].append(host("steps")[:, sample])
            self.series["whole"].append(distances[:, sample])
        self.samples += len(tokens)
        self.seen_tokens += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))

    def errors(self, combine: str) -> np.ndarray:
        """Clustering error ``[L, H]`` of k clusters at ``k - 1``, for one sample.

        Args:
            combine: ``per_sample``: each sample is clustered by itself, mean over the samples; ``concatenated``: one
                clustering of the features of all samples side by side; ``averaged``: of their mean.

        Raises:
            ValueError: the mean wasn't gathered.
        """
        if combine == "per_sample":
            return self.sums["error"] / self.samples
        if combine == "concatenated":
            return sweep(self.distances)[0]
        if "rows" not in self.sums:
            raise ValueError("features are averaged for last_row only: causal matrices are too large to keep a mean of")
        return sweep(pairwise_distances(torch.from_numpy(self.sums["rows"] / self.samples)))[0]

    @property
    def distances(self) -> np.ndarray:
        """Squared distances ``[L, H, H]`` between heads, mean over the samples."""
        return self.sums["distances"] / self.samples

    def save(self, path: Path, note: dict[str, Any]) -> None:
        """Write everything to one safetensors file.

        Args:
            path: of the file, whole once this returns.
            note: what is to be the same when it is loaded, JSON.
        """
        tensors = dict(self.sums)
        for name, arrays in self.series.items():
            if arrays:
                tensors[f"series.{name}"] = np.stack(arrays)
        numbers = ("samples", "seen_tokens", "longest", "read", "complete", "made", "kept_tokens")
        state = {name: getattr(self, name) for name in numbers}
        save_file(tensors, path, metadata={"state": json.dumps(state), "note": json.dumps(note, sort_keys=True)})

    @classmethod
    def load(cls, path: Path, wanted: Gathering, note: dict[str, Any]) -> HeadStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            StatisticsError: the file is truncated, no such file, or was saved with another note.
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
        return cls(wanted, **state, sums={n: a for n, a in arrays.items() if "." not in n}, series=series)


def _sizes(labels: np.ndarray) -> np.ndarray:
    """Sizes ``[N, K, H]`` of the clusters of ``[N, K, H]`` labels."""
    return (labels[..., None] == np.arange(labels.shape[-1], dtype=labels.dtype)).sum(-2)
