"""The paper's numeric claims (``results/paper/claims.csv``), each with our number and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from analysis.report.conditions import PassedOver
from analysis.report.measures import MEASURES
from analysis.report.source import Ours, Source
from analysis.results.files import SkippedRun, read_csv, read_file
from analysis.results.runs import MissingRun, Run
from analysis.stats import BOUNDS, VERDICTS, Bound, Verdict, judge
from analysis.tables import specs

COLUMNS = tuple("id claim statement model measure bound value unit tolerance source ours note".split())


#: Verdict on a claim: that on our number, or that this project has no means to reach the paper's.
ClaimVerdict = Verdict | Literal["not implemented"]
CLAIM_VERDICTS: tuple[ClaimVerdict, ...] = (*VERDICTS, "not implemented")
FUSED_PREFILL = (
    "A fused kernel that computes the scores of the representatives only. On a GPU, prefill uses the fused kernel of "
    "torch, which computes those of every head, so that only the projections get faster"
)
#: What this project lacks for a claim, by its id. Without it our number can reach the paper's, but not refute it.
NOT_IMPLEMENTED = {"first-token": FUSED_PREFILL, "first-token-text": FUSED_PREFILL}


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
    verdict: ClaimVerdict
    ours: Ours | None  # None: not measured
    commands: tuple[str, ...]  # measure what is missing
    runs: Sequence[Run] = ()  # source of our number
    passed: Sequence[PassedOver] = ()  # runs that were found and do not count
    lacking: str = ""  # what is not implemented

    @property
    def number(self) -> Ours | None:
        """Our number, if there is one to show."""
        return None if self.ours is None or math.isnan(self.ours.interval.value) else self.ours


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
        value, tolerance = _value(line["value"]), Decimal(line["tolerance"])
    except InvalidOperation:
        raise SkippedRun(f"{place} has a value or tolerance that is not a number") from None
    return Claim(
        line["id"], line["statement"], line["model"], measure, dict(pair.split("=", 1) for pair in options),
        line["bound"], value, line["unit"], tolerance, line["source"], line["ours"], line["note"],
    )  # fmt: skip


def _value(text: str) -> Decimal:
    """Return a claim's number, which may refer to a table: ``table4 CHAI-QKV piqa`` is the loss there.

    ``table4 cells`` is how many numbers the table has.

    Raises:
        InvalidOperation: neither a number nor such a reference.
    """
    name, *where = text.split()
    if name not in specs.TABLES:
        return Decimal(text)
    rows = specs.paper_rows(name)
    if where == ["cells"]:
        return Decimal(sum(len(row.values) for row in rows))
    for row in rows:
        if len(where) == 2 and row.label == where[0] and where[1] in row.values:
            return -row.values[where[1]]
    raise InvalidOperation


def judge_claim(claim: Claim, source: Source) -> Judged:
    """Find our number for a claim, and judge it."""
    source = replace(source, passed=[])
    lacking = NOT_IMPLEMENTED.get(claim.id, "")
    ours: Ours | None = None
    verdict: ClaimVerdict = "not run yet"
    try:
        ours = MEASURES[claim.measure](source, claim.model, **claim.options)
        commands = ours.commands
        if ours.caveat:
            verdict = "undecided"
        else:
            verdict = judge(ours.interval, claim.bound, float(claim.value), float(claim.tolerance))
            # A number that is incomplete can break a limit already, but cannot keep it yet.
            if commands and verdict != "not reproduced":
                verdict = "not run yet"
    except MissingRun as missing:
        commands = missing.commands
    if lacking and verdict != "reproduced":
        verdict = "not implemented"
    used = {run.folder for run in ours.runs} if ours else set()
    passed = {one.run.folder: one for one in source.passed if one.run.folder not in used}
    return Judged(claim, verdict, ours, commands, ours.runs if ours else (), list(passed.values()), lacking)
