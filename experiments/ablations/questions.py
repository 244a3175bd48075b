"""The questions, and the choices that answer each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from chai.clustering.distances import METRICS
from experiments.ablations.settings import PAPER_TOKENS, Setting

#: More warm-up tokens than in the paper, at which some questions are asked again.
MORE_TOKENS = 32
SAMPLES = (8, 32, 128, 512, 1024)
#: Texts of an offline pass where domains are compared: as many as each of them has.
DOMAIN_SAMPLES = 32


@dataclass(frozen=True)
class Scope:
    """What the choices depend on: the paper's method on this model, and the run's corpora and sizes."""

    paper: Setting
    num_heads: int
    first_scored: int  # position; no more warm-up tokens than this
    samples: int  # texts of the longest offline pass
    corpora: tuple[str, ...]  # names: that of the run, and the further ones


Choices = dict[str, Setting]


def warmup(scope: Scope) -> Choices:
    """Return numbers of warm-up tokens."""
    counts = [count for count in (1, 2, 3, 5, 8, 16, 32, 64, 128) if count <= scope.first_scored]
    return {f"{count} token{'s' * (count > 1)}": replace(scope.paper, tokens=count) for count in counts}


def metric(scope: Scope) -> Choices:
    """Return distances between heads, at few and at more warm-up tokens; that of the output needs k-medoids."""
    return {
        f"{name}, {tokens} tokens": replace(
            scope.paper, metric=name, tokens=tokens, membership="kmedoids" if name == "output" else "kmeans"
        )
        for tokens in (PAPER_TOKENS, MORE_TOKENS)
        if tokens <= scope.first_scored
        for name in METRICS
    }


def representative(scope: Scope) -> Choices:
    """Return representatives of clusters by K-means; the nearest to the mean is the medoid of squared distances."""
    return {name: replace(scope.paper, representative=name) for name in ("nearest", "lowest", "output")}


def membership(scope: Scope) -> Choices:
    """Return ways to find clusters."""
    return {name: replace(scope.paper, membership=name) for name in ("kmeans", "kmedoids", "agglomerative")}


def features(scope: Scope) -> Choices:
    """Return attention with and without the causal mask, for the paper's membership and for the release's."""
    return {
        f"{name}, {how}": replace(scope.paper, features=name, membership=how)
        for how in ("kmeans", "agglomerative")
        for name in ("causal", "unmasked")
    }


def samples(scope: Scope) -> Choices:
    """Return static maps by output error from more and more texts, beside the paper's map from the request."""
    own = scope.corpora[0]
    static = {
        f"static, {count} texts": replace(scope.paper, static=(own, count))
        for count in SAMPLES
        if count <= scope.samples
    }
    return {"from the request, as in the paper": scope.paper, **static}


def domain(scope: Scope) -> Choices:
    """Return static maps from texts of each corpus."""
    count = min(DOMAIN_SAMPLES, scope.samples)
    return {f"static, {count} texts of {name}": replace(scope.paper, static=(name, count)) for name in scope.corpora}


def counts(scope: Scope) -> Choices:
    """Return rules that choose k for each request and layer, beside the same k everywhere."""
    least = max(1, scope.num_heads // 3)
    fixed = {f"k = {k} everywhere": replace(scope.paper, clusters=k) for k in range(least, scope.num_heads)}
    rules: Choices = {f"by request: {name}": replace(scope.paper, counts=name) for name in ("silhouette", "gap")}
    thresholds = {
        f"by request: error at most {100 * share:g} %": replace(scope.paper, counts="error", threshold=share)
        for share in (0.1, 0.03, 0.01)
    }
    return {**fixed, **rules, **thresholds}


def layers(scope: Scope) -> Choices:
    """Return groups of consecutive layers that share the clusters of the first."""
    return {
        "each layer its own": scope.paper,
        **{f"{size} layers share": replace(scope.paper, layers_sharing=size) for size in (2, 4)},
    }


def length(scope: Scope) -> Choices:
    """Return maps of the first tokens, kept or made again."""
    found = {f"first {PAPER_TOKENS} tokens": scope.paper}
    if scope.first_scored >= MORE_TOKENS:
        found[f"first {MORE_TOKENS} tokens"] = replace(scope.paper, tokens=MORE_TOKENS)
    again = {f"again every {every:,} tokens": replace(scope.paper, every=every) for every in (1024, 256)}
    return {**found, **again}


def values(scope: Scope) -> Choices:
    """Return which members use their representative's values."""
    return {
        "none": scope.paper,
        "half of the members": replace(scope.paper, values="half"),
        "all members (CHAI-QKV)": replace(scope.paper, values="shared"),
    }


def quantization(scope: Scope) -> Choices:
    """Return rounded keys and values, with and without clusters."""
    plain = replace(scope.paper, all_heads=True)
    return {
        "MHA, 8 bits": replace(plain, bits=8),
        "MHA, 4 bits": replace(plain, bits=4),
        "CHAI": scope.paper,
        "CHAI, 8 bits": replace(scope.paper, bits=8),
        "CHAI, 4 bits": replace(scope.paper, bits=4),
    }


def inputs(scope: Scope) -> Choices:
    """Return the paper's method, which is measured on the texts of all corpora."""
    return {"CHAI": scope.paper}


#: Name -> the function that returns its choices. ``stability`` has none: it compares clusters.
QUESTIONS: dict[str, Callable[[Scope], Choices]] = {
    "warmup": warmup,
    "metric": metric,
    "representative": representative,
    "membership": membership,
    "features": features,
    "samples": samples,
    "domain": domain,
    "counts": counts,
    "stability": lambda scope: {},
    "layers": layers,
    "length": length,
    "values": values,
    "inputs": inputs,
    "quantization": quantization,
}
#: Those that look at the texts of every corpus.
EVERY_CORPUS = ("stability", "inputs")
