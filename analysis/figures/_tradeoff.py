"""What Figures 1 and 14 share: accuracy of every method against a cost, both compared with multi-head attention's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import _look
from analysis.figures._profile import wrap
from analysis.saved import Results
from analysis.scores import Score, load_scores
from analysis.tables._cells import Row, build
from analysis.tables._settings import row_name, text
from analysis.tables._specs import TASKS, Spec, task_name

EXPERIMENT = "accuracy"
COMMAND = "python run.py -m paper=figure1"
#: Numbers that a method's series goes by, and how they are printed.
SCHEDULES: dict[str, Callable[[float], str]] = {
    "clusters": lambda value: f"k = {value:g}",
    "sparsity": lambda value: f"{100 * value:g} %",
}

#: Of a point's words, where it isn't above and to the right: so that series side by side keep apart.
SIDES: dict[str, tuple[Literal["left", "right"], tuple[int, int]]] = {
    "static": ("right", (-5, 4)),
    "random": ("left", (5, -8)),
    "dejavu": ("left", (5, -8)),
}


@dataclass(frozen=True)
class Point:
    """A method with its settings.

    Attributes:
        method: its name on the command line.
        label: its name in print, with the settings that aren't the defaults.
        short: the same with a letter for long settings.
        settings: those.
        accuracy: mean over the tasks, %.
        low: lower end of its 95 % interval, multi-head attention's accuracy taken as certain; that one has none.
        high: the upper end.
        scores: its run of each task.
    """

    method: str
    label: str
    short: str
    settings: dict[str, object]
    accuracy: float
    low: float | None
    high: float | None
    scores: list[Score]

    @property
    def place(self) -> tuple[str, float] | None:
        """Its place in the method's series, as the name of a number and its value; ``None`` if it is in none."""
        for name in SCHEDULES:
            value = self.scores[0].settings.get(name)
            if isinstance(value, (int, float)) and set(self.settings) <= {name}:
                return name, float(value)
        return None


@dataclass(frozen=True)
class Comparison:
    """The methods of one model under the same conditions on the same tasks.

    Attributes:
        model: as it is filed.
        tasks: those that all the methods have.
        points: multi-head attention first.
        notes: what isn't shown.
    """

    model: str
    tasks: tuple[str, ...]
    points: list[Point]
    notes: str

    def heading(self, title: str) -> str:
        """The figure's title, the model, and over what the mean is taken."""
        names = ", ".join(map(task_name, self.tasks))
        if all(task.startswith("micro_") for task in self.tasks):
            names = f"the micro tasks {names}"
        n = sum(score.run.result["n"] for score in self.points[0].scores)
        return f"{title}\n{_look.label(self.model)}: mean of {names} ({n:,} items)"


def compared(
    results: Results, field: str, usable: Callable[[Any], bool], loaded: Sequence[Score] | None = None
) -> Comparison:
    """What is to be drawn: of the main model rather than others, under the conditions that have the most runs.

    The tasks are those that leave the most to compare: methods that have all of them, times tasks.

    Args:
        results: where runs are looked for.
        field: of ``result.json``, that a run's cost is taken from; runs without go to ``left_out``.
        usable: whether its value can be.
        loaded: the runs of these results, where they have been read already.

    Raises:
        MissingRun: multi-head attention and another method have no task in common.
    """
    scores = []
    for score in load_scores(results) if loaded is None else loaded:
        if usable(score.run.result.get(field)):
            scores.append(score)
        else:
            results.left_out[score.run.folder] = f"result.json has no {field} (force=true does the run again)"
    folders = {score.run.folder for score in scores}
    order = [run.model for run in results.ranked(EXPERIMENT, usable=lambda run: run.folder in folders)]
    for model in dict.fromkeys(order):
        found = _compare(model, [score for score in scores if score.run.model == model])
        if found is not None:
            results.used += [score.run for point in found.points for score in point.scores]
            return found
    raise results.missing(EXPERIMENT)


def _compare(model: str, scores: Sequence[Score]) -> Comparison | None:
    spec = Spec("", model, tuple(sorted({score.task for score in scores}, key=_order)), None, mean=True)
    table = build("", spec, model, scores, [])
    assert table.like is not None
    scores = [score for score in scores if score.conditions_id == table.like.conditions_id]
    done = [frozenset(row.tasks("done")) for row in table.rows]
    sets = [tasks for tasks in done if tasks]
    if not sets:
        return None
    chosen = max(sets, key=lambda tasks: (len(tasks) * sum(tasks <= other for other in done), sorted(tasks)))
    tasks = tuple(task for task in spec.tasks if task in chosen)
    rows = build("", Spec("", model, tasks, None, mean=True), model, scores, []).rows
    shown = [row for row in rows if row.cells[-1].state == "done"]
    if len({row.method for row in shown}) < 2:
        return None
    base = next(100 * row.cells[-1].value for row in shown if row.cells[-1].value is not None)
    lacking = [row_name(row.method, row.settings) for row in rows if row not in shown]
    notes = f"Not shown, without these tasks beside MHA: {', '.join(lacking)}. " if lacking else ""
    return Comparison(model, tasks, [_point(row, base) for row in shown], notes)


def _order(task: str) -> tuple[int, str]:
    name = task.removeprefix("micro_")
    return TASKS.index(name) if name in TASKS else len(TASKS), task


