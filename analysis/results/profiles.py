"""Finished profile runs with their arrays: statistics of a model's attention heads."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors

from analysis.results.files import SkippedRun, read_file, read_json, require
from analysis.results.runs import MAIN, MissingRun, Results, Run, RunQuery, base_name

PROFILE = RunQuery(
    "profile",
    fields=("heads", "layers", "heads_kept", "dtype", "versions"),
    command="python run.py experiment=profile model=llama7b corpus=c4",
    small_command="python run.py experiment=profile model=tiny",
)
FORMAT = 1
SAMPLE = 0  # the kept sample that figures show
KINDS = {"i": "integers", "f": "floating-point numbers"}
#: Kind of number and axes of each array: L layers, H query heads, S kept samples, N tokens of history (n: one less),
#: M tokens of a map, K the most clusters of any layer.
TENSORS = {
    "clusters": "iL", "assignment": "iLH", "representatives": "iLK",
    "error": "fLH", "error_sd": "fLH", "error_static": "fLH",
    "correlation": "fLHH", "sample_correlation": "fSLHH", "maps": "fSLHM",
    "cluster_sizes": "fLHH", "cluster_sizes_sd": "fLHH",
    "changes": "fLn", "agreement": "fLN",
    "entropy": "fLH", "first_token": "fLH", "own_token": "fLH",
}  # fmt: skip
#: Arrays that profiles of earlier versions lack; T: samples.
OPTIONAL = {"assignment_by_k": "iLHH", "sample_error": "fTLH", "within": "fLH", "between": "fLH"}
#: Lists in ``stability`` of profile.json, of a number for each layer.
STABILITY = ("low", "high", "halves_equal", "halves_difference")


class ClustersError(ValueError):
    """Raised for a number of clusters that no layer of a profile can have."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Statistics of a model's heads over a corpus, and the attention of a few kept samples."""

    run: Run
    about: dict[str, Any]  # profile.json
    arrays: dict[str, NDArray[Any]]  # profile.safetensors, see TENSORS
    layers: int
    heads: int  # query heads of a layer
    clusters: list[int]  # of each layer
    samples: int  # texts that the statistics are taken over

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array by name."""
        return self.arrays[name]

    @property
    def clustered_layers(self) -> list[int]:
        """Layers with more than one cluster and fewer clusters than heads."""
        return [layer for layer, k in enumerate(self.clusters) if 1 < k < self.heads]

    @property
    def rule(self) -> str:
        """Name of the rule that chose the numbers of clusters: ``plateau``, ``knee`` or ``sensitivity``.

        Earlier versions had ``saving`` and ``error``, both with the name ``budget`` in their file.
        """
        rule = self.about["rule"]
        return next((name for name in ("saving", "error") if name in rule), str(rule["name"]))

    @property
    def stability(self) -> dict[str, Any] | None:
        """Spread of the numbers of clusters over samples of the texts, by layer; ``None`` if it is not known."""
        return self.about.get("stability")

    @property
    def counts_by_rule(self) -> dict[str, list[int]]:
        """Numbers of clusters of each layer that each rule chooses; empty in profiles of earlier versions."""
        return self.about.get("rules", {})

    def at(self, clusters: int | None) -> Profile:
        """Return the profile with the static clusters of another number of clusters, the same in every layer.

        Raises:
            ClustersError: A layer cannot have this number.
            MissingRun: The profile is of an earlier version, which kept the chosen clusters only.
        """
        if clusters is None:
            return self
        if not 1 <= clusters <= self.heads:
            raise ClustersError(f"{clusters}: a layer has {self.heads} heads; valid: 1 to {self.heads}")
        self.need("assignment_by_k")
        counts = [clusters] * self.layers
        arrays = {"clusters": np.array(counts), "assignment": self["assignment_by_k"][:, clusters - 1]}
        run = replace(self.run, result=self.run.result | {"heads_kept": counts})
        return replace(self, run=run, clusters=counts, arrays=self.arrays | arrays)

    def need(self, *names: str) -> None:
        """Raise :class:`MissingRun` if the profile is of an earlier version that did not save these arrays."""
        missing = [name for name in names if name not in self.arrays]
        if missing:
            raise MissingRun(
                f"the profile in {self.run.folder} is of an earlier version, without {', '.join(missing)} "
                "(force=true makes it again)"
            )

    def order(self, layer: int) -> list[NDArray[np.int64]]:
        """Return a layer's heads by cluster: the largest cluster first, heads of a cluster by number."""
        assignment = self["assignment"][layer]
        members = [np.flatnonzero(assignment == cluster) for cluster in np.unique(assignment)]
        return sorted(members, key=lambda heads: (-len(heads), heads[0]))

    @property
    def tokens(self) -> list[str]:
        """Tokens of the sample that is shown, at most as many as its maps have columns."""
        return list(self.about["kept"][SAMPLE]["tokens"][: self["maps"].shape[-1]])

    def map(self, layer: int) -> NDArray[np.floating[Any]]:
        """Return the attention of one decoding step of the sample, ``[heads, tokens]``, without padding."""
        return self["maps"][SAMPLE, layer, :, : len(self.tokens)]

    @property
    def sample_correlation(self) -> NDArray[np.floating[Any]]:
        """Correlation of heads in the sample, ``[layers, heads, heads]``."""
        return self["sample_correlation"][SAMPLE]


def best_profile(results: Results, prefer: Sequence[str] = MAIN) -> Profile:
    """Return the newest profile, of a preferred model if there is one; for errors see :func:`best_profiles`."""
    return best_profiles(results, prefer, most=1)[0]


