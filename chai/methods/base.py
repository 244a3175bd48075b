"""What a method is: a dataclass of hyper-parameters that is applied to a model for the length of a ``with`` block."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from chai.clustering import HeadClusters
from chai.flops import LayerWork
from chai.presets import resolve_clusters
from chai.profile import Profile
from chai.runtime import check_family, clustered, new_cache

#: ``real``: less is stored and computed. ``simulated``: masked, nothing is saved. ``none``: nothing is claimed.
Saving = Literal["real", "simulated", "none"]


class Method(ABC):
    """A way of running a model's attention."""

    saving: ClassVar[Saving]

    @abstractmethod
    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply to ``model`` inside a ``with`` block; the model is restored at its end, also after an exception."""

    @abstractmethod
    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """An empty K,V cache for one batch, to be passed as ``past_key_values``.

        Args:
            model: that it is for.
            reserve: tokens to make room for at once, where the length is known; a hint.
        """

    @abstractmethod
    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """For each layer of a model of this configuration, the number of heads whose scores are computed."""

    def work(self, config: PreTrainedConfig) -> list[LayerWork]:
        """What each layer computes of a prompt by the algorithm; heads that aren't kept take no part at all."""
        return [LayerWork(kept, kept, kept) for kept in self.heads_kept(config)]

    def note(self, config: PreTrainedConfig) -> str:
        """One line that a user should know about this method on such a model; mostly none."""
        return ""

    def check(self, config: PreTrainedConfig) -> None:
        """Verify that the method can run on such a model, before its weights are loaded.

        Raises:
            ValueError: it can't; names what is wrong and what is valid.
        """

    def check_weights(self, model: PreTrainedModel) -> None:
        """Verify what only the loaded weights tell.

        Raises:
            ValueError: the method was prepared for other weights.
        """


@dataclass
class ClusteredMethod(Method):
    """Base of the methods that compute one head per cluster. A subclass says which heads belong together.

    Attributes:
        clusters: number of clusters of each layer: a list, one count for all layers, or the name of a preset
            (:data:`chai.presets.PRESETS`).
        seed: of everything random in the choice.
        profile: folder of a profile (:mod:`chai.profile`), whose counts take the place of ``clusters``.

    Raises:
        ProfileError: there is no such profile, or it is damaged.
    """

    clusters: list[int] | int | str | None = None
    seed: int = 0
    profile: str | None = None

    saving: ClassVar[Saving] = "real"
    #: A representative's values stand for its members' too, and theirs leave the cache (paper, Table 4).
    shares_values: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._profile = None if self.profile is None else Profile.load(self.profile)

    @abstractmethod
    def decide(
        self, layers: Sequence[int], counts: Sequence[int], query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> list[HeadClusters]:
        """Memberships of all clustered layers at once.

        Args:
            layers: indices of the ``L`` layers.
            counts: k of each.
            query: ``[L, B, H, tokens, D]``, of the first tokens of each row.
            key: ``[L, B, H_key, tokens, D]``.
            scaling: factor of the scores.
        """

    def with_count(self, k: int) -> ClusteredMethod:
        """The method for a model whose layers all have ``k`` clusters, whatever this one's profile says."""
        return dataclasses.replace(self, clusters=k, profile=None)

    @property
    def first_tokens(self) -> int:
        """Real tokens of multi-head attention before the membership is decided."""
        return 0

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Apply; see :func:`chai.runtime.clustered`."""
        return clustered(model, self._rule(model))

    def new_cache(self, model: PreTrainedModel, reserve: int = 0) -> Cache:
        """An empty :class:`chai.cache.ClusteredCache`."""
        return new_cache(model, self._rule(model), reserve)

    def heads_kept(self, config: PreTrainedConfig) -> list[int]:
        """K of each layer.

        Raises:
            ValueError: counts or a profile that don't fit the model, or neither.
        """
        if self._profile is not None:
            self._profile.check(config)
            return self._profile.counts
        if self.clusters is None:
            raise ValueError("neither clusters nor a profile is given")
        return resolve_clusters(self.clusters, config.num_hidden_layers, config.num_attention_heads)

    def work(self, config: PreTrainedConfig) -> list[LayerWork]:
        """Scores of k heads once the membership is known; averages of all heads, or of k; W_O of all."""
        heads = config.num_attention_heads
        return [
            LayerWork(k, k if self.shares_values else heads, heads, first_tokens=self.first_tokens)
            for k in self.heads_kept(config)
        ]

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a family that isn't supported, and counts that don't fit."""
        check_family(config)
        self.heads_kept(config)

    def _rule(self, model: PreTrainedModel) -> MethodRule:
        return MethodRule(self, tuple(self.heads_kept(model.config)))


@dataclass(frozen=True)
class MethodRule:
    """A method together with the counts it has for one model: what the caches hold on to.

    Two rules are the same where hyper-parameters and counts are, so a cache, or a copy of one, fits them all.
    """

    method: ClusteredMethod
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """See :class:`chai.membership.MembershipRule`."""
        return self.method.first_tokens

    @property
    def shares_values(self) -> bool:
        """See :class:`chai.membership.MembershipRule`."""
        return self.method.shares_values

    def clusters_of(self, layer: int) -> int:
        """See :class:`chai.membership.MembershipRule`."""
        return self.counts[layer]

    def decide(
        self, layers: Sequence[int], query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> list[HeadClusters]:
        """See :class:`chai.membership.MembershipRule`."""
        return self.method.decide(layers, [self.counts[layer] for layer in layers], query, key, scaling)


def plain_cache(model: PreTrainedModel) -> Cache:
    """The cache that ``transformers`` itself would use."""
    return DynamicCache(config=model.config)