def _point(row: Row, base: float) -> Point:
    change = row.cells[-1].change
    ends = (None, None) if change is None else (base + 100 * change.low, base + 100 * change.high)
    accuracy = base if change is None else base + 100 * change.difference
    scores = [cell.score for cell in row.cells[:-1] if cell.score is not None]
    return Point(row.method, row_name(row.method, row.settings), row.label, row.settings, accuracy, *ends, scores)


def plotted(panel: str, costs: Sequence[tuple[Point, float]], unit: str) -> pd.DataFrame:
    """One row for each point of a panel.

    Args:
        panel: its name.
        costs: points, each with its cost as a share of multi-head attention's.
        unit: what the costs are.
    """
    frame = pd.DataFrame(
        {
            "panel": panel, "method": point.method, "label": point.label,
            "settings": " ".join(f"{key}={text(value)}" for key, value in point.settings.items()),
            "accuracy": point.accuracy, "low": point.low, "high": point.high,
            "cost": 100 * share, "unit": unit, "saving": point.scores[0].saving,
            "runs": " ".join(str(score.run.result["run_id"]) for score in point.scores),
        }
        for point, share in costs
    )  # fmt: skip
    return frame.assign(pareto=on_front(frame.cost, frame.accuracy)).astype({"low": float, "high": float})


def on_front(cost: pd.Series, accuracy: pd.Series) -> list[bool]:
    """Whether each point is on the Pareto front: no other is as good in both and better in one."""
    pairs = list(zip(cost, accuracy, strict=True))
    return [not any(c <= x and a >= y and (c, a) != (x, y) for c, a in pairs) for x, y in pairs]


def draw_panel(axes: Axes, data: pd.DataFrame, points: Sequence[Point]) -> None:
    """Accuracy against cost: a series for each method, and the front.

    Args:
        axes: the panel.
        data: its rows of :func:`plotted`.
        points: those that the rows are of, in their order.
    """
    front = data[data.pareto].sort_values("cost")
    axes.step(
        [*front.cost, data.cost.max()], [*front.accuracy, front.accuracy.iloc[-1]], where="post", color=_look.INK,
        linestyle="--", linewidth=0.8, zorder=1, label="Pareto front",
    )  # fmt: skip
    for method, rows in data.groupby("method", sort=False):
        own = [points[data.index.get_loc(index)] for index in rows.index]
        style = _look.look(str(method))
        series = sorted((point.place, index) for point, index in zip(own, rows.index, strict=True) if point.place)
        line = rows.loc[[index for _, index in series]]
        axes.plot(line.cost, line.accuracy, color=style["color"], linewidth=1, zorder=2)
        whiskers = [(rows.accuracy - rows.low).clip(lower=0), (rows.high - rows.accuracy).clip(lower=0)]
        axes.errorbar(
            rows.cost, rows.accuracy, [side.fillna(0) for side in whiskers],
            linestyle="none", elinewidth=0.8, label=_look.label(str(method)), zorder=3, **style,
        )  # fmt: skip
        for point, (_, row) in zip(own, rows.iterrows(), strict=True):
            if words := _words(point, alone=not series):
                side, offset = SIDES.get(str(method), ("left", (5, 4)))
                note = axes.annotate(
                    words, (row.cost, row.accuracy), offset, textcoords="offset points", ha=side, fontsize=6.5,
                    color=style["color"],
                )  # fmt: skip
                note.set_in_layout(False)  # what doesn't fit takes nothing from the panel
    axes.set_ylabel("mean accuracy (%)")
    axes.label_outer()
    axes.margins(x=0.08)


def _words(point: Point, alone: bool) -> str:
    """What tells a point from the others of its method."""
    if point.place:
        name, value = point.place
        return SCHEDULES[name](value)
    if point.settings:
        return point.short.partition(" ")[2]
    kept = point.scores[0].run.result["savings"]["heads_kept"]
    return "" if alone else f"k = {min(kept)} to {max(kept)}"


def finish(figure: Figure, comparison: Comparison, title: str, notes: str) -> None:
    """The heading, one legend for all panels at the right, and how to read it and where it is from below."""
    figure.set_size_inches(_look.WIDTH, 3.9)
    figure.suptitle(comparison.heading(title), x=0.02, ha="left", linespacing=1.4)
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
    result = comparison.points[0].scores[0].run.result
    kinds: dict[str, list[str]] = {kind: [] for kind in ("real", "simulated")}
    for point in comparison.points:
        name, kind = _look.label(point.method), point.scores[0].saving
        if kind in kinds and name not in kinds[kind]:
            kinds[kind].append(name)
    lettered = [point for point in comparison.points if point.short.endswith(")") and not point.place]
    letters = "".join(f"{point.short.split()[-1]} is {point.label}. " for point in lettered)
    savings = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    whole = (
        "Whiskers: 95 % interval of the change against MHA on the same items (paired bootstrap). "
        f"{notes}Savings in this implementation are {savings}. {letters}{comparison.notes}"
    )
    torch = result["versions"].get("torch")
    made = [str(result.get("device", "unknown device")), str(result.get("dtype", "unknown dtype"))]
    made += [f"torch {torch}"] if torch else []
    runs = sum(len(point.scores) for point in comparison.points)
    _look.footer(figure, [*wrap(whole), " · ".join([*made, f"{runs} runs"])])


def shares(points: Sequence[Point], cost: Callable[[Point], float]) -> list[tuple[Point, float]]:
    """Each point with its cost as a share of multi-head attention's."""
    whole = mean(cost(point) for point in points if point.method == "mha")
    return [(point, cost(point) / whole) for point in points]
