"""A model's profile: how many clusters each layer gets and which heads belong together, found offline once.

Saved as ``profile.safetensors`` (counts, static membership, statistics) and ``profile.json`` (which model, which
corpus, which rule), the second with a digest of the first; docs/results.md lists the tensors. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize
from transformers import PreTrainedConfig

from chai.agreement import adjusted_rand, changed_heads
from chai.clustering import HeadClusters
from chai.kernels.kmeans import cluster
from chai.statistics import HeadStatistics

FORMAT = 1
ABOUT, TENSORS = "profile.json", "profile.safetensors"
#: What of a model's shape a profile is bound to.
SHAPE = ("model_type", "hidden_size", "layers", "heads", "key_heads")


class ProfileError(ValueError):
    """A profile that can't be read, or that is of another model."""


def model_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """The model's shape under the names of :data:`SHAPE`."""
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "key_heads": getattr(config, "num_key_value_heads", None) or heads,
    }


def write_bytes(path: Path, content: bytes) -> None:
    """Put bytes into a file."""
    path.write_bytes(content)


@dataclass(frozen=True, eq=False)
class Profile:
    """What the offline phase found.

    Attributes:
        about: ``profile.json``.
        arrays: the tensors.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def counts(self) -> list[int]:
        """Clusters of each layer."""
        return [int(k) for k in self.arrays["clusters"]]

    def static(self, layer: int, k: int | None = None) -> HeadClusters:
        """The membership that suits all samples best, for one row.

        Args:
            layer: index.
            k: clusters; those of the profile if not given.
        """
        if k is None:
            k = self.counts[layer]
            assignment, representatives = self.arrays["assignment"][layer], self.arrays["representatives"][layer, :k]
        else:
            distances = self.arrays["distances"][layer : layer + 1].astype(np.float32)
            labels, heads, _ = cluster(distances, np.array([k]), nearest=True)
            assignment, representatives = labels[0], heads[0]
        return HeadClusters(torch.from_numpy(assignment)[None], torch.from_numpy(representatives)[None])

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a model of another shape.

        Raises:
            ProfileError: names what differs.
        """
        there, here = self.about["model"], model_shape(config)
        differing = [name for name in SHAPE if there[name] != here[name]]
        if differing:
            told = ", ".join(f"{name} {there[name]} instead of {here[name]}" for name in differing)
            raise ProfileError(f"this profile is of another model, {there['name']}: {told}")

    def save(self, folder: Path, write: Callable[[Path, bytes], object] = write_bytes) -> None:
        """Write both files.

        Args:
            folder: where to.
            write: puts bytes into a file.
        """
        tensors = serialize({name: np.ascontiguousarray(array) for name, array in self.arrays.items()})
        about = self.about | {"sha256": hashlib.sha256(tensors).hexdigest()}
        write(folder / TENSORS, tensors)
        write(folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile from its folder, or from either of its files.

        Raises:
            ProfileError: there is none, it is truncated or damaged, or it is of another version.
        """
        path = Path(path)
        folder = path.parent if path.name in (ABOUT, TENSORS) else path
        if not (folder / ABOUT).is_file():
            raise ProfileError(f"no profile in {folder}: it has no {ABOUT} (experiment=profile makes one)")
        try:
            about = json.loads((folder / ABOUT).read_text())
            content = (folder / TENSORS).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ProfileError(f"the profile in {folder} can't be read: {reason}") from None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ProfileError(f"{folder / ABOUT} is no profile of format {FORMAT}")
        if hashlib.sha256(content).hexdigest() != about.get("sha256"):
            raise ProfileError(f"{folder / TENSORS} is damaged or truncated: {ABOUT} names other content")
        try:
            profile = cls(about, parse(content))
            shape = (about["model"]["layers"], about["model"]["heads"])
            fits = profile.arrays["assignment"].shape == shape and len(profile.counts) == shape[0]
        except (SafetensorError, KeyError, TypeError) as error:
            raise ProfileError(f"the profile in {folder} lacks {error}") from None
        if not fits:
            raise ProfileError(f"the profile in {folder} contradicts itself: its tensors aren't of its model's shape")
        return profile


def build_profile(
    statistics: HeadStatistics, counts: list[int], about: dict[str, Any], decide_tokens: int = 5
) -> Profile:
    """The profile that statistics and chosen counts make.

    Args:
        statistics: gathered over the corpus.
        counts: clusters of each layer.
        about: ``model``, ``corpus``, ``features``, ``rule``, ``versions``.
        decide_tokens: after which CHAI decides; a mark in Figure 9.
    """
    sums, samples, distances = statistics.sums, statistics.samples, statistics.distances.astype(np.float32)
    assignment, representatives, _ = cluster(distances, np.array(counts), nearest=True)
    representatives[representatives == assignment.shape[1]] = -1
    changes, agreement = follow_membership(statistics, counts)

    def deviation(name: str) -> np.ndarray:
        mean = sums[name] / samples
        return np.sqrt(np.maximum(sums[f"{name}_square"] / samples - mean**2, 0))

    series = {name: np.stack(statistics.series[name]) for name in ("maps", "sample_correlation")}
    arrays = {
        "clusters": np.array(counts),
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
        **{name: sums[name] / samples for name in ("entropy", "first_token", "own_token")},
        **series,
    }
    kept = [{"tokens": tokens} for tokens in statistics.kept_tokens]
    model = about["model"]
    read = sum(-(-k * model["key_heads"] // model["heads"]) for k in counts)
    saving = (1 - read / (len(counts) * model["key_heads"])) / 2
    return Profile({"format": FORMAT, **about, "decide_tokens": decide_tokens, "kept": kept, "saving": saving}, arrays)


def follow_membership(statistics: HeadStatistics, counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """How the membership found from the first n tokens changes with n (paper, section 3.3, Figure 9).

    Args:
        statistics: with the distances of single rows of attention.
        counts: clusters of each layer.

    Returns:
        changes ``[L, history - 1]``: share of heads that change clusters from n to n + 1 tokens, labels matched so that
        another name is no change; agreement ``[L, history]``: adjusted Rand index against the whole sequence. Means
        over the samples; NaN where there are none.
    """
    layers, history = statistics.wanted.layers, statistics.wanted.history
    changes, agreement = np.zeros((layers, history - 1)), np.zeros((layers, history))
    samples = len(statistics.series["steps"])
    for steps, whole in zip(statistics.series["steps"], statistics.series["whole"], strict=True):
        seen = steps.cumsum(1, dtype=np.float32)  # [L, history, H, H]: of the features of the first n tokens
        labels, _, _ = cluster(seen.reshape(-1, *seen.shape[2:]), np.repeat(counts, history), nearest=True)
        final, _, _ = cluster(whole.astype(np.float32), np.array(counts), nearest=True)
        labels = labels.reshape(layers, history, -1)
        agreement += adjusted_rand(labels, np.broadcast_to(final[:, None], labels.shape))
        changes += changed_heads(labels[:, :-1], labels[:, 1:]) / labels.shape[-1]
    with np.errstate(invalid="ignore"):
        return changes / samples, agreement / samples
