"""Accuracy of every method against a cost (Figures 1 and 14, and the report), relative to multi-head attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting import page, paper, style
from analysis.results.runs import Results
from analysis.results.scores import ACCURACY, Score, load_scores
from analysis.stats import Interval
from analysis.tables.cells import Row, build
from analysis.tables.settings import assignments, row_name
from analysis.tables.specs import TASKS, Spec, task_name

#: Settings that make a series of points, and how their values are printed.
SCHEDULES: dict[str, Callable[[float], str]] = {
    "clusters": lambda value: f"k = {value:g}",
    "sparsity": lambda value: f"{100 * value:g} %",
}
#: Side and offset of the points' labels, so that those of neighbouring series keep apart.
SIDES: dict[str, tuple[Literal["left", "right"], tuple[int, int]]] = {
    "static": ("right", (-5, 4)),
    "random": ("left", (5, -8)),
    "dejavu": ("left", (5, -8)),
}

#: Legend, markers and line of each reading of the numbers of heads n in Figures 1 and 14.
READINGS: dict[str, dict[str, Any]] = {
    "": {"words": "", "look": {}, "line": "-"},
    paper.KEPT: {"words": ", n kept", "look": {}, "line": "-"},
    paper.COMBINED: {"words": ", n combined", "look": {"markerfacecolor": "white"}, "line": ":"},
}

MHA = Interval(0.0, math.nan, math.nan)  # its change against itself


@dataclass(frozen=True)
class Point:
    """A method with its settings."""

    row: Row
    accuracy: Interval  # mean over the tasks, %; the ends take MHA's accuracy as exact, and are NaN for MHA itself

    @property
    def place(self) -> tuple[str, float] | None:
        """Setting and value by which the point belongs to its method's series; ``None``: it stands alone."""
        for name in SCHEDULES:
            value = self.row.scores[0].settings.get(name)
            if isinstance(value, (int, float)) and set(self.row.settings) <= {name}:
                return name, float(value)
        return None

    @property
    def reading(self) -> str:
        """Reading of the paper's numbers of heads by which the point is in Figure 1; empty: by none."""
        if self.place is None or self.place[0] != "clusters":
            return ""
        return paper.reading(self.row.method, int(self.place[1]), self.heads) or ""

    @property
    def heads(self) -> int:
        """Query heads of a layer, all of which multi-head attention keeps; 0: an older run did not record them."""
        baseline = self.row.cells[0].baseline
        return max(baseline.run.result["savings"].get("heads_kept") or [0]) if baseline else 0


@dataclass(frozen=True)
class Tradeoff:
    """The methods of one model under the same conditions on the same tasks."""

    model: str
    tasks: tuple[str, ...]  # tasks that all the methods have
    points: list[Point]  # multi-head attention first
    notes: str  # methods that are not shown

    def heading(self, title: str) -> str:
        """Return the title, the model, and the tasks that the mean is over."""
        names = ", ".join(map(task_name, self.tasks))
        if all(task.startswith("micro_") for task in self.tasks):
            names = f"the micro tasks {names}"
        n = sum(score.n for score in self.points[0].row.scores)
        return f"{title}\n{style.label(self.model)}: mean of {names} ({n:,} items)"

    def shares(self, cost: Callable[[Point], float]) -> list[tuple[Point, float]]:
        """Return each point with its cost as a share of multi-head attention's."""
        whole = mean(cost(point) for point in self.points if point.row.method == "mha")
        return [(point, cost(point) / whole) for point in self.points]


def compare_methods(
    results: Results, field: str, usable: Callable[[Any], bool], scores: Sequence[Score] | None = None
) -> Tradeoff:
    """Choose what to compare: the main model if it has runs, and the conditions with the most runs.

    Runs are skipped unless a field of their ``result.json``, of the cost, is usable. ``scores`` are the runs of these
    results, if they have been read already.

    Raises:
        MissingRun: multi-head attention and another method have no task in common.
    """
    costed = []
    for score in load_scores(results) if scores is None else scores:
        if usable(score.run.result.get(field)):
            costed.append(score)
        else:
            results.skipped[score.run.folder] = f"result.json has no {field} (rerun with force=true)"
    folders = {score.run.folder for score in costed}
    ranked = results.ranked(ACCURACY, lambda run: run.folder in folders)
    for model in dict.fromkeys(run.model for run in ranked):
        tradeoff = _of_model(model, [score for score in costed if score.run.model == model])
        if tradeoff is not None:
            results.used += [score.run for point in tradeoff.points for score in point.row.all_scores]
            return tradeoff
    raise results.missing(ACCURACY)


