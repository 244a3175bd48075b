"""One choice of each of the questions, and the forward pass that simulates it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai.attention import attention_weights
from chai.clustering.assignment import Membership, Representative, clusters_by_cost, feature_distances
from chai.clustering.distances import Metric, output_factors, squared_distances
from chai.clustering.features import attention_features
from chai.clustering.kmeans import cluster
from chai.heads import repeat_kv
from chai.methods.chai import Chai
from chai.offline.head_profile import static_clusters
from chai.patching.apply import AttentionInputs
from chai.patching.outputs import HeadOutputs, output_projections, output_weight
from experiments.ablations.counts import COUNTS
from experiments.ablations.mapped import Choose, MappedPass, Segment, head_of, shared_value_errors

PAPER_TOKENS = 5  # of the warm-up (paper, Section 3.3)
#: The corpus, and the number of its texts, that a static map is made of.
StaticSource = tuple[str, int]


@dataclass(frozen=True)
class Setting:
    """What is chosen; the defaults are the paper's method.

    Attributes:
        clusters: k of every layer.
        tokens: Warm-up tokens, by which the heads are clustered.
        metric: Distance between heads.
        membership: How clusters are found.
        representative: Of a cluster.
        features: ``causal`` or ``unmasked`` attention.
        counts: A name of :data:`experiments.ablations.counts.COUNTS`: k by request in place of ``clusters``.
        threshold: Of ``counts=error``.
        static: Clusters from an offline pass in place of those of the request.
        layers_sharing: Consecutive layers that use the clusters of the first of them.
        every: Tokens after which the heads are clustered again, by the attention of the last ``window`` tokens.
        window: See ``every``.
        values: Members that use the values of their representative: ``own`` (none), ``half`` (the half of them that
            it costs least in the warm-up), ``shared`` (all).
        bits: Of keys and values, before they are read by anything.
        all_heads: No clusters at all: each head attends for itself.
    """

    clusters: int
    tokens: int = PAPER_TOKENS
    metric: Metric = "attention"
    membership: Membership = "kmeans"
    representative: Representative = "nearest"
    features: Literal["causal", "unmasked"] = "causal"
    counts: str | None = None
    threshold: float = 0.0
    static: StaticSource | None = None
    layers_sharing: int = 1
    every: int | None = None
    window: int = 32
    values: Literal["own", "half", "shared"] = "own"
    bits: int | None = None
    all_heads: bool = False

    @property
    def key(self) -> str:
        """Return the values that differ from the defaults: the name under which measurements are saved."""
        fields = dataclasses.fields(self)
        return " ".join(
            f"{field.name}={getattr(self, field.name)}"
            for field in fields
            if field.name == "clusters" or getattr(self, field.name) != field.default
        )


class Passes:
    """Builds the pass of a setting for one model."""

    def __init__(self, model: PreTrainedModel, costs: Mapping[StaticSource, np.ndarray]) -> None:
        """Take the costs of the output ``[L, H, H]`` of the offline passes that static maps are made of."""
        self._model, self._costs = model, costs

    @cached_property
    def _outputs(self) -> HeadOutputs:
        return HeadOutputs(self._model)

    @cached_property
    def _factors(self) -> list[Tensor]:
        """Factors of the output projection of each layer, ``[H, D, D]``."""
        heads = self._model.config.num_attention_heads
        return [output_factors(output_weight(module), heads) for module in output_projections(self._model)]

    def build(self, setting: Setting) -> MappedPass:
        """Return a new pass."""
        if setting.all_heads:
            return MappedPass(lambda inputs: [], bits=setting.bits)
        choose = self._static(setting) if setting.static is not None else self._online(setting)
        if setting.layers_sharing > 1:
            choose = _first_of_each(choose, setting.layers_sharing)
        return MappedPass(choose, setting.tokens, setting.bits)

    def _static(self, setting: Setting) -> Choose:
        assert setting.static is not None
        cost = self._costs[setting.static].astype(np.float32)
        labels, representatives = static_clusters(cost, np.full(len(cost), setting.clusters), "output")
        maps = torch.from_numpy(np.take_along_axis(representatives, labels, 1))

        def choose(inputs: AttentionInputs) -> list[Segment]:
            heads = maps[inputs.layer_idx].to(inputs.query.device)
            return [Segment(setting.tokens, heads.expand(len(inputs.query), -1))]

        return choose

    def _online(self, setting: Setting) -> Choose:
        find = _by_request(setting) if setting.counts is not None else self._by_method(setting)

        def choose(inputs: AttentionInputs) -> list[Segment]:
            heads = find(inputs)
            segments = [Segment(setting.tokens, heads, self._shared(setting, inputs, heads))]
            if setting.every is not None:
                begins = range(setting.every, inputs.query.shape[2], setting.every)
                segments += [Segment(begin, _recent_map(inputs, begin, setting)) for begin in begins]
            return segments

        return choose

    def _by_method(self, setting: Setting) -> Callable[[AttentionInputs], Tensor]:
        method = Chai(
            clusters=setting.clusters, tokens=setting.tokens, metric=setting.metric, membership=setting.membership,
            representative=setting.representative, features=setting.features,
        )  # fmt: skip

        def find(inputs: AttentionInputs) -> Tensor:
            layer, tokens = inputs.layer_idx, setting.tokens
            query, key, value = (part[None, :, :, :tokens] for part in (inputs.query, inputs.key, inputs.value))
            outputs = self._outputs([layer], value) if method.needs_outputs else None
            (clusters,) = method.cluster_heads(
                [layer], [setting.clusters], query, key, inputs.scaling, inputs.softcap, outputs
            )
            return head_of(clusters)

        return find

    def _shared(self, setting: Setting, inputs: AttentionInputs, heads: Tensor) -> Tensor | None:
        """Return the heads that use the values of their representatives."""
        if setting.values == "own":
            return None
        members = heads != torch.arange(heads.shape[1], device=heads.device)
        if setting.values == "shared":
            return members
        errors = shared_value_errors(inputs, heads, setting.tokens, self._factors[inputs.layer_idx])
        rank = torch.where(members, errors, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return members & (rank < members.sum(1, keepdim=True) // 2)


def _by_request(setting: Setting) -> Callable[[AttentionInputs], Tensor]:
    """Return K-means with k chosen for each request."""
    assert setting.counts is not None
    count = COUNTS[setting.counts]

    def find(inputs: AttentionInputs) -> Tensor:
        query, key = inputs.query[:, :, : setting.tokens], inputs.key[:, :, : setting.tokens]
        features = attention_features(
            query, repeat_kv(key, query.shape[1]), inputs.scaling, softcap=inputs.softcap
        )  # [B, H, t * t]
        distances = feature_distances(features[None])[0].cpu().numpy()
        counts = count(distances, features.cpu().numpy(), setting.threshold)
        labels, representatives, _ = cluster(distances, counts, nearest=True)
        return torch.from_numpy(np.take_along_axis(representatives, labels, 1)).to(query.device)

    return find


def _recent_map(inputs: AttentionInputs, begin: int, setting: Setting) -> Tensor:
    """Cluster the heads by the attention of the last tokens before ``begin``: their representatives, ``[B, H]``."""
    first = max(0, begin - setting.window)
    query, num_heads = inputs.query[:, :, first:begin].float(), inputs.query.shape[1]
    key = repeat_kv(inputs.key[:, :, :begin].float(), num_heads)
    mask = None if inputs.mask is None else inputs.mask[:, :, first:begin, :begin]
    weights = attention_weights(query, key, inputs.scaling, mask, softcap=inputs.softcap)
    distances = squared_distances(weights.flatten(-2))
    (clusters,) = clusters_by_cost(distances[None], [setting.clusters])
    return head_of(clusters)


def _first_of_each(choose: Choose, size: int) -> Choose:
    """Use the maps of the first of each ``size`` consecutive layers in the others."""
    found: dict[int, list[Segment]] = {}

    def shared(inputs: AttentionInputs) -> list[Segment]:
        if inputs.layer_idx % size == 0:
            found[inputs.layer_idx] = list(choose(inputs))
        return found[inputs.layer_idx // size * size]

    return shared
