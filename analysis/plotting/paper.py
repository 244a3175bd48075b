"""The paper's numbers that figures draw, from ``results/paper``, where each is written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.results.files import SkippedRun, read_csv, read_file
from analysis.tables import specs
from analysis.tables.settings import defaults

#: What "4, 8, 16, 24" in Figures 1 and 14 can mean: heads that are kept, or heads that are combined into one cluster.
KEPT, COMBINED = "kept", "combined"


@dataclass(frozen=True)
class PaperNumber:
    """The number of a claim."""

    value: float
    model: str  # the model that it is of
    options: dict[str, str]  # conditions under which it holds, such as length and layer


def number(claim: str) -> PaperNumber:
    """Return the number of a claim, by its id (SkippedRun: ``claims.csv`` is missing, corrupt or has no such claim)."""
    path = specs.PAPER / "claims.csv"
    for line in read_file(path, read_csv):
        if line.get("id") == claim:
            try:
                options = dict(pair.split("=", 1) for pair in line["measure"].split()[1:])
                return PaperNumber(float(line["value"]), line["model"], options)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise SkippedRun(f"{path.name} is corrupt: claim {claim}") from None
    raise SkippedRun(f"{path.name} has no claim {claim}")


def reading(method: str, k: int, heads: int) -> str | None:
    """Return which reading of Figure 1's numbers of heads a cluster count belongs to; ``None``: to neither.

    The numbers are of the paper's model, and are scaled to ``heads``, the query heads of a layer.

    Raises:
        SkippedRun: ``figure1.csv`` is missing or corrupt.
    """
    for n in figure1_numbers(method, heads):
        if k == n:
            return KEPT
        if k == clusters_left(n, heads):
            return COMBINED
    return None


def clusters_left(combined: int, heads: int) -> int:
    """Return the clusters of a layer in which some heads form one cluster, and each other head one of its own."""
    return heads - combined + 1


def figure1_numbers(method: str, heads: int) -> Sequence[int]:
    """Return the numbers of heads of a method in Figure 1, scaled to a model; empty for methods without."""
    path = specs.PAPER / "figure1.csv"
    for line in read_file(path, read_csv):
        try:
            if line["method"] == method:
                paper_heads = int(defaults(f"model/{line['model']}")["architecture"]["num_attention_heads"])
                return [round(int(n) * heads / paper_heads) for n in line["heads"].split()]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise SkippedRun(f"{path.name} is corrupt") from None
    return []