def _of_model(model: str, scores: Sequence[Score]) -> Tradeoff | None:
    all_tasks = tuple(sorted({score.task for score in scores}, key=_task_order))
    spec = Spec("", "", model, all_tasks, None, mean=True)
    table = build(spec, model, scores, [])
    assert table.like is not None
    scores = [score for score in scores if score.conditions_id == table.like.conditions_id]

    # Choose the tasks that leave the most to compare: tasks times methods that have all of them.
    sets = [done for row in table.rows if (done := frozenset(row.tasks("done")))]
    if not sets:
        return None
    best = max(sets, key=lambda done: (len(done) * sum(done <= other for other in sets), sorted(done)))
    tasks = tuple(task for task in all_tasks if task in best)

    # Compare the methods that have all these tasks.
    rows = build(replace(spec, tasks=tasks), model, scores, []).rows
    complete = [row for row in rows if row.cells[-1].state == "done"]
    if len({row.method for row in complete}) < 2:
        return None
    base = next(100 * row.cells[-1].value for row in complete if row.cells[-1].value is not None)
    others = [row_name(row.method, row.settings) for row in rows if row not in complete]
    notes = f"Not shown, without these tasks beside MHA: {', '.join(others)}. " if others else ""
    changes = [cell.change.points if cell.change else MHA for cell in (row.cells[-1] for row in complete)]
    means = [Interval(base + change.value, base + change.low, base + change.high) for change in changes]
    return Tradeoff(model, tasks, list(map(Point, complete, means)), notes)


def _task_order(task: str) -> tuple[int, str]:
    name = task.removeprefix("micro_")
    return TASKS.index(name) if name in TASKS else len(TASKS), task


def plot_data(panel: str, costs: Sequence[tuple[Point, float]], unit: str) -> pd.DataFrame:
    """Return a row for each point of a panel, given its cost as a share of multi-head attention's."""
    frame = pd.DataFrame(
        {
            "panel": panel, "method": point.row.method,
            "label": row_name(point.row.method, point.row.settings),  # row.label may be shorter
            "settings": " ".join(assignments(point.row.settings)), "reading": point.reading,
            "accuracy": point.accuracy.value, "low": point.accuracy.low, "high": point.accuracy.high,
            "cost": 100 * share, "unit": unit, "saving": point.row.scores[0].saving,
            "runs": " ".join(str(score.run.result["run_id"]) for score in point.row.all_scores),
        }
        for point, share in costs
    )  # fmt: skip
    return frame.assign(pareto=on_front(frame.cost, frame.accuracy))


def on_front(cost: pd.Series, accuracy: pd.Series) -> list[bool]:
    """Return for each point whether it is on the Pareto front: no other is as good in both and better in one."""
    pairs = list(zip(cost, accuracy, strict=True))
    return [not any(c <= x and a >= y and (c, a) != (x, y) for c, a in pairs) for x, y in pairs]


def front_line(data: pd.DataFrame) -> tuple[list[float], list[float]]:
    """Return costs and accuracies of the Pareto front, extended to the greatest cost."""
    front = data[data.pareto].sort_values("cost")
    return [*front.cost.tolist(), float(data.cost.max())], [*front.accuracy.tolist(), float(front.accuracy.iloc[-1])]


def series_lines(rows: pd.DataFrame, points: Sequence[Point]) -> dict[str, pd.DataFrame]:
    """Return the rows of a method's series in its order, by reading; other settings of the method stand alone."""
    series = sorted((points[index].place, index) for index in rows.index if points[index].place)
    return {
        reading: rows.loc[found]
        for reading in READINGS
        if (found := [index for _, index in series if points[index].reading == reading])
    }


def series_words(rows: pd.DataFrame, reading: str) -> str:
    """Return what the legend adds to a method's name; empty for a method with one reading only."""
    return READINGS[reading]["words"] if paper.COMBINED in set(rows.reading) else ""


