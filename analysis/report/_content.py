"""Everything that the report shows, computed from a results folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from analysis.report import _checks, _claims, _figures, _layers, _overview, _plots, _provenance, _tables
from analysis.report._checks import Check
from analysis.report._claims import Judged
from analysis.report._figures import Drawn
from analysis.report._layers import Layers
from analysis.report._measures import PAPER_TABLES, Source
from analysis.report._overview import Line
from analysis.report._plots import Plot
from analysis.report._tables import Sheet
from analysis.report._verdict import VERDICTS, Verdict
from analysis.saved import LeftOut, Results, Run, base_name
from analysis.scores import load_scores
from analysis.tables._specs import PAPER, TABLES

EMBEDDED = TABLES["micro"].model


@dataclass(frozen=True)
class Part:
    """What is shown of the real models, or of the embedded one.

    Attributes:
        key: in anchors.
        lines: models at a glance.
        tables: with scores.
        tradeoff: plots of accuracy against cost.
        tradeoff_command: what they lack.
        layers: of each model with its plot.
        layers_command: what they lack.
        figures: drawn or not.
    """

    key: str
    lines: Sequence[Line]
    tables: Sequence[Sheet]
    tradeoff: Sequence[Plot]
    tradeoff_command: str
    layers: Sequence[tuple[Layers, Plot]]
    layers_command: str
    figures: Sequence[Drawn]


@dataclass
class Content:
    """The report.

    Attributes:
        root: the results folder.
        claims: the paper's, judged.
        checks: the embedded model's.
        paper: the part of the paper's and other real models.
        embedded: the embedded model's.
        runs: all that are finished.
        problems: what doesn't count, by path, and why.
        made: when.
    """

    root: Path
    claims: list[Judged]
    checks: list[Check]
    paper: Part
    embedded: Part
    runs: list[Run]
    problems: dict[str, str] = field(default_factory=dict)
    made: str = ""

    @property
    def counts(self) -> dict[Verdict, int]:
        """Claims by verdict."""
        return {verdict: sum(one.verdict == verdict for one in self.claims) for verdict in VERDICTS}


def collect(root: Path) -> Content:
    """All of it.

    Args:
        root: the results folder; nothing has to be in it.
    """
    everything = Results(root)
    real, embedded = Results(root, without=(EMBEDDED,)), Results(root, EMBEDDED)
    drawn = _figures.draw_all([real, embedded])  # first: it works in processes of its own
    runs = _provenance.all_runs(everything)
    scores = load_scores(everything)
    problems: dict[str, str] = {}
    tables = _tables.fill(scores, problems)
    source = Source(real, tables)
    try:
        claims = _claims.judged(_claims.read(PAPER / "claims.csv"), source)
    except LeftOut as reason:
        problems[str(PAPER / "claims.csv")] = str(reason)
        claims = []
    models = [TABLES[name].model for name in PAPER_TABLES]
    real_scores = [score for score in scores if base_name(score.run.model) != EMBEDDED]
    own_scores = [score for score in scores if score.run.model == EMBEDDED]
    more = _tables.others(real_scores, models)
    shown = [tables[name] for name in PAPER_TABLES]
    by_model = {table.model: table for table in (*more, *reversed(shown))}  # of two of a model, the first
    first = list(dict.fromkeys([*models, *by_model]))
    paper = Part(
        "paper", [_overview.line(by_model[model], source, runs) for model in first],
        [_tables.sheet(table) for table in (*shown, *more)],
        _plots.tradeoff(real, "tradeoff", real_scores), "python run.py -m paper=figure1",
        _layered(real, _models(runs, real)), "python run.py experiment=profile model=llama7b corpus=c4", drawn[0],
    )  # fmt: skip
    micro = tables["micro"]
    own = Part(
        "embedded", [_overview.line(micro, Source(embedded, tables), runs)], [_tables.sheet(micro)],
        _plots.tradeoff(embedded, "tradeoff-embedded", own_scores), "python run.py -m paper=micro",
        _layered(embedded, [EMBEDDED]), "python run.py experiment=profile model=tiny", drawn[1],
    )  # fmt: skip
    checks = _checks.checks(embedded, micro)
    left = [
        real.left_out,
        embedded.left_out,
        everything.left_out,
        *(dict(one.left_out) for part in drawn for one in part),
    ]
    problems |= {str(folder): reason for one in left for folder, reason in one.items()}
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    return Content(root, claims, checks, paper, own, runs, dict(sorted(problems.items())), made)


def _models(runs: Sequence[Run], results: Results) -> list[str]:
    """Models of the real part that have runs, those of the paper first."""
    names = dict.fromkeys(base_name(run.model) for run in runs)
    known = [TABLES[name].model for name in ("table2", "table3", "table1")]
    wanted = [*known, *sorted(set(names) - set(known))]
    return [name for name in wanted if name in names and name not in results.without]


def _layered(results: Results, models: Sequence[str]) -> list[tuple[Layers, Plot]]:
    found = [_layers.of_model(replace(results, used=[]), model) for model in models]
    return [(view, _plots.layers(view)) for view in found if view is not None]
