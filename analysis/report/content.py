"""Collect everything that the report shows from a results folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from analysis.report import claims, conditions, figures, layers, overview, plots, provenance, tables
from analysis.report.checks import Check, checks
from analysis.report.claims import CLAIM_VERDICTS, ClaimVerdict, Judged
from analysis.report.conditions import PAPER_MODELS, PAPER_TABLES, PassedOver
from analysis.report.figures import Drawn
from analysis.report.layers import Layers
from analysis.report.overview import Line
from analysis.report.plots import Plot
from analysis.report.source import Source
from analysis.results.files import SkippedRun
from analysis.results.profiles import PROFILE
from analysis.results.runs import Results, Run, base_name
from analysis.results.scores import ACCURACY, Score, load_scores
from analysis.tables.cells import Table
from analysis.tables.specs import PAPER, TABLES

EMBEDDED = TABLES["micro"].model


@dataclass(frozen=True)
class Part:
    """The real models' part of the report, or the embedded model's."""

    key: str  # prefix of anchors
    lines: Sequence[Line]  # models at a glance
    tables: Sequence[Table]
    tradeoff: Sequence[Plot]  # accuracy against each cost
    tradeoff_command: str  # makes the runs of these plots
    layers: Sequence[tuple[Layers, Plot]]
    layers_command: str
    figures: Sequence[Drawn]


@dataclass(frozen=True)
class Content:
    """The report."""

    root: Path  # the results folder
    claims: list[Judged]
    checks: list[Check]
    paper: Part  # the paper's and other real models
    embedded: Part
    runs: list[Run]  # all finished runs
    problems: dict[Path, str]  # files and folders that cannot be used, with the reason
    made: str  # time of writing
    passed: dict[Path, str]  # accuracy runs of the paper's models that count for no claim, with the reason

    @property
    def counts(self) -> dict[ClaimVerdict, int]:
        """Number of claims of each verdict."""
        return {verdict: sum(one.verdict == verdict for one in self.claims) for verdict in CLAIM_VERDICTS}


def collect(root: Path) -> Content:
    """Collect the report from a results folder, which may be empty."""
    everything = Results(root)
    real, embedded = Results(root, without=(EMBEDDED,)), Results(root, EMBEDDED)
    drawn = figures.draw_all([real, embedded])  # first: it starts processes of its own
    runs = provenance.all_runs(everything)
    scores = load_scores(everything)
    problems: dict[Path, str] = {}
    by_name = tables.fill(scores, problems)

    # The real models: those of the paper's tables first, then others.
    counted, passed = _counted(scores, problems)
    counted_tables = tables.fill(counted, problems)
    passed = [*passed, *(one for table in counted_tables.values() for one in conditions.not_compared(table, counted))]
    source = Source(real, counted_tables, passed)
    real_scores = [score for score in scores if base_name(score.run.model) != EMBEDDED]
    paper_tables = [by_name[name] for name in PAPER_TABLES]
    more = tables.others(real_scores, PAPER_MODELS)
    by_model = {table.model: table for table in (*more, *reversed(paper_tables))}  # the first of two tables of a model
    by_model |= {table.model: table for table in reversed([counted_tables[name] for name in PAPER_TABLES])}
    lines = [overview.line(by_model[model], source, runs) for model in dict.fromkeys([*PAPER_MODELS, *by_model])]
    paper = Part(
        "paper", lines, [*paper_tables, *more],
        plots.tradeoff(real, "tradeoff", real_scores), ACCURACY.command,
        _layers(real, _models(runs)), PROFILE.command, drawn[0],
    )  # fmt: skip

    # The embedded model.
    micro, embedded_scores = by_name["micro"], [score for score in scores if score.run.model == EMBEDDED]
    embedded_part = Part(
        "embedded", [overview.line(micro, Source(embedded, by_name), runs)], [micro],
        plots.tradeoff(embedded, "tradeoff-embedded", embedded_scores), "python run.py -m paper=micro",
        _layers(embedded, [EMBEDDED]), PROFILE.small_command, drawn[1],
    )  # fmt: skip

    # The paper's claims, and what cannot be used.
    path = PAPER / "claims.csv"
    try:
        judgements = [claims.judge_claim(claim, source) for claim in claims.read(path)]
    except SkippedRun as reason:
        judgements, problems[path] = [], str(reason)
    known = checks(embedded, micro)
    drawn_skipped = [figure.skipped for figure in (*paper.figures, *embedded_part.figures)]
    for skipped in (real.skipped, embedded.skipped, everything.skipped, *drawn_skipped):
        problems |= skipped
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    reasons = {one.run.folder: one.reason for one in passed}
    left_out = dict(sorted(problems.items(), key=str))
    return Content(root, judgements, known, paper, embedded_part, runs, left_out, made, reasons)


def _counted(scores: Sequence[Score], problems: dict[Path, str]) -> tuple[list[Score], list[PassedOver]]:
    """Divide accuracy runs into those that count for claims and others; none count if the paper's data are corrupt."""
    try:
        return conditions.split(scores)
    except SkippedRun as reason:
        problems[PAPER / "tasks.csv"] = str(reason)
        return [], []


def _models(runs: Sequence[Run]) -> list[str]:
    """Return the real models that have runs, those of the paper first."""
    names = {base_name(run.model) for run in runs} - {EMBEDDED}
    known = [TABLES[name].model for name in ("table2", "table3", "table1")]
    return [name for name in (*known, *sorted(names - set(known))) if name in names]


def _layers(results: Results, models: Sequence[str]) -> list[tuple[Layers, Plot]]:
    views = [layers.of_model(replace(results, used=[]), model) for model in models]
    return [(view, plots.layers(view)) for view in views if view is not None]
