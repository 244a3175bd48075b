"""Static clusters: found offline by the heads' activations, the same for every request (paper, Figures 1 and 14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from chai.errors import ChaiError
from chai.heads import HeadClusters
from chai.methods.base import Method
from chai.methods.chai import ClusteredHeadAttention
from chai.methods.random_heads import Random


@dataclass
class Static(ClusteredHeadAttention):
    """Clustered head attention with the clusters of a head profile, for any number of clusters.

    With ``D_ij`` the squared distance between the attention of heads ``i`` and ``j``, averaged over a corpus, the
    clusters of a layer are the K-means of its heads by D: the clustering of the heads' attention on all samples side
    by side (Section 3.3). They are known before the first token: keys of other heads are never stored.

    Attributes:
        clusters: See :class:`chai.methods.clustering.ClusteringMethod`; the paper's figures have 4, 8, 16 and 24.
        seed: Not a setting (clustering is deterministic).
        profile: Folder of the head profile (:mod:`chai.offline.head_profile`) whose distances are clustered.

    Raises:
        ValueError: The head profile is missing, or of a model of another shape.
    """

    given_counts_first: ClassVar[bool] = True

    clusters: list[int] | int | str | None = 4
    seed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._profile is None:
            raise ChaiError("a head profile of this model is needed", remedy="make_profile")

    def with_num_clusters(self, k: int) -> Method:
        """Return random clusters, which are as fast: a profile covers only the layers of its own model."""
        return Random(clusters=k)

    def cluster_heads(
        self,
        layers: Sequence[int],
        num_clusters: Sequence[int],
        query: Tensor,
        key: Tensor,
        scaling: float,
        softcap: float | None = None,
        outputs: Tensor | None = None,
    ) -> list[HeadClusters]:
        """Return the clusters of the head profile, the same for every row."""
        assert self._profile is not None
        rows = [self._profile.clusters(layer, k) for layer, k in zip(layers, num_clusters, strict=True)]
        return [row.repeat(query.shape[1], query.device) for row in rows]
