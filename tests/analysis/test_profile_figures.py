"""Figures of saved profiles: what is drawn is what was saved, from the right run, and legible."""

from __future__ import annotations

import hashlib
import json
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from analysis import figures
from analysis.figures import (
    fig2,
    fig4,
    fig6,
    fig6_clusters,
    fig7,
    fig8,
    fig8_elbow,
    fig9,
    fig13,
    fig15,
    fig16,
)
from analysis.figures.__main__ import main
from analysis.plotting import correlation as correlations
from analysis.plotting import maps, style, tokens
from analysis.results.files import SkippedRun
from analysis.results.profiles import PROFILE, Profile, best_profile, load_profile
from analysis.results.runs import MissingRun, Results
from tests.analysis import synthetic

MODULES = {2: fig2, 4: fig4, 6: fig6, 7: fig7, 8: fig8, 9: fig9, 13: fig13, 15: fig15, 16: fig16}
NAMES = [f"fig{number}" for number in MODULES]
SMALL = synthetic.profile(4, 16)
SEVEN = synthetic.profile(32, 32, history=64)
OPT = synthetic.profile(64, 72, tokens=synthetic.BYTES, uniform=0.5, history=64)
TINY = {"model": "tiny", "task": "micro", "device": "cpu", "device_name": None, "dtype": "float32"}