def draw_panel(axes: Axes, data: pd.DataFrame, points: Sequence[Point]) -> None:
    """Draw accuracy against cost: a series for each method, and the Pareto front.

    ``data`` has a row of :func:`plot_data` for each of the points.
    """
    front = {"color": style.INK, "linestyle": "--", "linewidth": 0.8, "zorder": 1, "label": "Pareto front"}
    axes.step(*front_line(data), where="post", **front)
    for name, rows in data.groupby("method", sort=False):
        method, look = str(name), style.look(str(name))
        lines = series_lines(rows, points)
        for reading, line in lines.items():
            axes.plot(line.cost, line.accuracy, READINGS[reading]["line"], color=look["color"], linewidth=1, zorder=2)
        for name, group in rows.groupby("reading", sort=False):
            reading = str(name)
            ends = [group.accuracy - group.low, group.high - group.accuracy]
            whiskers = [side.clip(lower=0).fillna(0) for side in ends]
            words = style.label(method) + series_words(rows, reading)
            marks = look | READINGS[reading]["look"] | {"linestyle": "none", "elinewidth": 0.8, "label": words}
            axes.errorbar(group.cost, group.accuracy, whiskers, **marks, zorder=3)
        # Of two readings only one is labelled, to keep labels apart; the footer gives the other's clusters.
        unlabelled = {paper.COMBINED} if paper.KEPT in lines else set()
        for index, row in rows[~rows.reading.isin(unlabelled)].iterrows():
            if words := _point_label(points[index], alone=not lines):
                side, offset = SIDES.get(method, ("left", (5, 4)))
                note = axes.annotate(
                    words, (row.cost, row.accuracy), offset, textcoords="offset points", ha=side, fontsize=6.5,
                    color=look["color"],
                )  # fmt: skip
                note.set_in_layout(False)  # a label that does not fit must not shrink the panel
    axes.set_ylabel("mean accuracy (%)")
    axes.label_outer()
    axes.margins(x=0.08)


def _point_label(point: Point, alone: bool) -> str:
    """Return what distinguishes a point from the others of its method."""
    if point.place:
        name, value = point.place
        return SCHEDULES[name](value)
    if point.row.settings:
        return point.row.label.partition(" ")[2]
    counts = point.row.scores[0].run.result["savings"]["heads_kept"]
    return "" if alone else f"k = {min(counts)} to {max(counts)}"


def finish(figure: Figure, tradeoff: Tradeoff, notes: str) -> None:
    """Add one legend for all panels at the right, and the footer."""
    # A method that is in several panels has one entry.
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    # The footer: methods by kind of saving, and the settings that letters stand for.
    methods = dict.fromkeys((point.row.scores[0].saving, style.label(point.row.method)) for point in tradeoff.points)
    kinds = {kind: [name for saving, name in methods if saving == kind] for kind in ("real", "simulated")}
    savings = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    lettered = [point for point in tradeoff.points if point.row.label.endswith(")") and not point.place]
    names = [(point.row.label.split()[-1], row_name(point.row.method, point.row.settings)) for point in lettered]
    letters = "".join(f"{letter} is {name}. " for letter, name in names)
    words = page.wrap(
        "Whiskers: 95 % interval of the change against MHA on the same items (score interval). "
        f"{notes}Savings in this implementation are {savings}. {letters}{reading_notes(tradeoff)}{tradeoff.notes}"
    )
    run = tradeoff.points[0].row.scores[0].run
    torch = run.versions.get("torch")
    source = [str(run.result.get("device", "unknown device")), run.dtype, *([f"torch {torch}"] if torch else [])]
    runs = sum(len(point.row.all_scores) for point in tradeoff.points)
    page.footer(figure, [*words, " · ".join([*source, f"{runs} runs"])])


def reading_notes(tradeoff: Tradeoff) -> str:
    """Return how the paper's numbers of heads are read, with the readings that are drawn; empty if none is."""
    by_method = {point.row.method: point for point in tradeoff.points if point.reading}
    if not by_method:
        return ""
    heads = max(point.heads for point in by_method.values())
    numbers = sorted({n for method in by_method for n in paper.figure1_numbers(method, heads)})
    drawn = {point.reading for point in tradeoff.points}
    words = {paper.KEPT: "heads kept (k = n, filled)", paper.COMBINED: f"heads combined (k = {heads} - n + 1, hollow)"}
    read = " and as ".join(words[reading] for reading in words if reading in drawn)
    return f"The paper's numbers of heads, n = {', '.join(map(str, numbers))}, read as {read}. "
