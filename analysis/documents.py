"""``python -m analysis.documents``: write numbers of saved results into the documentation.

A block of a page begins and ends with a comment that names it, a key of :data:`BLOCKS`::

    <!-- demo table: begin -->
    (rewritten from the results)
    <!-- demo table: end -->

Exit codes: 0 all blocks are up to date, or were written; 1 a block differs (``--check``), or its results are missing;
2 usage error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import ttest_1samp

from analysis import cli
from analysis.results.runs import MissingRun, Results
from analysis.results.scores import Score, load_scores
from analysis.stats import Comparison, compare, mean_over_tasks
from analysis.tables.real import real_table
from analysis.tables.specs import MICRO_TASKS, REPOSITORY, TABLES, task_name

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- (?P<name>[^\n]+): begin -->\n)(?P<text>.*?)(<!-- (?P=name): end -->)", re.DOTALL)
DEMO = ("mha", "chai", "random")  # of `make demo`
SEEDS = range(5)  # of random clusters
TOO_FEW = 2  # clusters in each layer
DEMO_COMMAND = "python run.py -m method=mha,chai,random"
EMBEDDED_COMMAND = "python run.py -m paper=embedded"


class EmbeddedScores:
    """Complete runs of the embedded model that can be compared with its newest ones of multi-head attention."""

    def __init__(self, results: Results, command: str) -> None:
        scores = load_scores(results.of(TABLES["micro"].model))
        self.scores = [score for score in scores if score.config.get("limit") is None]
        self.command = command
        self.baselines = {task: self._newest("mha", task) for task in MICRO_TASKS}

    def find(self, method: str, task: str, **settings: object) -> Score:
        """Return the newest run with these settings and the baseline's data; raises MissingRun if there is none."""
        return self._newest(method, task, self.baselines[task].settings_id, **settings)

    def compare(self, score: Score) -> Comparison:
        """Compare a run with multi-head attention."""
        return compare(self.baselines[score.task].samples, score.samples, score.metric)

    def compare_all(self, method: str, **settings: object) -> list[Comparison]:
        """Compare a method with multi-head attention on each task."""
        return [self.compare(self.find(method, task, **settings)) for task in MICRO_TASKS]

    def planted(self, task: str) -> object:
        """Return the planted number of clusters of each layer."""
        return self.baselines[task].config["model"]["clusters"]

    def _newest(self, method: str, task: str, settings_id: str | None = None, **settings: object) -> Score:
        found = [
            score
            for score in self.scores
            if (score.method, score.task) == (method, task)
            and settings_id in (None, score.settings_id)
            and all(score.settings.get(key) == value for key, value in settings.items())
        ]
        if not found:
            words = "".join(f", {key}={value}" for key, value in settings.items())
            raise MissingRun(f"no complete run of {method} on {task}{words}; make it with: {self.command}")
        return max(found, key=lambda score: score.run.updated)


def demo_table(results: Results) -> str:
    """Return the table of ``make demo`` without its seconds, and with p-values."""
    runs = EmbeddedScores(results, DEMO_COMMAND)
    rows = []
    for task in MICRO_TASKS:
        for method in DEMO:
            settings = {} if method == "mha" else {"clusters": runs.planted(task), "seed": 0}
            score = runs.find(method, task, **settings)
            change = None if method == "mha" else runs.compare(score)
            heads = score.run.result["savings"]["heads_kept"]
            rows.append(
                [
                    task if method == "mha" else "",
                    method,
                    f"{100 * score.value:.1f} ± {100 * (score.stderr or 0):.1f}",
                    f"{_signed(100 * change.difference)}" if change else "",
                    _p(change.p) if change else "",
                    f"{100 * score.saved:.1f} % {score.saving}",
                    f"{sum(heads) / len(heads):.1f}",
                    str(score.n),
                ]
            )
    return _table(["Task", "Method", "Score", "Change", "p", "KV saved", "Heads", "n"], rows, words=2)


def embedded_methods(results: Results) -> str:
    """Return the scores of MHA, and each method's change on every task with p; of random clusters over the seeds."""
    runs = EmbeddedScores(results, EMBEDDED_COMMAND)
    values = [100 * score.value for score in runs.baselines.values()]
    rows = [["MHA", *(f"{value:.1f}" for value in (*values, mean(values)))]]
    planted = runs.planted(MICRO_TASKS[0])
    variants: dict[str, tuple[str, dict[str, object]]] = {
        "CHAI": ("chai", {"clusters": planted}),
        f"CHAI, {TOO_FEW} clusters": ("chai", {"clusters": TOO_FEW}),
        "CHAI-static": ("chai_static", {}),
    }
    for name, (method, settings) in variants.items():
        changes = runs.compare_all(method, **settings)
        cells = (*changes, mean_over_tasks(changes))
        rows.append([name, *(f"{_signed(100 * cell.difference)} ({_p(cell.p)})" for cell in cells)])
    by_seed = [runs.compare_all("random", clusters=planted, seed=seed) for seed in SEEDS]
    columns = [*zip(*by_seed, strict=True), [mean_over_tasks(changes) for changes in by_seed]]
    rows.append([f"random, {len(SEEDS)} seeds", *(spread(column) for column in columns)])
    return _table(["", *map(task_name, (*MICRO_TASKS, "mean"))], rows, words=1)


#: Name of a block -> the function that returns its text.
BLOCKS: dict[str, Callable[[Results], str]] = {
    "demo table": demo_table,
    "embedded methods": embedded_methods,
    "real table": lambda results: real_table(results).markdown_table(),
}


def spread(changes: Sequence[Comparison]) -> str:
    """Return mean and standard deviation of several seeds' changes, and p of Student's t test that their mean is 0."""
    points = [100 * change.difference for change in changes]
    return f"{_signed(mean(points))} ± {stdev(points):.1f} ({_p(float(ttest_1samp(points, 0).pvalue))})"


def _signed(points: float) -> str:
    return f"{points:+.1f}" if round(points, 1) else "0.0"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Return a Markdown table; all but the first ``words`` columns are aligned to the right."""
    rule = ["---" if column < words else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows)) + "\n"


def rewrite(text: str, results: Results) -> str:
    """Return a page with its blocks rewritten.

    Raises:
        MissingRun: a block's results are missing.
        ValueError: a block's name is unknown, or it has no end.
    """
    begun = re.findall(r"^<!-- ([^\n]+): begin -->$", text, re.MULTILINE)
    for name in begun:
        if name not in BLOCKS:
            raise ValueError(cli.unknown("block", name, list(BLOCKS)))
    if begun != [match["name"] for match in BLOCK.finditer(text)]:
        raise ValueError("a block has no end")
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match["name"]](results) + match[4], text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = cli.Parser(prog="python -m analysis.documents", description="Numbers of saved results in the pages.")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="(README.md docs/*.md)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with code 1 if a block differs")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are (results)")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        return cli.fail(f"--results: there is no folder {options.results}")
    pages = options.pages or PAGES
    for page in pages:
        if not page.is_file():
            return cli.fail(f"there is no page {page}")
    results, code = Results(options.results), 0
    for page in pages:
        before = page.read_text()
        try:
            after = rewrite(before, results)
        except (MissingRun, ValueError) as error:
            code = cli.fail(f"{page}: {error}", code=1)
            continue
        if after == before:
            continue
        if options.check:
            code = cli.fail(f"{page}: numbers differ from {results.root}; write them with: {parser.prog}", code=1)
        else:
            page.write_text(after)
            print(f"written: {page}")
    cli.report_skipped(results.skipped)
    return code


if __name__ == "__main__":
    cli.run(main)