def with_stability(profile):
    """The arrays and entries of profile.json that profiles of earlier versions lack: two more clusters are possible."""
    arrays, kept = profile
    layers, heads = arrays["assignment"].shape
    counts, rng = arrays["clusters"], np.random.default_rng(0)
    by_k = np.stack([np.arange(heads) % k for k in range(1, heads + 1)]).astype(np.int16)
    within, between = rng.uniform(0.4, 1, (layers, heads)), rng.uniform(0, 0.4, (layers, heads))
    within[:, -1], between[:, 0] = np.nan, np.nan
    arrays = arrays | {
        "assignment_by_k": np.tile(by_k, (layers, 1, 1)),
        "sample_error": (arrays["error"] * rng.uniform(0.5, 1.5, (10, layers, heads))).astype(np.float32),
        "within": within, "between": between,
    }  # fmt: skip
    low, high = np.maximum(counts - 1, 1), np.minimum(counts + 2, heads)
    stability = {"level": 0.95, "resamples": 1000, "low": low.tolist(), "high": high.tolist()}
    stability |= {"splits": 200, "halves_equal": [0.5] * layers, "halves_difference": [1.0] * layers}
    rules = {"plateau": counts.tolist(), "knee": np.maximum(counts // 2, 1).tolist(), "error": [heads] * layers}
    return (arrays, kept), {"stability": stability, "rules": rules}


def save_stable(root, profile, run_id, **fields):
    """A profile of this version on disk."""
    profile, about = with_stability(profile)
    folder = synthetic.save_profile(root, *profile, run_id, **fields)
    describe(folder, **about)
    return folder


@pytest.fixture
def small(tmp_path):
    """The embedded model's profile."""
    synthetic.save_profile(tmp_path, *SMALL, "cccccccccccc", **TINY)
    return tmp_path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """LLaMA-7B's profile and OPT-66B's, and the embedded model's, which is the newest."""
    root = tmp_path_factory.mktemp("both")
    synthetic.save_profile(root, *SMALL, "cccccccccccc", **TINY, updated=1_800_000_000)
    synthetic.save_profile(root, *SEVEN, "aaaaaaaaaaaa")
    synthetic.save_profile(root, *OPT, "bbbbbbbbbbbb", model="opt66b", updated=1_780_000_000)
    return root


def run_main(root, *arguments):
    return main([*arguments, "--results", str(root), "--out", str(root / "figures")])


@cache
def drawn(module, root, model=None):
    """The figure as it is printed, laid out, and its data; a warning about a glyph or the layout is an error."""
    results = Results(root, model)
    with rc_context(style.STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, data = module.draw(results)
        FigureCanvasAgg(figure)
        figure.set_dpi(200)
        figure.draw_without_rendering()
    return figure, data, results


def image(axes):
    """What a panel's picture shows."""
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def tick_labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def footer(figure):
    return figure.texts[-1].get_text()


def texts(figure):
    """Everything written that can be seen."""
    for axes in figure.axes:
        if axes.get_visible():
            yield from (axes.title, axes.xaxis.label, axes.yaxis.label)
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
    yield from (*figure.texts, figure._suptitle)


def assert_legible(figure):
    """All text is on the page, and labels of an axis don't touch each other."""
    page = figure.bbox
    for text in texts(figure):
        if text.get_visible() and text.get_text():
            box = text.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
    for axes in figure.axes:
        across = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        down = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
        assert all(left.x1 <= right.x0 + 0.5 for left, right in zip(across, across[1:], strict=False))
        for one, other in zip(down, down[1:], strict=False):
            assert one.y1 <= other.y0 + 0.5 or other.y1 <= one.y0 + 0.5
    lowest = min(axes.get_tightbbox().y0 for axes in figure.axes if axes.get_visible())
    assert figure.texts[-1].get_window_extent().y1 <= lowest + 1
    assert figure._suptitle.get_window_extent().y0 >= max(axes.bbox.y1 for axes in figure.axes)


def test_command_line(small, capsys):
    names = ("fig2", "fig8")
    assert run_main(small, *names) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name in names:
        (line,) = [line for line in said.out.splitlines() if line.startswith(f"{name}: ")]
        assert "cccccccccccc (tiny, cpu, float32" in line
        assert imread(small / "figures" / f"{name}.png").shape[1] == 1480  # 7.4 inches at 200 dpi
        assert (small / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert set(pd.read_csv(small / "figures" / f"{name}.csv").run) == {"cccccccccccc"}


# Figures 7 and 6, and 16 and 15, are drawn alike; the large ones of all layers are in a test of their own.
@pytest.mark.parametrize(
    ("model", "number"),
    [
        *(("tiny", number) for number in MODULES if number not in (6, 15)),
        *(("llama7b", number) for number in MODULES if number not in (7, 15, 16)),
        *(("opt66b", number) for number in MODULES if number not in (6, 15, 16)),
    ],
)
def test_every_figure_of_every_shape_is_legible(model, number, both):
    figure, data, results = drawn(MODULES[number], both, model)
    assert_legible(figure)
    name = style.label(model)
    assert name in figure.get_suptitle() and f"(paper, Figure {number})" in figure.get_suptitle()
    assert set(data.model) == {model} and [run.model for run in results.used] == [model]
    shown = "micro" if model == "tiny" else "c4"
    assert f"{shown}, 1,024 samples of up to 2,048 tokens" in footer(figure)
    papers = {4: {"opt66b", "llama7b"}, 15: {"opt66b"}}.get(number, {"llama7b"})
    assert ("The paper's figure is of" in footer(figure).replace("\n", " ")) == (papers != {model})


def test_grouped_queries_and_odd_shapes(tmp_path):
    """Fewer KV heads than heads change nothing; layers that don't fill the grid, one kept sample."""
    synthetic.save_profile(tmp_path, *synthetic.profile(6, 8, samples=1), "g", model="llama3_8b", key_heads=2)
    for module in (fig2, fig4, fig6, fig13, fig16):
        figure, _, _ = drawn(module, tmp_path)
        assert_legible(figure)
        assert "Llama-3-8B" in figure.get_suptitle()


def test_heads_in_clustered_order():
    arrays = {"assignment": np.array([[2, 0, 1, 1, 0, 1]]), "clusters": np.array([3])}
    groups = Profile(None, {}, arrays, 1, 6, [3], 1).order(0)
    assert [heads.tolist() for heads in groups] == [[2, 3, 5], [1, 4], [0]]


def test_fig2_shows_a_late_layer_in_clustered_order(both):
    figure, data, _ = drawn(fig2, both, "llama7b")
    left, right = figure.axes[:2]
    arrays = SEVEN[0]
    (layer,) = set(data.layer)
    assert 16 <= layer < 24 and f"layer {layer}" in left.get_title()
    contrast = {}
    for late in range(16, 24):
        same = arrays["assignment"][late][:, None] == arrays["assignment"][late]
        inside = same & ~np.eye(32, dtype=bool)
        values = arrays["sample_correlation"][0, late]
        contrast[late] = values[inside].mean() - values[~same].mean()
    assert layer == max(contrast, key=contrast.get)
    order = [int(label) for label in tick_labels(left.yaxis)]
    assert tick_labels(right.xaxis) == tick_labels(right.yaxis) == [str(head) for head in order]
    labels = arrays["assignment"][layer][order]
    sizes = [len(list(labels[labels == cluster])) for cluster in dict.fromkeys(labels)]
    assert sum(np.diff(labels) != 0) == len(sizes) - 1 and sizes == sorted(sizes, reverse=True)
    assert np.array_equal(image(left), arrays["maps"][0, layer][order])
    assert np.array_equal(image(right), arrays["sample_correlation"][0, layer][np.ix_(order, order)])
    attention = data[data.panel == "attention"]
    assert attention["head"].drop_duplicates().to_list() == order
    assert np.array_equal(attention.attention.to_numpy().reshape(32, -1), image(left).astype(float))


def test_fig2_without_clusters_to_compare_takes_the_middle(tmp_path):
    arrays, kept = synthetic.profile(4, 16)
    arrays |= {"clusters": np.ones(4, np.int64), "assignment": np.zeros((4, 16), np.int64)}
    arrays |= {"representatives": np.zeros((4, 1), np.int64)}
    synthetic.save_profile(tmp_path, arrays, kept, "a")
    figure, data, _ = drawn(fig2, tmp_path)
    assert set(data.layer) == {2} and "clearest" not in footer(figure) and "nan" not in footer(figure)


def test_fig4_of_two_models_side_by_side(both):
    figure, data, results = drawn(fig4, both)
    left, right = figure.axes[:2]
    assert [run.model for run in results.used] == ["opt66b", "llama7b"]  # the paper's order, whatever is newer
    assert left.images[0].norm.vmin == right.images[0].norm.vmin and left.images[0].norm.vmax == 1
    for axes, (arrays, _), name in ((left, OPT, "OPT-66B"), (right, SEVEN, "LLaMA-7B")):
        uniform = arrays["entropy"] > 0.9
        layer = int(data[data.model == {"OPT-66B": "opt66b"}.get(name, "llama7b")].layer.iloc[0])
        assert uniform[layer].sum() == uniform.sum(1).max()
        assert name in axes.get_title() and f"layer {layer}" in axes.get_title()
        assert f"{uniform[layer].sum()} of {len(uniform[layer])} heads" in axes.get_title()
        assert f"all layers: {100 * uniform.mean():.1f} %" in axes.get_title()
        assert np.array_equal(image(axes), arrays["maps"][0, layer])
    assert "36 of 72" in left.get_title() and "0 of 32" in right.get_title()
    assert data.groupby("model").size().to_dict() == {"opt66b": 72 * 33, "llama7b": 32 * 33}
    assert footer(figure).count("run ") == 2


def test_fig4_model_option(both, small, capsys):
    assert run_main(both, "fig4", "--model", "llama7b,opt66b") == 0
    assert capsys.readouterr().out.count("aaaaaaaaaaaa") == 1
    assert pd.read_csv(both / "figures" / "fig4.csv").model.drop_duplicates().to_list() == ["llama7b", "opt66b"]
    figure, data, _ = drawn(fig4, both, "llama7b")
    assert set(data.model) == {"llama7b"} and len(figure.axes) == 2  # a map and its colour bar
    assert run_main(small, "fig4", "--model", "tiny,opt66b") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "of model 'opt66b'" in line
    assert line.endswith("make one with: python run.py experiment=profile corpus=c4 model=opt66b")


def test_fig4_takes_random_weights_for_the_same_model(tmp_path):
    synthetic.save_profile(tmp_path, *SMALL, "old", model="llama7b", updated=1)
    synthetic.save_profile(tmp_path, *SMALL, "random", model="llama7b-random", updated=2)
    synthetic.save_profile(tmp_path, *SMALL, "tiny1", model="tiny", updated=3)
    synthetic.save_profile(tmp_path, *SMALL, "other", model="opt125m", updated=4)
    _, _, results = drawn(fig4, tmp_path)
    assert [run.folder.name for run in results.used] == ["random", "other"]


@pytest.mark.parametrize("module", [fig6, fig7])
def test_fig6_and_7_heat_maps_and_depth(module, both):
    figure, data, _ = drawn(module, both, "llama7b")
    arrays = SEVEN[0]
    shown = arrays["correlation"] if module is fig6 else arrays["sample_correlation"][0]
    panels = [axes for axes in figure.axes if axes.images]
    assert data[data.panel == "heat map"].layer.drop_duplicates().to_list() == [0, 10, 21, 31]
    for axes, layer in zip(panels, [0, 10, 21, 31], strict=True):
        order = [int(label) for label in tick_labels(axes.yaxis)]
        assert sorted(order) == list(range(32))  # every head has its label
        assert np.array_equal(image(axes), shown[layer][np.ix_(order, order)])
        assert axes.images[0].get_clim() == (0, 1)
        sizes = np.unique(arrays["assignment"][layer], return_counts=True)[1]
        frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert [frame.get_width() for frame in frames] == sorted(sizes[sizes > 1], reverse=True)
        for frame in frames:
            inside = order[int(frame.get_x() + 0.5) : int(frame.get_x() + 0.5 + frame.get_width())]
            assert len(set(arrays["assignment"][layer][inside])) == 1
        rows = data[(data.panel == "heat map") & (data.layer == layer)]
        assert np.array_equal(rows.correlation, shown[layer][rows["head"].astype(int), rows.other_head.astype(int)])
    depth = next(axes for axes in figure.axes if axes.get_xlabel() == "layer")
    expected = [(layer.sum() - np.trace(layer)) / (32 * 31) for layer in shown.astype(float)]
    assert depth.lines[0].get_ydata() == pytest.approx(expected)
    assert len(depth.lines) == (1 if module is fig6 else 2)
    assert "Negative correlations have the colour of 0" in footer(figure)


def test_fig8_errors_and_chosen_k(both):
    figure, data, _ = drawn(fig8, both, "llama7b")
    absolute, relative = figure.axes[:2]
    arrays = SEVEN[0]
    curves = [line for line in relative.lines if len(line.get_xdata()) == 32]
    marks = [line for line in relative.lines if len(line.get_xdata()) == 1]
    assert len(curves) == len(marks) == 32
    for layer, (curve, mark) in enumerate(zip(curves, marks, strict=True)):
        error, k = arrays["error"][layer], arrays["clusters"][layer]
        assert curve.get_xdata().tolist() == list(range(1, 33))
        assert curve.get_ydata() == pytest.approx(error / error[0])
        assert mark.get_xdata() == [k] and mark.get_ydata() == pytest.approx([error[k - 1] / error[0]])
    seen = [line for line in absolute.lines if len(line.get_xdata()) == 32]
    assert seen[5].get_ydata()[:31] == pytest.approx(arrays["error"][5, :31]) and np.isnan(seen[5].get_ydata()[31])
    assert data.error.to_numpy().reshape(32, 32) == pytest.approx(arrays["error"])
    assert data.error_static.to_numpy().reshape(32, 32) == pytest.approx(arrays["error_static"])
    assert data[data.chosen].k.to_list() == arrays["clusters"].tolist()
    assert "plateau (threshold 0.05)" in footer(figure)


@pytest.mark.parametrize(("profile", "model"), [(SMALL, "tiny"), (synthetic.profile(41, 72), "opt66b")])
def test_elbow_plot_shows_the_interval_and_every_choice(profile, model, tmp_path):
    save_stable(tmp_path, profile, "a", model=model, updated=3)
    arrays, about = profile[0], with_stability(profile)[1]
    counts, layers = arrays["clusters"].tolist(), len(arrays["clusters"])
    # Runs of other seeds; the third has other settings.
    for run_id, changes in (("b", {}), ("c", {}), ("d", {"features": "last_row"})):
        seed = {"b": 1, "c": 2, "d": 3}[run_id]
        describe(save_stable(tmp_path, profile, run_id, model=model, seed=seed, updated=seed - 2), **changes)
    figure, data, results = drawn(fig8_elbow, tmp_path)
    assert_legible(figure)
    assert [run.folder.name for run in results.used] == ["a", "b", "c"]
    panels = [axes for axes in figure.axes if axes.get_title().startswith("layer ")]
    assert len(panels) == layers
    for layer, axes in enumerate(panels):
        curve, *marks = axes.lines
        assert curve.get_ydata() == pytest.approx(arrays["error"][layer] / arrays["error"][layer, 0])
        places = [int(np.asarray(mark.get_xdata()).item()) for mark in marks]
        assert places == [about["rules"]["knee"][layer], about["rules"]["error"][layer], counts[layer]]
        (band,) = axes.patches
        assert band.get_x() == about["stability"]["low"][layer] - 0.5
        assert band.get_x() + band.get_width() == pytest.approx(about["stability"]["high"][layer] + 0.5)
    lower = next(axes for axes in figure.axes if axes.get_xlabel() == "layer")
    shown = {line.get_label(): line.get_ydata() for line in lower.lines}
    assert list(shown) == ["chosen by plateau", "knee", "error", "2 other seeds"]
    assert list(shown["chosen by plateau"]) == counts and list(shown["knee"]) == about["rules"]["knee"]
    assert list(shown["2 other seeds"]) == 2 * counts
    assert [bar.get_y() + 0.5 for bar in lower.patches] == about["stability"]["low"]
    assert data[(data.panel == "elbow") & data.chosen.eq(True)].low.to_list() == about["stability"]["low"]
    assert "1,000 bootstrap samples" in footer(figure)


def test_figure_8_shows_the_interval(tmp_path):
    save_stable(tmp_path, SMALL, "a", **TINY)
    figure, data, _ = drawn(fig8, tmp_path)
    stability = with_stability(SMALL)[1]["stability"]
    spans = [tuple(part.get_segments()[0][:, 0]) for part in figure.axes[1].collections]
    assert spans == list(zip(stability["low"], stability["high"], strict=True))
    assert data[data.chosen].high.to_list() == stability["high"]


def test_profiles_of_earlier_versions_have_no_interval(small, capsys):
    for module in (fig8, fig8_elbow):
        figure, data, _ = drawn(module, small)
        assert_legible(figure)
        assert "No interval of the chosen numbers" in footer(figure) and "low" not in data
    assert not [patch for axes in figure.axes for patch in axes.patches]
    for words, lacks in ((["fig6_clusters"], "within, between"), (["fig7", "--clusters", "4"], "assignment_by_k")):
        assert run_main(small, *words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is of an earlier version, without {lacks} (force=true makes it again); make one with: " in line


@pytest.mark.parametrize(("profile", "model"), [(SMALL, "tiny"), (SEVEN, "llama7b"), (OPT, "opt66b")])
def test_correlation_at_every_number_of_clusters(profile, model, tmp_path):
    save_stable(tmp_path, profile, "a", model=model)
    figure, data, _ = drawn(fig6_clusters, tmp_path)
    assert_legible(figure)
    arrays = with_stability(profile)[0][0]
    for axes, series in zip(figure.axes, ("within", "between"), strict=False):
        curves = [line for line in axes.lines if len(line.get_xdata()) == arrays[series].shape[1]]
        assert len(curves) == len(arrays[series])
        for curve, expected in zip(curves, arrays[series], strict=True):
            np.testing.assert_array_equal(curve.get_ydata(), expected)
        rows = data[data.series == series]
        np.testing.assert_array_equal(rows.correlation.to_numpy().reshape(arrays[series].shape), arrays[series])
        assert rows[rows.chosen].k.to_list() == arrays["clusters"].tolist()


@pytest.mark.parametrize("module", [fig2, fig6, fig7, fig13])
def test_figures_at_another_number_of_clusters(module, tmp_path):
    save_stable(tmp_path, SMALL, "a", **TINY)
    with rc_context(style.STYLE):
        figure, data = module.draw(Results(tmp_path), clusters=5)
        FigureCanvasAgg(figure).draw()
    assert "With 5 clusters in every layer, as requested." in footer(figure).replace("\n", " ")
    assert "k = 5 in all 4 layers" in figure.get_suptitle()
    if module is fig13:
        assert set(data[data.panel == "shares"].clusters) == {5}
    else:
        pairs = data.dropna(subset=["other_head"])
        assert (pairs.cluster == pairs["head"] % 5).all() and pairs.cluster.nunique() == 5


def test_another_number_of_clusters_from_the_command_line(tmp_path, capsys):
    save_stable(tmp_path, SMALL, "a", **TINY)
    assert run_main(tmp_path, "fig7", "--clusters", "5") == 0
    assert "fig7_k5.png" in capsys.readouterr().out and not (tmp_path / "figures" / "fig7.png").exists()
    for number in ("0", "17", "-1"):
        assert run_main(tmp_path, "fig7", f"--clusters={number}") == 2
        assert capsys.readouterr().err == (
            f"error: fig7_k{number}: --clusters {number}: a layer has 16 heads; valid: 1 to 16\n"
        )
    assert run_main(tmp_path, "fig7", "fig8", "--clusters", "4") == 2
    assert capsys.readouterr().err == "error: fig8 takes no --clusters; valid: fig2, fig6, fig7, fig13\n"


def test_fig9_changes_in_percent_and_agreement(both):
    figure, data, _ = drawn(fig9, both, "llama7b")
    left, right = figure.axes[:2]
    arrays = SEVEN[0]
    changing = (arrays["clusters"] > 1) & (arrays["clusters"] < 32)
    assert changing.sum() == 31
    for axes, values in ((left, 100 * arrays["changes"]), (right, arrays["agreement"])):
        *curves, mean, decide = axes.lines
        for curve, row in zip(curves, values, strict=True):
            assert curve.get_xdata().tolist() == list(range(1, len(row) + 1))
            assert curve.get_ydata() == pytest.approx(row)
        assert mean.get_ydata() == pytest.approx(values[changing].mean(0))
        assert mean.get_label() == "mean of 31 layers" and mean.get_linewidth() > 2 * curves[0].get_linewidth()
        assert decide.get_xdata() == [5, 5] and decide.get_label() == "CHAI decides: n = 5"
    assert set(data.unit) == {"%", ""} and "(%)" in left.get_ylabel()
    assert "5" in tick_labels(left.xaxis)


@pytest.mark.parametrize(("layers", "layer"), [(4, 2), (18, 10), (19, 18), (32, 18), (64, 18), (1, 0)])
def test_fig13_layer(layers, layer):
    assert fig13.the_layer(layers) == layer


def test_fig13_sizes_at_the_chosen_k(both):
    figure, _, _ = drawn(fig13, both, "llama7b")
    left, right = figure.axes[:2]
    arrays = SEVEN[0]
    k = arrays["clusters"][18]
    bars = [patch.get_height() for patch in left.patches]
    assert bars == pytest.approx(arrays["cluster_sizes"][18, k - 1, :k]) and sum(bars) == pytest.approx(32)
    segments = np.array([segment[:, 1] for segment in left.collections[0].get_segments()])
    assert (segments[:, 1] - segments[:, 0]) / 2 == pytest.approx(arrays["cluster_sizes_sd"][18, k - 1, :k])
    assert f"layer 18: {k} clusters of 32 heads" in left.get_title()
    last = arrays["cluster_sizes"][31, arrays["clusters"][31] - 1]
    assert right.lines[0].get_ydata()[31] == pytest.approx(100 * last[0] / 32)
    assert right.lines[1].get_ydata()[31] == pytest.approx(100 * last[:2].sum() / 32)


@pytest.mark.parametrize(("module", "model", "profile"), [(fig15, "opt66b", OPT), (fig16, "llama7b", SEVEN)])
def test_fig15_and_16_show_every_layer_of_their_model(module, model, profile, both):
    figure, data, results = drawn(module, both)
    assert_legible(figure)
    assert [run.model for run in results.used] == [model] and style.label(model) in figure.get_suptitle()
    panels = [axes for axes in figure.axes if axes.images]
    arrays = profile[0]
    assert len(panels) == len(arrays["clusters"])
    for layer, axes in enumerate(panels):
        assert axes.get_title() == f"layer {layer}" and np.array_equal(image(axes), arrays["maps"][0, layer])
    assert data.attention.to_numpy() == pytest.approx(arrays["maps"][0].ravel())
    assert len({axes.images[0].norm for axes in panels}) == 1
    assert "quick brown fox jumps over $ 5" in footer(figure)


def test_maps_end_with_the_sample(tmp_path):
    arrays, kept = synthetic.profile(4, 16)
    kept[0] = {"tokens": kept[0]["tokens"][:9]}
    arrays["maps"][0, :, :, 9:] = 0
    synthetic.save_profile(tmp_path, arrays, kept, "a")
    _, data, _ = drawn(fig16, tmp_path)
    assert data.position.max() == 8 and len(data) == 4 * 16 * 9


@pytest.mark.parametrize("sentence", [synthetic.SENTENCE, synthetic.BYTES])
def test_tokens_in_print(sentence):
    labels = tokens.labels(sentence)
    assert labels[1:9] == ["The", "quick", "brown", "fox", "jumps", "over", "$", "5"]
    assert labels[14] == "\\n" and labels[24] == "extraordina…" and labels[27] == "—"
    assert labels[31] == "?"  # a glyph that the font lacks


def test_odd_tokens_in_print():
    assert tokens.labels(["▁▁", "\t", "a\nb", "", "<0xE4>", "é", "$x$"]) == [
        "␣",
        "\\t",
        "a\\nb",
        "",
        "<0xE4>",
        "é",
        "$x$",
    ]
    assert tokens.labels(["Ġ", "<|endoftext|>", "Ã©"]) == ["␣", "<|endoftext…", "é"]


def test_labels_are_thinned_where_they_would_touch():
    assert maps.thin(32, 2.62)[0] == list(range(32))
    shown, size = maps.thin(72, 2.62)
    assert shown == list(range(0, 72, 3)) and size >= maps.SMALLEST


def test_correlation_within_and_between():
    correlation = np.array([[1, 0.8, 0.1], [0.8, 1, 0.3], [0.1, 0.3, 1]])
    within, between = correlations.within_and_between(correlation, np.array([0, 0, 1]))
    assert within == pytest.approx(0.8) and between == pytest.approx(0.2)
    assert np.isnan(correlations.within_and_between(correlation, np.array([0, 1, 2]))[0])
    assert correlations.between_heads(correlation[None]) == pytest.approx([0.4])


@pytest.mark.parametrize("name", NAMES)
def test_missing_input_names_the_commands(name, tmp_path, capsys):
    assert run_main(tmp_path, name) == 1
    (line,) = capsys.readouterr().err.splitlines()
    command = f"python run.py experiment=profile model={'opt66b' if name == 'fig15' else 'llama7b'} corpus=c4"
    assert line == (
        f"error: {name}: no finished profile run in {tmp_path}; make one with: {command} "
        "(without a GPU: python run.py experiment=profile model=tiny)"
    )
    assert run_main(tmp_path, name, "--model", "tiny") == 1
    assert capsys.readouterr().err.endswith("make one with: python run.py experiment=profile model=tiny\n")


def test_list_has_all_nine(capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    for name, module in zip(NAMES, MODULES.values(), strict=True):
        (place,) = [place for place, line in enumerate(said) if line.split()[:1] == [name]]
        assert module.TITLE in said[place] and f"needs experiment=profile: {module.QUERY.command}" in said[place + 1]
        assert "model=tiny" in said[place + 1]
    assert [name for name in figures.names() if name in NAMES] == NAMES


def test_command_for_several_models():
    assert fig4.QUERY.command_for("opt66b-random,tiny") == (
        "python run.py experiment=profile corpus=c4 model=opt66b model.random_init=true; "
        "python run.py experiment=profile model=tiny"
    )


def rewrite(folder, **changes):
    """Other arrays, or none, with the digest that belongs to them."""
    arrays = safetensors.numpy.load_file(folder / "profile.safetensors") | changes
    content = safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items() if array is not None})
    (folder / "profile.safetensors").write_bytes(content)
    describe(folder, sha256=hashlib.sha256(content).hexdigest())


def describe(folder, **changes):
    about = json.loads((folder / "profile.json").read_text()) | changes
    (folder / "profile.json").write_text(
        json.dumps({name: value for name, value in about.items() if value is not None})
    )


def cut(folder, right_digest=False):
    content = (folder / "profile.safetensors").read_bytes()[:5000]
    (folder / "profile.safetensors").write_bytes(content)
    if right_digest:
        describe(folder, sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "profile.safetensors is corrupt, or not the one that profile.json describes"),
        (lambda folder: cut(folder, right_digest=True), "profile.safetensors is corrupt"),
        (lambda folder: (folder / "profile.safetensors").unlink(), "no profile.safetensors"),
        (lambda folder: (folder / "profile.json").unlink(), "no profile.json"),
        (lambda folder: (folder / "profile.json").write_text('{"form'), "profile.json is corrupt"),
        (lambda folder: (folder / "profile.json").write_text('{"a": 1}'), "profile.json has format None, expected 1"),
        (lambda folder: describe(folder, format=2), "profile.json has format 2, expected 1"),
        (lambda folder: describe(folder, kept=None), "profile.json is incomplete"),
        (lambda folder: describe(folder, kept=[1, 2]), "profile.json is incomplete"),
        (lambda folder: describe(folder, kept=[]), "profile.json is incomplete"),
        (lambda folder: describe(folder, model={"layers": "4"}), "profile.json is incomplete"),
        (lambda folder: describe(folder, rule="knee"), "profile.json is incomplete"),
        (lambda folder: describe(folder, stability={"low": [1] * 4}), "profile.json is incomplete"),
        (lambda folder: describe(folder, rules={"knee": [1] * 3}), "profile.json is incomplete"),
        (
            lambda folder: rewrite(folder, within=np.zeros((4, 15))),
            "profile.safetensors: within has shape (4, 15), expected (4, 16)",
        ),
        (
            lambda folder: describe(folder, model={"layers": 4, "heads": 8}),
            "profile.json and result.json describe different models",
        ),
        (lambda folder: rewrite(folder, error=None, maps=None), "profile.safetensors has no error, maps"),
        (
            lambda folder: rewrite(folder, error=np.zeros((4, 15))),
            "profile.safetensors: error has shape (4, 15), expected (4, 16)",
        ),
        (
            lambda folder: rewrite(folder, changes=np.zeros((4, 24))),
            "profile.safetensors: changes has shape (4, 24), expected (4, 23)",
        ),
        (
            lambda folder: rewrite(folder, clusters=np.full(4, 3.0)),
            "profile.safetensors: clusters has dtype float64, expected integers",
        ),
        (
            lambda folder: rewrite(folder, assignment=np.full((4, 16), 16)),
            "profile.safetensors: assignment has clusters that do not exist",
        ),
        (
            lambda folder: rewrite(folder, maps=np.float32(1)),
            "profile.safetensors: maps has shape (), expected (2, 4, 16, 0)",
        ),
        (
            lambda folder: rewrite(
                folder,
                clusters=SMALL[0]["clusters"] + [-1, 0, 0, 0],
                assignment=np.zeros((4, 16), int),
                representatives=np.zeros((4, 15), int),
            ),
            "profile.safetensors and result.json have different numbers of clusters",
        ),
    ],
)
def test_a_profile_that_does_not_count_is_left_out(damage, reason, small, capsys):
    newer = synthetic.save_profile(small, *SMALL, "dddddddddddd", **TINY, updated=1_800_000_000)
    assert best_profile(Results(small)).run.folder == newer
    damage(newer)
    results = Results(small)
    assert best_profile(results).run.folder.name == "cccccccccccc"
    assert results.skipped == {newer: reason}


def test_no_sound_profile_is_missing_input(small, capsys):
    (folder,) = (small / "profile/tiny/none/micro").iterdir()
    cut(folder)
    assert run_main(small, "fig8") == 1
    error, left_out = capsys.readouterr().err.splitlines()
    assert "could be used (available: none on tiny, cpu)" in error and fig8.QUERY.command in error
    assert left_out == f"left out: {folder}: profile.safetensors is corrupt, or not the one that profile.json describes"


def test_the_preferred_model_then_the_newest(tmp_path):
    for model, updated in (("tiny", 9), ("opt125m", 8), ("llama7b-random", 2), ("opt66b", 1)):
        synthetic.save_profile(tmp_path, *SMALL, model, model=model, updated=updated)

    def model_of(prefer):
        return best_profile(Results(tmp_path), prefer).run.model

    assert model_of(("llama7b",)) == "llama7b-random"
    assert model_of(("opt66b", "llama7b")) == "opt66b"
    assert model_of(("llama33b",)) == "tiny"
    assert best_profile(Results(tmp_path, "opt125m,tiny")).run.model == "tiny"
    with pytest.raises(MissingRun, match="of model 'a' or 'b' in .* could be used"):
        best_profile(Results(tmp_path, "a,b"))


def test_an_unknown_file_is_named_when_loaded(small):
    run = Results(small).ranked(PROFILE)[0]
    (run.folder / "profile.json").write_text("[]")
    with pytest.raises(SkippedRun, match="profile.json is corrupt"):
        load_profile(run)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"name": "sensitivity", "budget": "heads", "amount": 6.5, "metric": "output"}, "sensitivity"),
        ({"name": "budget", "saving": 0.2, "combine": "per_sample"}, "saving"),  # of earlier versions
        ({"name": "budget", "error": 0.1, "combine": "per_sample"}, "error"),
    ],
)
def test_the_rule_that_chose_is_named(rule, name, tmp_path):
    """In the elbow plots, beside the other rules; the footer of Figure 8 has its parameters."""
    counts = SMALL[0]["clusters"].tolist()
    folder = save_stable(tmp_path, SMALL, "a", **TINY)
    rules = with_stability(SMALL)[1]["rules"]
    describe(folder, rule=rule, rules={"knee": rules["knee"], "plateau": rules["knee"], name: counts})
    assert best_profile(Results(tmp_path)).rule == name
    figure, _, _ = drawn(fig8_elbow, tmp_path)
    lower = next(axes for axes in figure.axes if axes.get_xlabel() == "layer")
    assert {line.get_label() for line in lower.lines} == {f"chosen by {name}", "knee", "plateau"}
    figure, _, _ = drawn(fig8, tmp_path)
    assert rule["name"] in footer(figure)
