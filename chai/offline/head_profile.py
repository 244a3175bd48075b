"""The head profile of a model: the number of clusters of each layer, and static clusters, found offline once.

Saved as ``profile.safetensors`` (counts, static clusters, statistics) and ``profile.json`` (model, corpus, rule), the
second with a digest of the first; docs/results.md lists the tensors. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize
from transformers import PreTrainedConfig

from chai.clustering.distances import EUCLIDEAN, METRICS, Metric
from chai.clustering.gqa import gqa_medoids
from chai.clustering.kmeans import cluster
from chai.clustering.medoids import medoid_clusters, refine_jointly
from chai.clustering.metrics import adjusted_rand, changed_heads
from chai.errors import ChaiError
from chai.heads import HeadClusters
from chai.offline.evidence import EVIDENCE_TOKENS, choose_prior
from chai.offline.head_statistics import HeadStatistics
from chai.patching.model_info import num_kv_heads

FORMAT = 1
ABOUT, TENSORS = "profile.json", "profile.safetensors"
#: The shape that a head profile is bound to.
SHAPE = ("model_type", "hidden_size", "layers", "heads", "key_heads")


class ProfileError(ChaiError):
    """Raised for a head profile that cannot be read, or is of another model."""


def model_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the model's shape under the names of :data:`SHAPE`."""
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_heads": num_kv_heads(config),
    }


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Result of the offline phase."""

    about: dict[str, Any]  # content of profile.json
    arrays: dict[str, np.ndarray]  # the tensors
    _found: dict[Any, HeadClusters] = field(default_factory=dict, repr=False)  # clusters, by what was asked for
    _priors: dict[Any, float] = field(default_factory=dict, repr=False)  # weights of the corpus, by layer, k and tokens

    @property
    def num_clusters(self) -> list[int]:
        """Number of clusters of each layer."""
        return [int(k) for k in self.arrays["clusters"]]

    def clusters(
        self, layer: int, k: int | None = None, metric: Metric = "attention", kv_heads: int | None = None
    ) -> HeadClusters:
        """Return the clusters that fit all samples best, for one row.

        Args:
            layer: Index of the layer.
            k: Number of clusters; that of the profile by default.
            metric: Distance between heads (:mod:`chai.clustering.distances`).
            kv_heads: KV heads of the model, if representatives are to read as few of them as k can.

        Raises:
            ProfileError: The profile does not have the metric.
        """
        k = self.num_clusters[layer] if k is None else k
        asked = (layer, k, metric, kv_heads)
        if asked not in self._found:
            self._found[asked] = self._find_clusters(*asked)
        return self._found[asked]

    def _find_clusters(self, layer: int, k: int, metric: Metric, kv_heads: int | None) -> HeadClusters:
        if metric == "attention" and kv_heads is None and k == self.num_clusters[layer]:
            assignment, representatives = self.arrays["assignment"][layer], self.arrays["representatives"][layer, :k]
        else:
            gram = self.gram[layer : layer + 1] if metric == "output" and self.gram is not None else None
            cost = self.costs(metric)[layer : layer + 1]
            labels, heads = static_clusters(cost, np.array([k]), metric, gram, kv_heads)
            assignment, representatives = labels[0], heads[0]
        return HeadClusters(torch.from_numpy(assignment)[None], torch.from_numpy(representatives)[None])

    @property
    def gram(self) -> np.ndarray | None:
        """Products of the errors of the output, ``[L, H * H, H * H]``, mean of the samples; ``None``: not gathered."""
        return self.arrays.get("gram")

    @property
    def mean_tokens(self) -> float:
        """Mean number of query tokens of a sample that :meth:`costs` is a sum over."""
        if self.about.get("features") == "last_row":
            return 1.0
        corpus = self.about["corpus"]
        return float(corpus["tokens"] / corpus["samples"])

    def prior(self, layer: int, k: int, tokens: int) -> float:
        """Return how many tokens the corpus counts as, against the first ``tokens`` of a request.

        Infinite: the clusters are those of the corpus.

        Raises:
            ProfileError: The profile lacks the errors of this number of first tokens.
        """
        if "early_output" not in self.arrays or tokens not in EVIDENCE_TOKENS:
            raise ProfileError(
                f"the profile of {self.about['model']['name']} cannot weigh {tokens} warm-up tokens; valid: "
                f"{', '.join(map(str, EVIDENCE_TOKENS))}, in a profile with profile.features=causal and "
                "profile.metrics=[output]"
            )
        asked = ("prior", layer, k, tokens)
        if asked not in self._priors:
            early = self.arrays["early_output"][:, layer, EVIDENCE_TOKENS.index(tokens)]
            whole, lengths = self.arrays["whole_output"][:, layer], self.arrays["length"]
            corpus, samples = self.arrays["cost_output"][layer], self.about["corpus"]["samples"]
            self._priors[asked] = choose_prior(
                early, whole, lengths, corpus * samples, self.mean_tokens * samples, k, tokens
            )
        return self._priors[asked]

    def costs(self, metric: Metric) -> np.ndarray:
        """Return the costs ``[L, H, H]`` of a metric (fp32), mean of the samples (ProfileError: not gathered)."""
        name = "distances" if metric == "attention" else f"cost_{metric}"
        if name not in self.arrays:
            valid = [metric for metric in METRICS if metric == "attention" or f"cost_{metric}" in self.arrays]
            raise ProfileError(
                f"the profile of {self.about['model']['name']} has no metric '{metric}'; valid: {', '.join(valid)}, or "
                f"a profile with profile.metrics=[{metric}]"
            )
        return self.arrays[name].astype(np.float32)

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a model of another shape (ProfileError: names the differences)."""
        profiled, shape = self.about["model"], model_shape(config)
        differences = [
            f"{name} {profiled[name]} instead of {shape[name]}" for name in SHAPE if profiled[name] != shape[name]
        ]
        if differences:
            raise ProfileError(f"this profile is of another model, {profiled['name']}: {', '.join(differences)}")

    def save(self, folder: Path, write: Callable[[Path, bytes], object] = Path.write_bytes) -> None:
        """Write both files to ``folder`` by ``write(path, content)``."""
        tensors = serialize({name: np.ascontiguousarray(array) for name, array in self.arrays.items()})
        about = self.about | {"sha256": hashlib.sha256(tensors).hexdigest()}
        write(folder / TENSORS, tensors)
        write(folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read a head profile from its folder, or from either of its files.

        Raises:
            ProfileError: It is missing, truncated or damaged, or of another version.
        """
        path = Path(path)
        folder = path.parent if path.name in (ABOUT, TENSORS) else path
        if not (folder / ABOUT).is_file():
            raise ProfileError(f"no profile in {folder}: it has no {ABOUT}", remedy="make_profile")
        try:
            about = json.loads((folder / ABOUT).read_text())
            content = (folder / TENSORS).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ProfileError(f"the profile in {folder} cannot be read: {reason}") from None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ProfileError(f"{folder / ABOUT} is not a profile of format {FORMAT}")
        if hashlib.sha256(content).hexdigest() != about.get("sha256"):
            raise ProfileError(f"{folder / TENSORS} is damaged or truncated: its digest is not that in {ABOUT}")
        try:
            profile = cls(about, parse(content))
            shape = (about["model"]["layers"], about["model"]["heads"])
            fits = profile.arrays["assignment"].shape == shape and len(profile.num_clusters) == shape[0]
        except (SafetensorError, KeyError, TypeError) as error:
            raise ProfileError(f"the profile in {folder} lacks {error}") from None
        if not fits:
            raise ProfileError(
                f"the profile in {folder} is inconsistent: its tensors do not have the shape of its model"
            )
        return profile


def static_clusters(
    cost: np.ndarray,
    counts: np.ndarray,
    metric: Metric,
    gram: np.ndarray | None = None,
    kv_heads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster the heads of each problem by costs of a metric, offline.

    K-means where the costs are squared distances, else k-medoids; k-medoids as well where few KV heads are to be read.

    Args:
        cost: ``[N, H, H]`` fp32.
        counts: ``[N]``, k of each problem.
        metric: Of the costs.
        gram: ``[N, H * H, H * H]``, products of the errors of the output: heads are then assigned such that the error
            of all of them together is small (:func:`chai.clustering.medoids.refine_jointly`).
        kv_heads: KV heads, if the representatives are to read as few as possible.

    Returns:
        labels ``[N, H]`` and representatives ``[N, k_max]`` (padded with H).
    """
    if kv_heads is not None:
        labels, representatives = gqa_medoids(cost, kv_heads, counts)
    elif metric in EUCLIDEAN:
        labels, representatives, _ = cluster(cost, counts, nearest=True)
    else:
        labels, representatives = medoid_clusters(cost, counts)
    if gram is not None:
        labels = refine_jointly(gram, labels, representatives, counts)
    return labels, representatives


def static_maps(
    statistics: HeadStatistics, metric: Metric, counts: list[int], kv_heads: int | None = None
) -> list[dict[int, HeadClusters]]:
    """Return the static clusters of each layer, by number of clusters, as :meth:`HeadProfile.clusters` has them."""
    sums, samples = statistics.sums, statistics.samples
    cost = (sums["distances" if metric == "attention" else f"cost_{metric}"] / samples).astype(np.float32)
    gram = (sums["gram"] / samples).astype(np.float32) if metric == "output" and "gram" in sums else None
    maps: list[dict[int, HeadClusters]] = [{} for _ in cost]
    for k in counts:
        labels, heads = static_clusters(cost, np.full(len(cost), k), metric, gram, kv_heads)
        for layer, own in enumerate(maps):
            own[k] = HeadClusters(torch.from_numpy(labels[layer])[None], torch.from_numpy(heads[layer, :k])[None])
    return maps


def build_profile(
    statistics: HeadStatistics,
    num_clusters: list[int],
    about: dict[str, Any],
    warmup_tokens: int = 5,
    further: dict[str, np.ndarray] | None = None,
) -> HeadProfile:
    """Build the head profile from statistics and the chosen numbers of clusters.

    ``about`` has model, corpus, features, rule and versions; ``warmup_tokens`` is a mark in Figure 9; ``further`` are
    more arrays (sensitivities).
    """
    sums, samples, distances = statistics.sums, statistics.samples, statistics.distances.astype(np.float32)
    assignment, representatives, _ = cluster(distances, np.array(num_clusters), nearest=True)
    representatives[representatives == assignment.shape[1]] = -1
    changes, agreement = track_clusters(statistics, num_clusters)

    def deviation(name: str) -> np.ndarray:
        mean = sums[name] / samples
        return np.sqrt(np.maximum(sums[f"{name}_square"] / samples - mean**2, 0))

    names = ["maps", "sample_correlation"]
    names += [name for name in ("early_output", "whole_output", "length") if statistics.series[name]]
    series = {name: np.stack(statistics.series[name]) for name in names}
    arrays = {
        "clusters": np.array(num_clusters),
        "assignment": assignment,
        "representatives": representatives,
        "distances": distances,
        "error": sums["error"] / samples,
        "error_sd": deviation("error"),
        "error_static": statistics.errors("concatenated"),
        "correlation": (sums["correlation"] / samples).astype(np.float32),
        "cluster_sizes": sums["sizes"] / samples,
        "cluster_sizes_sd": deviation("sizes"),
        "changes": changes,
        "agreement": agreement,
        "assignment_by_k": static_assignments(distances),
        **{name: sums[name] / samples for name in ("entropy", "first_token", "own_token")},
        **series,
        **{name: (mean / samples).astype(np.float32) for name, mean in sums.items() if name.startswith("cost_")},
        **({"gram": (sums["gram"] / samples).astype(np.float32)} if "gram" in sums else {}),
        **(further or {}),
    }
    if (sample_errors := statistics.sample_errors) is not None:  # gathered by this version from the first sample on
        arrays |= {"sample_error": sample_errors}
        arrays |= {name: sums[name] / samples for name in ("within", "between")}
    # Build profile.json.
    kept = [{"tokens": tokens} for tokens in statistics.kept_tokens]
    model = about["model"]
    read = sum(-(-k * model["key_heads"] // model["heads"]) for k in num_clusters)
    saving = (1 - read / (len(num_clusters) * model["key_heads"])) / 2
    about = {"format": FORMAT, **about, "decide_tokens": warmup_tokens, "kept": kept, "saving": saving}
    return HeadProfile(about, arrays)


def static_assignments(distances: np.ndarray) -> np.ndarray:
    """Return the static clusters of every number of clusters, ``[L, H, H]`` (int16): those of k clusters at ``k - 1``.

    Args:
        distances: ``[L, H, H]`` fp32, squared, mean over the samples.
    """
    layers, heads, _ = distances.shape
    counts = np.tile(np.arange(1, heads + 1), layers)
    labels, _, _ = cluster(np.repeat(distances, heads, axis=0), counts, nearest=True)
    return labels.reshape(layers, heads, heads).astype(np.int16)


def track_clusters(statistics: HeadStatistics, num_clusters: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Measure how the clusters of the first n tokens change with n (paper, Section 3.3, Figure 9).

    Returns:
        changes ``[L, history - 1]``: share of heads that change clusters from n to n + 1 tokens, under the best
        matching of the labels; agreement ``[L, history]``: adjusted Rand index against the whole sequence. Means over
        the samples; NaN without samples.
    """
    layers, history = statistics.options.layers, statistics.options.trace_tokens
    changes, agreement = np.zeros((layers, history - 1)), np.zeros((layers, history))
    samples = len(statistics.series["steps"])
    for steps, whole in zip(statistics.series["steps"], statistics.series["whole"], strict=True):
        seen = steps.cumsum(1, dtype=np.float32)  # [L, history, H, H]: of the features of the first n tokens
        labels, _, _ = cluster(seen.reshape(-1, *seen.shape[2:]), np.repeat(num_clusters, history), nearest=True)
        final, _, _ = cluster(whole.astype(np.float32), np.array(num_clusters), nearest=True)
        labels = labels.reshape(layers, history, -1)
        agreement += adjusted_rand(labels, np.broadcast_to(final[:, None], labels.shape))
        changes += changed_heads(labels[:, :-1], labels[:, 1:]) / labels.shape[-1]
    with np.errstate(invalid="ignore"):
        return changes / samples, agreement / samples
