"""CHAI-QKV: the representative's values stand for its members' too (paper, Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chai.methods.chai import Chai


@dataclass
class ChaiQkv(Chai):
    """CHAI that prunes V as it prunes Q and K: what it costs to keep the members' own values shows beside it.

    With ``r(c(h))`` the representative of head ``h``'s cluster, found as CHAI finds it,

        y_h = A_{r(c(h))} V_{r(c(h))},

    where CHAI has ``A_{r(c(h))} V_h``: all heads of a cluster have one output. The first ``tokens`` real tokens still
    have multi-head attention; after them the values of redundant heads leave the cache with their keys, and are no
    longer computed. With grouped queries a representative reads the value head that it reads in the model.

    Attributes: as :class:`chai.methods.chai.Chai`.
    """

    shares_values: ClassVar[bool] = True
