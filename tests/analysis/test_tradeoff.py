"""Figures 1 and 14: which runs are compared, where their points lie, and what is on the front."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from analysis.figures import fig1, fig14
from analysis.figures.__main__ import main
from analysis.plotting import style
from analysis.plotting.tradeoff import on_front
from analysis.report import plots
from analysis.results.runs import MissingRun, Results
from analysis.results.scores import load_scores
from analysis.stats import compare
from tests.analysis import scored, synthetic
from tests.analysis.scored import CHAI, MODEL, outcomes

TASKS = ("piqa", "hellaswag", "arc_challenge", "arc_easy", "boolq")
MHA = 28_000
#: method, settings, operations, seconds of a task, answers lost of 200
RUNS = [
    ("mha", {}, MHA, 10.0, 0),
    ("chai", CHAI, 26_000, 9.0, 4),
    ("chai_static", {"clusters": "llama7b_params"}, 25_990, 8.5, 10),
    ("chai_qkv", CHAI, 25_000, 8.8, 40),
    ("random", {"clusters": "llama7b_params", "seed": 0}, 25_990, 8.9, 30),
    *[("random", {"clusters": k, "seed": 0}, 24_000 + 120 * k, 7 + k / 10, 120 - 4 * k) for k in (16, 4, 24, 8)],
    *[("static", {"clusters": k}, 24_000 + 120 * k, 7 + k / 10, 90 - 3 * k) for k in (4, 8, 16, 24)],
    *[("dejavu", {"sparsity": s, "mlp_sparsity": 0.0}, 28_500 - 5000 * s, 11.0, int(150 * s)) for s in (0.1, 0.3, 0.5)],
    ("spatten", {"tokens": 0.5}, 20_000, 14.0, 100),
]  # fmt: skip


def fields(operations, seconds, method):
    kept = [32] * 32 if method == "mha" else synthetic.PARAMS_7B
    return {
        "flops": {"tokens": 2048, "method": int(operations * 1e9), "mha": int(MHA * 1e9)}, "seconds": seconds,
        "savings": {"kind": {"mha": "none", "dejavu": "simulated"}.get(method, "real"), "kv_bytes": 800,
                    "kv_bytes_mha": 1000, "heads_kept": kept},
    }  # fmt: skip


def save(root, method, settings, operations, seconds, lost, tasks=TASKS, **more):
    for place, task in enumerate(tasks):
        answers = outcomes(150 + 5 * place, lost)
        scored.save(root, method, task, answers, settings, result=fields(operations, seconds, method), **more)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All runs; for a test that adds some, ``own`` is a copy."""
    folder = tmp_path_factory.mktemp("results")
    for run in RUNS:
        save(folder, *run)
    return folder


@pytest.fixture
def own(root, tmp_path):
    return shutil.copytree(root, tmp_path / "results")


@pytest.fixture(scope="module")
def drawn(root):
    """Figure 1 of all runs, and its data."""
    return fig1.draw(Results(root))


def test_every_method_at_its_operations(drawn):
    figure, data = drawn
    assert len(data) == len(RUNS) and data.label.is_unique
    points = sorted((row.method, row.cost, row.accuracy) for row in data.itertuples())
    expected = sorted((method, 100 * ops / MHA, 100 * (160 - lost) / 200) for method, _, ops, _, lost in RUNS)
    for one, other in zip(points, expected, strict=True):
        assert one == (other[0], pytest.approx(other[1]), pytest.approx(other[2]))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "operations of a prompt of 2,048 tokens (% of MHA's 28 TFLOP)"
    assert figure.get_suptitle().endswith("LLaMA-7B: mean of PIQA, HellaSwag, ARC-c, ARC-e, BoolQ (1,000 items)")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Pareto front", "MHA", "CHAI", "CHAI-static", "CHAI-QKV", "static", "random", "DejaVu", "SpAtten",
    ]  # fmt: skip
    assert {text.get_text() for text in axes.texts} >= {"k = 4", "k = 24", "10 %", "50 %", "k = 4 to 32"}
    small = " ".join(text.get_text() for text in figure.texts)
    assert "simulated: DejaVu" in small.replace("\n", " ") and "85 runs" in small