def best_profiles(results: Results, prefer: Sequence[str], most: int) -> list[Profile]:
    """Return the newest profile of each of up to ``most`` models, preferred ones first; add them to ``results.used``.

    Raises:
        MissingRun: there is no profile.
    """
    profiles: dict[str, Profile] = {}
    for run in results.ranked(PROFILE, prefer=prefer):
        model = base_name(run.model)
        if model in profiles:
            continue
        # Load no more than needed: arrays are large.
        if profile := results.attempt(run.folder, load_profile, run):
            profiles[model] = profile
        if len(profiles) == most:
            break
    if not profiles:
        raise results.missing(PROFILE)
    results.used.extend(profile.run for profile in profiles.values())
    return list(profiles.values())


def other_seeds(results: Results, profile: Profile) -> dict[int, Run]:
    """Return the newest run of each other seed that differs from a profile's in nothing else; add them to ``used``."""
    same = _settings(profile.about)
    seeds: dict[int, Run] = {}
    for run in results.of(profile.run.model).ranked(PROFILE):
        seed = run.result.get("seed")
        if type(seed) is not int or seed == profile.run.result.get("seed") or seed in seeds:
            continue
        about = results.attempt(run.folder, read_json, run.folder / "profile.json")
        if about and _settings(about) == same and run.dtype == profile.run.dtype:
            seeds[seed] = run
    seeds = dict(sorted(seeds.items()))
    results.used.extend(seeds.values())
    return seeds


def _settings(about: dict[str, Any]) -> Any:
    """Return what is equal in profiles of the same model, corpus and rule, with other samples."""
    corpus = about.get("corpus") or {}
    names = ("name", "source", "fingerprint", "samples")
    return [about.get(name) for name in ("model", "features", "rule")] + [corpus.get(name) for name in names]


def load_profile(run: Run) -> Profile:
    """Load the profile of a run (SkippedRun: a file is missing or corrupt, or the files do not belong together)."""
    about = read_json(run.folder / "profile.json")
    if about.get("format") != FORMAT:
        raise SkippedRun(f"profile.json has format {about.get('format')}, expected {FORMAT}")
    try:
        sizes = {"L": about["model"]["layers"], "H": about["model"]["heads"], "S": len(about["kept"])}
        valid = all(type(size) is int and size > 0 for size in sizes.values()) and _is_complete(about)
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise SkippedRun("profile.json is incomplete")
    if (sizes["L"], sizes["H"]) != (run.result["layers"], run.result["heads"]):
        raise SkippedRun("profile.json and result.json describe different models")
    arrays = read_file(run.folder / "profile.safetensors", lambda path: _load_arrays(path, about["sha256"]))
    _check_arrays(arrays, sizes)
    if arrays["clusters"].tolist() != run.result["heads_kept"]:
        raise SkippedRun("profile.safetensors and result.json have different numbers of clusters")
    return Profile(run, about, arrays, sizes["L"], sizes["H"], run.result["heads_kept"], about["corpus"]["samples"])


def _is_complete(about: dict[str, Any]) -> bool:
    corpus = about["corpus"]
    numbers = (corpus["samples"], corpus["longest"], about["decide_tokens"])
    tokens = [sample["tokens"] for sample in about["kept"]]
    return (
        all(type(number) is int for number in numbers)
        and "name" in about["rule"]
        and _lists_layers(about.get("rules", {}), about.get("rules", {}), about["model"]["layers"])
        and _lists_layers(about.get("stability") or {}, STABILITY, about["model"]["layers"])
        and isinstance(corpus["name"], str)
        and isinstance(about["sha256"], str)
        and all(len(text) > 0 and all(isinstance(token, str) for token in text) for text in tokens)
    )


def _lists_layers(lists: dict[str, Any], names: Collection[str], layers: int) -> bool:
    """Return whether each of the named entries is a number for each layer; there may be no entry at all."""
    return not lists or all(
        len(lists[name]) == layers and all(isinstance(value, (int, float)) for value in lists[name]) for name in names
    )


def _load_arrays(path: Path, digest: str) -> dict[str, NDArray[Any]]:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise SkippedRun(f"{path.name} is corrupt, or not the one that profile.json describes")
    return load_safetensors(content)


def _check_arrays(arrays: dict[str, NDArray[Any]], sizes: dict[str, int]) -> None:
    """Raise :class:`SkippedRun` unless the arrays have the types, shapes and ranges of :data:`TENSORS`."""
    require("profile.safetensors", TENSORS, arrays)
    # The lengths of some axes are known from the arrays only.
    for axis, name in (("M", "maps"), ("N", "agreement")):
        shape = arrays[name].shape
        sizes = sizes | {axis: shape[-1] if shape else 0}
    sizes |= {"n": sizes["N"] - 1, "K": max(arrays["clusters"].max(initial=0), 1)}
    if "sample_error" in arrays:
        sizes["T"] = len(arrays["sample_error"]) if arrays["sample_error"].shape else 0
    kinds = TENSORS | {name: axes for name, axes in OPTIONAL.items() if name in arrays}
    for name, (kind, *axes) in kinds.items():
        array, shape = arrays[name], tuple(sizes[axis] for axis in axes)
        if array.dtype.kind != kind:
            raise SkippedRun(f"profile.safetensors: {name} has dtype {array.dtype}, expected {KINDS[kind]}")
        if array.shape != shape or 0 in shape:
            raise SkippedRun(f"profile.safetensors: {name} has shape {array.shape}, expected {shape}")
    clusters, assignment = arrays["clusters"], arrays["assignment"]
    if not (clusters.min() >= 1 and clusters.max() <= sizes["H"]):
        raise SkippedRun("profile.safetensors: clusters are not between 1 and the number of heads")
    if assignment.min() < 0 or (assignment >= clusters[:, None]).any():
        raise SkippedRun("profile.safetensors: assignment has clusters that do not exist")
