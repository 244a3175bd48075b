"""CHAI-QKV: members use the values of their representative as well (paper, Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from chai.attention import shared_value_attention
from chai.cache import ClusteredLayer
from chai.heads import HeadClusters, KVHeadMap
from chai.methods.chai import Chai


@dataclass
class ChaiQkv(Chai):
    """CHAI that prunes V as it prunes Q and K: the difference to CHAI is what the members' own values are worth.

    With ``r(c(h))`` the representative of head ``h``'s cluster, found as CHAI finds it,

        y_h = A_{r(c(h))} V_{r(c(h))},

    where CHAI has ``A_{r(c(h))} V_h``: all heads of a cluster have one output. Warm-up tokens still have multi-head
    attention. With grouped queries a representative reads the value head that it reads in the model.

    Attributes: as :class:`chai.methods.chai.Chai`.
    """

    shares_values: ClassVar[bool] = True

    def evict(self, layer: ClusteredLayer, clusters: HeadClusters) -> None:
        """Keep keys and values of the representatives alone."""
        layer.evict(clusters, values=True)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_map: KVHeadMap,
        scaling: float,
        mask: Tensor | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute ``y_h = A_{r(c(h))} V_{r(c(h))}``."""
        return shared_value_attention(query, key, value, head_map, scaling, mask, softcap)