def test_series_connect_fixed_numbers_in_their_order(drawn):
    figure, data = drawn
    colour = style.look("random")["color"]
    (line,) = [
        one for one in figure.axes[0].lines
        if one.get_color() == colour and one.get_linestyle() == "-" and len(one.get_xdata()) == 4
    ]  # fmt: skip
    expected = data[(data.method == "random") & data.settings.str.startswith("clusters")].sort_values("cost")
    assert list(line.get_xdata()) == list(expected.cost) and list(line.get_ydata()) == list(expected.accuracy)


def test_both_readings_of_the_numbers_of_heads_are_drawn_apart(own):
    """4, 8, 16, 24 heads kept; and combined, which leaves 29, 25, 17, 9 clusters of 32 heads."""
    for k in (29, 25, 17, 9):
        save(own, "random", {"clusters": k, "seed": 0}, 24_000 + 120 * k, 7, 130 - 4 * k)
    figure, data = fig1.draw(Results(own))
    series = data[(data.method == "random") & data.settings.str.startswith("clusters")]
    assert set(series[series.reading == "kept"].settings) == {f"clusters={k}" for k in (4, 8, 16, 24)}
    assert set(series[series.reading == "combined"].settings) == {f"clusters={k}" for k in (29, 25, 17, 9)}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"random, n kept", "random, n combined", "static"} <= set(labels)
    (axes,) = figure.axes
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    hollow = [handles[f"random, n {reading}"].lines[0].get_markerfacecolor() for reading in ("kept", "combined")]
    assert hollow[1] == "white" != hollow[0]
    for reading, style_of_line in (("kept", "-"), ("combined", ":")):
        expected = sorted(series[series.reading == reading].cost)
        (line,) = [
            one for one in axes.lines
            if sorted(one.get_xdata()) == expected and one.get_linestyle() == style_of_line
            and one.get_color() == style.look("random")["color"]
        ]  # fmt: skip
        assert list(line.get_xdata()) == expected
    small = figure.texts[-1].get_text().replace("\n", " ")
    assert (
        "n = 4, 8, 16, 24, read as heads kept (k = n, filled) and as heads combined (k = 32 - n + 1, hollow)" in small
    )
    plot = plots.tradeoff(Results(own), "x", load_scores(Results(own)))[0]
    names = {trace["name"]: trace["marker"]["symbol"] for trace in json.loads(plot.spec)["data"] if "marker" in trace}
    assert (names["random, n kept"], names["random, n combined"]) == ("square", "square-open")
    assert "read as heads kept" in plot.note


def test_the_interval_is_that_of_the_paired_change(drawn):
    _, data = drawn
    chai = data[data.method == "chai"].iloc[0]
    change = compare(
        *(pd.DataFrame({"doc_id": range(200), "doc_hash": "a", "acc": outcomes(150, n)}) for n in (0, 4)), "acc"
    )
    widths = [change.high - change.low, (chai.high - chai.low) / 100]
    assert chai.low < chai.accuracy < chai.high
    assert widths[1] == pytest.approx(widths[0] / 5**0.5, rel=0.1)  # a mean of five such tasks
    assert data[data.method == "mha"][["low", "high"]].isna().all(axis=None)


def test_the_front_is_what_nothing_else_beats():
    cost, accuracy = pd.Series([10, 5, 5, 7, 1, 12]), pd.Series([90, 60, 70, 65, 50, 90])
    assert on_front(cost, accuracy) == [True, False, True, False, True, False]
    assert on_front(pd.Series([3, 3]), pd.Series([4, 4])) == [True, True]


