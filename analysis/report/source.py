"""What a number of ours is, and where it is sought: runs that count for a claim, and those that were passed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from analysis.plotting.style import clusters
from analysis.report import conditions
from analysis.report.conditions import PAPER_MODELS, PassedOver, heads_kept
from analysis.results.runs import RANDOM, Results, Run, RunQuery, base_name
from analysis.stats import Interval
from analysis.tables.cells import Table

EXACT = "exact"
MISSING = "runs are missing"
Check = Callable[[Run], str]  # why a run does not count; empty if it does


@dataclass(frozen=True)
class Ours:
    """A measured number."""

    interval: Interval
    certainty: str  # what the interval accounts for
    runs: Sequence[Run]  # source of the number
    detail: str = ""  # task, layer or length; cluster counts
    baseline: str = "none"
    commands: tuple[str, ...] = ()  # measure what is missing of it
    caveat: str = ""  # why the number decides nothing, whatever it is

    @property
    def device(self) -> str:
        """Device and dtype; and that the weights are random, if they are."""
        run = self.runs[0]
        return ", ".join([run.device, run.dtype, *(["random weights"] if run.model.endswith(RANDOM) else [])])


@dataclass
class Source:
    """Runs and filled tables in which numbers are found, and the runs that were found there and do not count."""

    results: Results
    tables: dict[str, Table]  # of accuracy runs that count
    scores_passed: Sequence[PassedOver] = ()  # accuracy runs that do not
    passed: list[PassedOver] = field(default_factory=list)  # those of them, and of others, that a number was sought in

    def newest(self, query: RunQuery, model: str, usable: Callable[[Run], bool], checks: Sequence[Check]) -> Run:
        """Return the newest usable run of a model, also with random weights, that counts.

        Raises:
            MissingRun: there is none; the others have been added to ``passed``.
        """
        results = self.results.of(model, with_random=True)
        counted = [run for run in results.ranked(query, usable) if self.counts(run, model, checks)]
        if not counted:
            raise results.missing(query)
        results.used.append(counted[0])
        return counted[0]

    def counts(self, run: Run, model: str, checks: Sequence[Check]) -> bool:
        """Return whether a run counts for claims about a model; if not, add it to ``passed`` with the reason."""
        if model not in PAPER_MODELS:
            return True
        reason = conditions.of_model(run, model) or next(filter(None, (check(run) for check in checks)), "")
        if reason:
            self.passed.append(PassedOver(run, reason))
        return not reason

    def pass_scores(self, model: str, methods: Sequence[str], tasks: Sequence[str]) -> None:
        """Add the accuracy runs of some methods and tasks that do not count to ``passed``."""
        self.passed += [
            one for one in self.scores_passed
            if base_name(one.run.model) == model and one.run.method in methods
            and one.run.result.get("task") in tasks
        ]  # fmt: skip

    def as_accuracy(self, run: Run) -> str:
        """Return why a run of CHAI has other counts than the accuracy runs that count; empty without such runs."""
        for table in self.tables.values():
            row = table.row_of("chai") if table.model == base_name(run.model) else None
            for score in row.scores if row else ():
                if heads_kept(score.run) != heads_kept(run):
                    ours, theirs = clusters(heads_kept(run)), clusters(heads_kept(score.run))
                    return f"other counts than the accuracy runs: {ours}; there {theirs}"
        return ""


def exact(run: Run, value: float, detail: str = "", baseline: str = "none", certainty: str = EXACT) -> Ours:
    """Return a number without uncertainty, or of unknown uncertainty."""
    return Ours(Interval.exact(value), certainty, [run], detail, baseline)
