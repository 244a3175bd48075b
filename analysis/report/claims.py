"""The paper's numeric claims (``results/paper/claims.csv``), each with our number and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from analysis.report.measures import MEASURES, Ours, Source
from analysis.results.files import SkippedRun, read_csv, read_file
from analysis.results.runs import MissingRun, Run
from analysis.stats import BOUNDS, Bound, Verdict, judge

COLUMNS = tuple("id claim statement model measure bound value unit tolerance source ours note".split())


@dataclass(frozen=True)
class Claim:
    """A claim of the paper."""

    id: str
    statement: str
    model: str  # model of our number; empty: several
    measure: str  # function of analysis.report.measures that finds our number
    options: dict[str, str]  # its arguments
    bound: Bound  # meaning of the paper's number
    value: Decimal  # the paper's number, with the digits that it has there
    unit: str
    tolerance: Decimal  # in that unit
    source: str  # place in the paper
    how: str  # description of how our number is found
    note: str  # disagreement with another place in the paper, or what it leaves open


@dataclass(frozen=True)
class Judged:
    """A claim with our number and the verdict."""

    claim: Claim
    verdict: Verdict
    ours: Ours | None  # None: not measured
    commands: tuple[str, ...]  # measure what is missing
    runs: Sequence[Run] = ()  # source of our number


def read(path: Path) -> list[Claim]:
    """Read all claims (SkippedRun: the file is missing or corrupt)."""
    lines = enumerate(read_file(path, read_csv), 2)  # line 1 is the header
    return [_claim(f"{path.name} is corrupt: line {number}", line) for number, line in lines]


def _claim(place: str, line: dict[str, str]) -> Claim:
    if set(line) != set(COLUMNS) or None in line.values():
        raise SkippedRun(f"{place} does not have the columns {', '.join(COLUMNS)}")
    measure, *options = line["measure"].split()
    if line["bound"] not in BOUNDS or measure not in MEASURES or not all("=" in pair for pair in options):
        raise SkippedRun(f"{place} has an unknown bound or measure")
    try:
        value, tolerance = Decimal(line["value"]), Decimal(line["tolerance"])
    except InvalidOperation:
        raise SkippedRun(f"{place} has a value or tolerance that is not a number") from None
    return Claim(
        line["id"], line["statement"], line["model"], measure, dict(pair.split("=", 1) for pair in options),
        line["bound"], value, line["unit"], tolerance, line["source"], line["ours"], line["note"],
    )  # fmt: skip


def judge_claim(claim: Claim, source: Source) -> Judged:
    """Find our number for a claim, and judge it."""
    try:
        ours = MEASURES[claim.measure](source, claim.model, **claim.options)
    except MissingRun as missing:
        return Judged(claim, "not run yet", None, missing.commands)
    verdict = judge(ours.interval, claim.bound, float(claim.value), float(claim.tolerance))
    # A number that is incomplete can break a limit already, but cannot keep it yet.
    if ours.commands and verdict != "not reproduced":
        verdict = "not run yet"
    return Judged(claim, verdict, ours, ours.commands, ours.runs)
