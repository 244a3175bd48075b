"""The paper's numeric claims, typed in ``results/paper/claims.csv``, each with ours and the verdict."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from analysis.report import _measures
from analysis.report._measures import Missing, Ours, Source
from analysis.report._verdict import BOUNDS, Bound, Verdict, judge
from analysis.saved import LeftOut, Run

COLUMNS = (
    "id",
    "claim",
    "statement",
    "model",
    "measure",
    "bound",
    "value",
    "unit",
    "tolerance",
    "source",
    "ours",
    "note",
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        id: names it; unique.
        statement: what is claimed, in words.
        model: of whose runs ours is taken; empty: of several.
        measure: the function of :mod:`analysis.report._measures` that finds ours.
        options: that function's arguments.
        bound: how the paper means its number.
        value: that number, with the digits that it has there.
        unit: of it.
        tolerance: in that unit.
        source: where in the paper.
        how: how ours is found, in words.
        note: what doesn't agree with another place of the paper, or what it leaves open.
    """

    id: str
    statement: str
    model: str
    measure: str
    options: dict[str, str]
    bound: Bound
    value: Decimal
    unit: str
    tolerance: Decimal
    source: str
    how: str
    note: str


@dataclass(frozen=True)
class Judged:
    """A claim, ours beside it, and the verdict.

    Attributes:
        claim: the paper's.
        verdict: by the rules.
        ours: the measured number; ``None``: there is none.
        commands: what measures it, or the rest of it.
        runs: ours is computed from.
    """

    claim: Claim
    verdict: Verdict
    ours: Ours | None
    commands: tuple[str, ...]

    @property
    def runs(self) -> Sequence[Run]:
        """Ours is computed from."""
        return self.ours.runs if self.ours else ()


def read(path: Path) -> list[Claim]:
    """All claims of the file.

    Raises:
        LeftOut: it is missing, or a line isn't what it must be.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise LeftOut(f"no {path.name}") from None
    except (OSError, ValueError, csv.Error):
        raise LeftOut(f"{path.name} is corrupt") from None
    return [_claim(path.name, number, line) for number, line in enumerate(lines, 2)]


def _claim(name: str, number: int, line: dict[str, str]) -> Claim:
    if set(line) != set(COLUMNS) or None in line.values():
        raise LeftOut(f"{name} is corrupt: line {number} hasn't the columns {', '.join(COLUMNS)}")
    measure, *options = line["measure"].split()
    if line["bound"] not in BOUNDS or measure not in _measures.MEASURES or not all("=" in pair for pair in options):
        raise LeftOut(f"{name} is corrupt: line {number} has no known bound or measure")
    try:
        value, tolerance = Decimal(line["value"]), Decimal(line["tolerance"])
    except InvalidOperation:
        raise LeftOut(f"{name} is corrupt: line {number} has no number") from None
    return Claim(
        line["id"], line["statement"], line["model"], measure, dict(pair.split("=", 1) for pair in options),
        line["bound"], value, line["unit"], tolerance, line["source"], line["ours"], line["note"],
    )  # fmt: skip


def judged(claims: Sequence[Claim], source: Source) -> list[Judged]:
    """Ours and the verdict for each claim.

    Args:
        claims: the paper's.
        source: the results.
    """
    return [_judged(claim, source) for claim in claims]


def _judged(claim: Claim, source: Source) -> Judged:
    try:
        ours = _measures.MEASURES[claim.measure](source, claim.model, **claim.options)
    except Missing as missing:
        return Judged(claim, "not run yet", None, missing.commands)
    verdict = judge(ours.interval, claim.bound, float(claim.value), float(claim.tolerance))
    if ours.commands and verdict != "not reproduced":  # a part of it: a limit can be broken already, but not kept
        verdict = "not run yet"
    return Judged(claim, verdict, ours, ours.commands)