def test_only_tasks_that_all_methods_have_count(own):
    save(own, "chai", {**CHAI, "tokens": 8}, 25_000, 9.0, 0, tasks=("piqa",))
    figure, data = fig1.draw(Results(own))
    assert len(data) == len(RUNS)
    assert "Not shown, without these tasks beside MHA: CHAI tokens=8." in figure.texts[-1].get_text().replace("\n", " ")


def test_fewer_tasks_where_that_leaves_more_methods(tmp_path):
    save(tmp_path, *RUNS[0], tasks=TASKS)
    for run in RUNS[1:]:
        save(tmp_path, *run, tasks=TASKS[:2])
    figure, data = fig1.draw(Results(tmp_path))
    assert len(data) == len(RUNS)
    assert "mean of PIQA, HellaSwag (400 items)" in figure.get_suptitle()


def test_time_from_scoring_and_from_latency_runs_stand_apart(own):
    synthetic.save(own, "latency", synthetic.latency(), "aaaaaaaaaaaa", model="llama7b-random")
    other = [16] * 32
    synthetic.save(own, "latency", synthetic.latency(other), "bbbbbbbbbbbb", heads_kept=other)  # other counts
    results = Results(own)
    figure, data = fig14.draw(results)
    scoring, first = figure.axes
    assert scoring.get_xlabel() == "time to score the tasks\n(% of MHA's 50 s)"
    assert first.get_xlabel().startswith("time to first token, 2,048 tokens")
    assert data[(data.panel == "scoring") & (data.method == "spatten")].cost.item() == pytest.approx(140)
    measured = data[data.panel == "first token"].set_index("method").cost
    assert set(measured.index) == {"mha", "chai"}
    table = synthetic.latency()
    row = table[(table.part == "model") & (table.phase == "prefill") & (table.length == 2048) & ~table.baseline]
    assert measured["mha"] == 100 and measured["chai"] == pytest.approx(100 / row.speedup.item())
    used = [run.result["run_id"] for run in results.used]
    assert "aaaaaaaaaaaa" in used and "bbbbbbbbbbbb" not in used


def test_times_of_several_devices_are_called_incomparable(tmp_path):
    save(tmp_path, *RUNS[0])
    for place, task in enumerate(TASKS):
        more = fields(26_000, 2.0, "chai") | {"device": "cuda:0"}
        scored.save(tmp_path, "chai", task, outcomes(150 + 5 * place), CHAI, result=more)
    figure, _ = fig14.draw(Results(tmp_path))
    assert "several devices (cpu, cuda:0)" in figure.texts[-1].get_text().replace("\n", " ")


def test_without_latency_runs_there_is_one_panel(root):
    figure, data = fig14.draw(Results(root))
    assert len(figure.axes) == 1 and set(data.panel) == {"scoring"}


def test_command_line(root, tmp_path, capsys):
    out = tmp_path / "figures"
    assert main(["fig1", "fig14", "--results", str(root), "--out", str(out)]) == 0
    assert "85 runs in" in capsys.readouterr().out
    assert len(pd.read_csv(out / "fig1.csv")) == len(RUNS)
    assert main(["fig1", "--results", str(root), "--out", str(out), "--model", "tiny"]) == 1
    assert capsys.readouterr().err.strip().endswith("make one with: python run.py -m paper=micro model=tiny")


def test_runs_that_count_no_operations_are_none(tmp_path):
    for method in ("mha", "chai"):
        scored.save(tmp_path, method, "piqa", outcomes(150), CHAI if method == "chai" else None, model=MODEL)
    results = Results(tmp_path)
    with pytest.raises(MissingRun, match="could be used"):
        fig1.draw(results)
    assert set(results.skipped.values()) == {"result.json has no flops (rerun with force=true)"}
    assert len(fig14.draw(Results(tmp_path))[1]) == 2


def test_every_method_has_a_symbol_on_the_page():
    """Plotly's name of the marker that the figures have."""
    assert {style.LOOKS[name]["marker"] for name in style.METHODS} <= set(plots.SYMBOLS)
