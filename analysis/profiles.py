"""Profiles of a model's heads read back: finished runs of ``experiment=profile`` with their arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse

from analysis.saved import MAIN, LeftOut, Results, Run, base_name, read_object

EXPERIMENT = "profile"
FIELDS = ("heads", "layers", "heads_kept", "dtype", "versions")
FORMAT = 1
KINDS = {"i": "whole numbers", "f": "floating-point numbers"}
#: Kind of number and axes of each tensor: L layers, H query heads, S kept samples, N tokens of history (n: one less),
#: M tokens of a map, K the most clusters of any layer.
TENSORS = {
    "clusters": "iL", "assignment": "iLH", "representatives": "iLK",
    "error": "fLH", "error_sd": "fLH", "error_static": "fLH",
    "correlation": "fLHH", "sample_correlation": "fSLHH", "maps": "fSLHM",
    "cluster_sizes": "fLHH", "cluster_sizes_sd": "fLHH",
    "changes": "fLn", "agreement": "fLN",
    "entropy": "fLH", "first_token": "fLH", "own_token": "fLH",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Profile:
    """What the heads of a model attend to, over a corpus and for a few kept samples.

    Attributes:
        run: the run that it is from.
        about: its ``profile.json``.
        arrays: its ``profile.safetensors``, see :data:`TENSORS`.
    """

    run: Run
    about: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array by name."""
        return self.arrays[name]

    @property
    def layers(self) -> int:
        """How many."""
        return len(self["clusters"])

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self["assignment"].shape[1])

    @cached_property
    def clusters(self) -> list[int]:
        """Chosen number of clusters of each layer."""
        return [int(k) for k in self["clusters"]]

    def order(self, layer: int) -> list[NDArray[np.int64]]:
        """A layer's heads by cluster, the largest cluster first, and within a cluster by number."""
        assignment = self["assignment"][layer]
        members = [np.flatnonzero(assignment == cluster) for cluster in np.unique(assignment)]
        return sorted(members, key=lambda heads: (-len(heads), heads[0]))

    def tokens(self, sample: int) -> list[str]:
        """The tokens that a kept sample's map spans: at most as many as it has columns."""
        return list(self.about["kept"][sample]["tokens"][: self["maps"].shape[-1]])

    def map(self, layer: int, sample: int = 0) -> NDArray[np.floating[Any]]:
        """Attention of one decoding step, heads x tokens, without the padding behind a short sample."""
        return self["maps"][sample, layer, :, : len(self.tokens(sample))]


def best(results: Results, prefer: Sequence[str] = MAIN) -> Profile:
    """The profile to draw: of a preferred model rather than others, then the newest; noted as used.

    Args:
        results: where it is looked for.
        prefer: models, the most wanted first.

    Raises:
        MissingRun: there is none.
    """
    return _pick(results, prefer, 1)[0]


def of_models(results: Results, prefer: Sequence[str], most: int = 2) -> list[Profile]:
    """One profile of each wanted model in the order of wanting; of any models, the first few of :func:`best`.

    Args:
        results: where they are looked for.
        prefer: models that come first where none are asked for.
        most: profiles where none are asked for; with random weights a model counts as the same.

    Raises:
        MissingRun: there is none, or none of one that was asked for.
    """
    if results.models:
        return [best(results.of(model)) for model in results.models]
    return _pick(results, prefer, most)


def _pick(results: Results, prefer: Sequence[str], most: int) -> list[Profile]:
    found: dict[str, Profile] = {}
    for run in results.ranked(EXPERIMENT, fields=FIELDS, prefer=prefer):
        model = base_name(run.model)
        if model in found:
            continue
        # Only what is drawn gets read, and what would have been drawn were it sound: arrays are large.
        try:
            found[model] = load(run)
        except LeftOut as reason:
            results.left_out[run.folder] = str(reason)
        if len(found) == most:
            break
    if not found:
        raise results.missing(EXPERIMENT)
    results.used.extend(profile.run for profile in found.values())
    return list(found.values())


def load(run: Run) -> Profile:
    """A run's profile.

    Raises:
        LeftOut: a file is missing or corrupt, or the two don't belong together.
    """
    about = read_object(run.folder / "profile.json")
    if about.get("format") != FORMAT:
        raise LeftOut(f"profile.json has format {about.get('format')}, not {FORMAT}")
    try:
        sizes = {"L": about["model"]["layers"], "H": about["model"]["heads"], "S": len(about["kept"])}
        known = all(type(size) is int and size > 0 for size in sizes.values())
        known &= all(type(about["corpus"][name]) is int for name in ("samples", "longest"))
        known &= all(type(about[name]) is int for name in ("decide_tokens",)) and "name" in about["rule"]
        known &= isinstance(about["corpus"]["name"], str) and isinstance(about["sha256"], str)
        for kept in about["kept"]:
            known &= len(kept["tokens"]) > 0 and all(isinstance(token, str) for token in kept["tokens"])
    except (KeyError, TypeError):
        known = False
    if not known:
        raise LeftOut("profile.json lacks what a profile has")
    if (sizes["L"], sizes["H"]) != (run.result["layers"], run.result["heads"]):
        raise LeftOut("profile.json and result.json are of different models")
    arrays = _arrays(run.folder / "profile.safetensors", about["sha256"])
    _check(arrays, sizes)
    if arrays["clusters"].tolist() != run.result["heads_kept"]:
        raise LeftOut("profile.safetensors and result.json have different numbers of clusters")
    return Profile(run, about, arrays)


def _arrays(path: Path, digest: str) -> dict[str, NDArray[Any]]:
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise LeftOut(f"{path.name} is corrupt, or not the one that profile.json describes")
        return parse(content)
    except FileNotFoundError:
        raise LeftOut(f"no {path.name}") from None
    except (OSError, SafetensorError, KeyError, ValueError):  # KeyError: a type of number that NumPy lacks
        raise LeftOut(f"{path.name} is corrupt") from None


def _check(arrays: dict[str, NDArray[Any]], sizes: dict[str, int]) -> None:
    lacking = [name for name in TENSORS if name not in arrays]
    if lacking:
        raise LeftOut(f"profile.safetensors has no {', '.join(lacking)}")
    columns = {axis: arrays[name].shape[-1:] for axis, name in (("M", "maps"), ("N", "agreement"))}
    sizes = sizes | {axis: shape[0] if shape else 0 for axis, shape in columns.items()}
    sizes |= {"n": sizes["N"] - 1, "K": max(arrays["clusters"].max(initial=0), 1)}
    for name, layout in TENSORS.items():
        kind, there = layout[0], arrays[name]
        shape = tuple(sizes[axis] for axis in layout[1:])
        if there.dtype.kind != kind:
            raise LeftOut(f"profile.safetensors: {name} is of {there.dtype}, not {KINDS[kind]}")
        if there.shape != shape or 0 in shape:
            raise LeftOut(f"profile.safetensors: {name} is {there.shape}, not {shape}")
    clusters, assignment = arrays["clusters"], arrays["assignment"]
    if not (clusters.min() >= 1 and clusters.max() <= sizes["H"]):
        raise LeftOut("profile.safetensors: clusters are not between 1 and the heads")
    if assignment.min() < 0 or (assignment >= clusters[:, None]).any():
        raise LeftOut("profile.safetensors: heads are in clusters that there are not")
