"""Figures from saved results: what is drawn, what is said, and what is left out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from analysis import figures
from analysis.figures import fig11, fig12a, fig12b
from analysis.figures.__main__ import main
from analysis.plotting import style
from analysis.results.benchmarks import LATENCY, times
from analysis.results.runs import MissingRun, Results
from tests.analysis import synthetic

PATCH_7B = [28] * 3 + [18] * 12 + [8] * 2 + [4] * 15
ALL = ("fig11", "fig12a", "fig12b")


@pytest.fixture
def root(tmp_path):
    """A finished run of each experiment."""
    synthetic.save(tmp_path, "memory", synthetic.memory(), "aaaaaaaaaaaa")
    synthetic.save(tmp_path, "latency", synthetic.latency(), "bbbbbbbbbbbb")
    return tmp_path


def run_main(root, *arguments):
    return main([*arguments, "--results", str(root), "--out", str(root / "figures")])


def lines(axes):
    """What is drawn by label; whiskers' caps and the line at 1 have none."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def points(line):
    return [(round(x), pytest.approx(y)) for x, y in zip(*line.get_data(), strict=True)]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_draws_all_three_and_says_from_which_run(root, capsys):
    assert run_main(root, *ALL) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name, run in zip(ALL, ("aaaaaaaaaaaa", "bbbbbbbbbbbb", "bbbbbbbbbbbb"), strict=True):
        (line,) = [line for line in said.out.splitlines() if line.startswith(f"{name}: ")]
        assert run in line and "NVIDIA H200" in line and "float16" in line
        picture = imread(root / "figures" / f"{name}.png")
        assert picture.shape[1] == 1480  # 7.4 inches at 200 dpi
        assert picture[:, :, :3].min() < 0.2 and picture[:, :, :3].mean() > 0.8
        assert (root / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert len(pd.read_csv(root / "figures" / f"{name}.csv")) > 20


def test_the_same_data_make_the_same_files(root):
    contents = []
    for _ in range(2):
        assert run_main(root, "fig11") == 0
        contents.append([(root / "figures" / f"fig11.{end}").read_bytes() for end in ("png", "pdf", "csv")])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("module", [fig11, fig12a, fig12b])
def test_csv_holds_the_plotted_numbers(root, module):
    name = module.__name__.rpartition(".")[2]
    assert run_main(root, name) == 0
    saved = pd.read_csv(root / "figures" / f"{name}.csv")
    figure, _ = module.draw(Results(root))
    for axes, panel in zip(figure.axes, dict.fromkeys(saved.panel), strict=True):
        rows = saved[saved.panel == panel]
        # Caps and the line at 1 come without markers or lines of their own data; everything else must be in the file.
        drawn = {
            (round(x), float(f"{y:.6g}"))
            for line in axes.lines
            if line.get_marker() != "_" and line.get_xdata()[0] != 0
            for x, y in zip(*line.get_data(), strict=True)
        }
        assert drawn == {(row.length_tokens, row.value) for row in rows.itertuples()}
        whiskers = {
            tuple(float(f"{y:.6g}") for y in segment[:, 1])
            for bars in axes.collections
            for segment in bars.get_segments()
        }
        expected = (
            {(row.p25, row.p75) for row in rows.itertuples() if not np.isnan(row.p25)} if "p25" in rows else set()
        )
        assert whiskers == expected


def test_fig11_live_bytes_arithmetic_and_claim(root):
    figure, data = fig11.draw(Results(root))
    cache, saved = figure.axes
    table = synthetic.memory().set_index(["method", "length"])
    live, claim = lines(cache)["CHAI, live tensors"], lines(cache)["paper's claim: 21.4 % saved (LLaMA-7B)"]
    assert points(live) == [(n, table.cache_bytes["chai", n] / 1e9) for n in synthetic.LENGTHS]
    assert points(claim) == [(n, 0.786 * table.cache_bytes["mha", n] / 1e9) for n in synthetic.LENGTHS]
    crosses = [line for line in cache.lines if line.get_marker() == "+"]
    assert points(crosses[1]) == [(n, table.formula_bytes["chai", n] / 1e9) for n in synthetic.LENGTHS]
    assert points(crosses[1]) != points(live)
    assert set(data.unit) == {"GB", "%"} and cache.get_ylabel() == "KV cache (GB)"
    assert [text.get_text() for text in cache.texts if text.get_text()] == ["19.1 %\nsaved"]
    assert lines(saved)["CHAI, live tensors"].get_ydata()[-1] == pytest.approx(19.14, abs=0.01)
    assert "32 layers of 32 heads; k = 32×18, 4×14" in figure.get_suptitle()  # noqa: RUF001
    assert "NVIDIA H200 · float16" in figure.texts[-1].get_text()


def test_small_caches_are_in_megabytes(tmp_path):
    frame = synthetic.memory([4] * 4, heads=16, size=16, itemsize=4)
    synthetic.save(tmp_path, "memory", frame, "a", model="tiny", heads=16, heads_kept=[4] * 4)
    figure, data = fig11.draw(Results(tmp_path))
    assert data[(data.source == "arithmetic") & (data.method == "mha")].value.max() == 2048 * 16 * 32 * 4 * 4 / 1e6
    assert set(data.unit) == {"MB", "%"} and "k = 4 in all 4 layers" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("module", "phase", "claim", "words"),
    [(fig12a, "prefill", 1.73, "operations"), (fig12b, "decode", 5.0, "bytes read")],
)
def test_fig12_times_speedups_limits_and_claim(root, module, phase, claim, words):
    figure, data = module.draw(Results(root))
    times, speedups = figure.axes
    table = synthetic.latency()
    model = table[(table.part == "model") & (table.phase == phase)].set_index(["implementation", "length"])
    assert legend(times) == ["eager", "SDPA", "CHAI"]
    time = data[(data.panel == "time") & (data.implementation == "eager")]
    assert time.value.to_list() == model.ms["eager"].to_list() and set(time.unit) == {"ms"}
    shown = lines(speedups)
    assert points(shown["CHAI against SDPA"]) == [(n, model.speedup["chai", n]) for n in synthetic.LENGTHS]
    limit = shown[f"theoretical speedup ({words})"]
    assert points(limit) == [(n, model.limit["chai", n]) for n in synthetic.LENGTHS]
    (paper,) = [line for label, line in shown.items() if label.startswith("paper: ")]
    assert points(paper) == [(2048, claim)] and "V100" in paper.get_label()
    attention = table[(table.part == "attention") & (table.phase == phase) & (table.k == 4) & ~table.baseline]
    assert points(shown["attention alone, k = 4 (dotted: theoretical)"]) == list(
        zip(attention.length, attention.speedup, strict=True)
    )
    assert not any("k = 32" in label for label in shown)  # as many clusters as heads: nothing is clustered


def test_fig12_draws_every_cache_and_the_control(tmp_path):
    """Of each cache the fastest kernel; the gain is over the fastest of all, with its quartiles and those of k = H."""
    frame = synthetic.with_control(synthetic.latency())
    synthetic.save(tmp_path, "latency", frame, "a")
    figure, data = fig12b.draw(Results(tmp_path))
    assert legend(figure.axes[0]) == ["eager", "SDPA", "CHAI", "growing cache", "StaticCache", "k = H (control)"]
    model = frame[(frame.part == "model") & (frame.phase == "decode")].set_index(["implementation", "length"])
    growing = data[(data.panel == "time") & (data.implementation == "growing_cache")]
    assert growing.value.to_list() == model.ms["sdpa_growing"].to_list()
    speedups = data[data.panel == "speedup"].set_index(["source", "series", "length_tokens"])
    for length in synthetic.LENGTHS:
        gain = speedups.loc["measured", "CHAI against SDPA, growing cache", length]
        assert gain.value == model.ms["sdpa_growing", length] / model.ms["chai", length]
        assert (gain.p25, gain.p75) == (gain.value * 0.98, gain.value * 1.03)
        control = speedups.loc["control", "k = H (control)", length]
        assert (control.value, control.p25, control.p75) == (1, 0.98, 1.03)
    assert "k = H (control)" in legend(figure.axes[1])
    words = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "Medians of 9 rounds" in words and "with every head a cluster" in words and "too few" not in words


def test_runs_of_earlier_versions_and_few_rounds_say_so(tmp_path):
    synthetic.save(tmp_path, "latency", synthetic.latency().assign(rounds=2), "a")
    figure, data = fig12a.draw(Results(tmp_path))
    words = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "2 rounds (too few)" in words and "no control k = H" in words
    assert "control" not in set(data.source) and data[data.panel == "speedup"].p25.isna().all()


def test_the_control_is_no_method_elsewhere(tmp_path):
    """What reads speedups asks for the method's, and finds no row of the control."""
    folder = synthetic.save(tmp_path, "latency", synthetic.with_control(synthetic.latency()), "a")
    run = Results(tmp_path).newest(LATENCY)
    assert run.folder == folder and "control" in set(run.table.implementation)
    for phase in ("prefill", "decode"):
        rows = times(run, phase)
        assert set(rows[~rows.baseline].implementation) == {"chai"}
        assert set(times(run, phase, control=True).role) == {"baseline", "method", "control"}


def test_whiskers_ticks_and_markers(root):
    figure, _ = fig12a.draw(Results(root))
    times = figure.axes[0]
    assert list(times.get_xticks()) == list(synthetic.LENGTHS)
    figure.draw_without_rendering()
    assert [text.get_text() for text in times.get_xticklabels()] == ["128", "256", "512", "1,024", "2,048"]
    series = [line for line in times.lines if line.get_linestyle() == "-"]
    assert len({line.get_marker() for line in series}) == len({line.get_color() for line in series}) == 3


def test_legends_lie_below_their_panels(root):
    for module in (fig11, fig12a, fig12b):
        figure, _ = module.draw(Results(root))
        figure.draw_without_rendering()
        for axes in figure.axes:
            box = axes.get_legend().get_window_extent()
            assert box.y1 < axes.xaxis.label.get_window_extent().y0
            assert box.y0 > figure.texts[-1].get_window_extent().y1


def test_three_counts_of_many_and_seconds(tmp_path):
    frame = synthetic.latency(PATCH_7B, baselines=("eager", "sdpa", "xformers"), scale=60)
    synthetic.save(tmp_path, "latency", frame, "a", heads_kept=PATCH_7B)
    figure, data = fig12a.draw(Results(tmp_path))
    assert sorted(data.k.dropna().unique()) == [4, 18, 28]
    assert set(data[data.panel == "time"].unit) == {"s"} and figure.axes[0].get_ylabel() == "time to first token (s)"
    assert legend(figure.axes[0]) == ["eager", "SDPA", "xFormers", "CHAI"]


@pytest.mark.parametrize("method", ["chai_static", "random", "dejavu", "spatten", "chai_qkv"])
def test_every_methods_times_are_drawn(tmp_path, method):
    """Also those of a method without clusters, whose theoretical speedup in decoding is not known."""
    frame = synthetic.latency()
    frame = frame[frame.part == "model"].replace({"implementation": {"chai": method}})
    frame.loc[(frame.phase == "decode") & ~frame.baseline, "limit"] = None
    synthetic.save(tmp_path, "latency", frame, "a", method=method)
    for module, known in ((fig12a, True), (fig12b, False)):
        figure, data = module.draw(Results(tmp_path))
        assert len(legend(figure.axes[0])) == 3
        assert any(label.startswith("theoretical speedup") for label in legend(figure.axes[1])) == known
        assert set(data[data.panel == "speedup"].implementation.dropna()) == {method}


def test_a_best_baseline_that_changes_is_named(tmp_path):
    frame = synthetic.latency()
    frame.loc[frame.length == 128, "best_baseline"] = "eager"
    synthetic.save(tmp_path, "latency", frame, "a")
    figure, _ = fig12b.draw(Results(tmp_path))
    assert legend(figure.axes[1])[0] == "CHAI against the best of eager, SDPA"


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([4] * 32, "k = 4 in all 32 layers"),
        ([8, 6, 4, 4], "k = 8×1, 6×1, 4×2 (clusters × layers)"),  # noqa: RUF001
        (list(range(1, 9)), "k = 1 to 8, 4.5 on average"),
    ],
)
def test_clusters_in_words(counts, text):
    assert style.clusters(counts) == text


def test_list_names_figure_experiment_and_command(capsys):
    assert main(["--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * len(figures.names())
    for name, experiment in zip(ALL, ("memory", "latency", "latency"), strict=True):
        (place,) = [place for place, line in enumerate(said) if line.split()[:1] == [name]]
        assert figures.load(name).TITLE in said[place]
        assert f"needs experiment={experiment}: {figures.load(name).QUERY.command}" in said[place + 1]


def test_every_figure_names_its_input():
    names = figures.names()
    assert [name for name in names if name in ALL] == list(ALL)
    for name in names:
        figure = figures.load(name)
        assert figure.TITLE and callable(figure.draw)
        sweep = re.search(r" paper=(\w+)$", figure.QUERY.command)
        if sweep:
            assert figure.QUERY.experiment == "accuracy" and Path(f"conf/paper/{sweep[1]}.yaml").exists()
        else:
            assert f"experiment={figure.QUERY.experiment} " in figure.QUERY.command


def test_missing_input_is_one_line_with_the_command_and_the_others_are_drawn(tmp_path, capsys):
    synthetic.save(tmp_path, "latency", synthetic.latency(), "b")
    assert run_main(tmp_path, "fig11", "fig12a") == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"error: fig11: no finished memory run in {tmp_path}; make one with: {fig11.QUERY.command}"
    ]
    assert (tmp_path / "figures" / "fig12a.csv").exists() and not (tmp_path / "figures" / "fig11.png").exists()


def test_command_is_for_the_wanted_model(root, capsys):
    assert run_main(root, "fig11", "--model", "opt66b-random") == 1
    said = capsys.readouterr().err
    assert "of model 'opt66b-random'" in said and "available: chai on llama7b, NVIDIA H200" in said
    assert said.endswith("python run.py experiment=memory method=chai model=opt66b model.random_init=true\n")
    assert run_main(root, "fig11", "--model", "tiny") == 1
    assert capsys.readouterr().err.endswith("python run.py experiment=memory method=chai model=tiny\n")


def test_unknown_figure(root, capsys):
    assert run_main(root, "fig11", "fig12") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unknown figure 'fig12' (did you mean 'fig12")
    assert line.endswith(f"valid: {', '.join(figures.names())}")
    assert not (root / "figures").exists()
    assert run_main(root) == 2
    assert capsys.readouterr().err.startswith("error: no figure named; valid: ")


def test_files_that_cannot_be_written(root, capsys):
    (root / "figures").write_text("in the way")
    assert run_main(root, "fig11") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: fig11: cannot write to {root / 'figures'}: ")


def cut_parquet(folder):
    whole = (folder / "measurements.parquet").read_bytes()
    (folder / "measurements.parquet").write_bytes(whole[: len(whole) // 2])


def drop_column(folder):
    pd.read_parquet(folder / "measurements.parquet").drop(columns="limit").to_parquet(folder / "measurements.parquet")


def drop_field(folder):
    result = json.loads((folder / "result.json").read_text())
    del result["heads_kept"]
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_parquet, "measurements.parquet is corrupt"),
        (drop_column, "measurements.parquet has no limit"),
        (drop_field, "result.json has no heads_kept"),
        (lambda folder: (folder / "measurements.parquet").unlink(), "no measurements.parquet"),
        (lambda folder: (folder / "result.json").write_text('{"model": '), "result.json is corrupt"),
        (lambda folder: (folder / "result.json").write_text("[]"), "result.json is corrupt"),
        (lambda folder: (folder / "result.json").unlink(), "no result.json"),
        (lambda folder: (folder / "status.json").write_bytes(b"\xff\xfe"), "status.json is corrupt"),
        (lambda folder: (folder / "status.json").unlink(), "no status.json"),
        (
            lambda folder: (folder / "status.json").write_text('{"state": "running"}'),
            "unfinished, its state is running",
        ),
        (
            lambda folder: (folder / "status.json").write_text('{"state": "failed", "error": "out of memory"}'),
            "unfinished, its state is failed: out of memory",
        ),
    ],
)
def test_a_folder_that_does_not_count_is_left_out(root, damage, reason):
    newer = synthetic.save(root, "latency", synthetic.latency(), "cccccccccccc", updated=1_800_000_000)
    assert chosen(root) == "cccccccccccc"
    damage(newer)
    results = Results(root)
    assert results.newest(LATENCY).folder.name == "bbbbbbbbbbbb"
    assert results.skipped == {newer: reason}


def test_what_is_left_out_is_named_once(root, capsys):
    newer = synthetic.save(root, "latency", synthetic.latency(), "cccccccccccc", updated=1_800_000_000)
    cut_parquet(newer)
    assert run_main(root, "fig12a", "fig12b") == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"left out: {newer}: measurements.parquet is corrupt"]
    assert said.out.count("bbbbbbbbbbbb") == 2 and "cccccccccccc" not in said.out


def test_all_folders_corrupt_is_missing_input(root, capsys):
    (root / "memory/llama7b/chai/none/aaaaaaaaaaaa/result.json").write_text("{")
    assert run_main(root, "fig11") == 1
    error, left_out = capsys.readouterr().err.splitlines()
    assert error.endswith(fig11.QUERY.command) and left_out.endswith("aaaaaaaaaaaa: result.json is corrupt")


def chosen(root, **wanted):
    return Results(root, **wanted).newest(LATENCY).folder.name


def test_the_newest_run_of_the_main_model_is_drawn(tmp_path):
    frame = synthetic.latency()
    for name, updated, fields in (
        ("old", 10, {}),
        ("new", 30, {}),
        ("cpu", 20, {"device_name": "Intel(R) Xeon(R)"}),
        ("random", 40, {"method": "random"}),
        ("tiny1", 50, {"model": "tiny"}),
        ("tiny2", 45, {"model": "tiny"}),
    ):
        synthetic.save(tmp_path, "latency", frame, name, updated=updated, **fields)
    assert chosen(tmp_path) == "new"
    assert chosen(tmp_path, device="xeon") == "cpu"
    assert chosen(tmp_path, model="tiny") == "tiny1"
    with pytest.raises(MissingRun, match="of model 'tiny' on a device named 'xeon'"):
        chosen(tmp_path, model="tiny", device="xeon")


def test_model_option_draws_that_model(root, capsys):
    synthetic.save(root, "memory", synthetic.memory([4] * 4), "tttttttttttt", model="tiny", heads_kept=[4] * 4)
    assert run_main(root, "fig11", "--model", "tiny") == 0
    assert "tttttttttttt" in capsys.readouterr().out
    assert set(pd.read_csv(root / "figures" / "fig11.csv").run.dropna()) == {"tttttttttttt"}
    assert run_main(root, "fig11", "--device", "h200") == 0
    assert "aaaaaaaaaaaa" in capsys.readouterr().out


def test_runs_without_a_method_or_the_phase_are_passed_over(root):
    table = synthetic.latency()
    synthetic.save(root, "latency", table[table.phase == "decode"], "decode", updated=1_900_000_000)
    synthetic.save(root, "latency", table[table.baseline], "mha", updated=1_900_000_001)
    memory = synthetic.memory()
    synthetic.save(root, "memory", memory[memory.method == "mha"], "mha", method="mha", updated=1_900_000_000)
    for module, expected in ((fig11, "aaaaaaaaaaaa"), (fig12a, "bbbbbbbbbbbb"), (fig12b, "decode")):
        results = Results(root)
        module.draw(results)
        assert [run.folder.name for run in results.used] == [expected]


def test_nothing_but_results_is_read():
    """The analysis works where neither the library nor its dependencies are installed."""
    code = (
        "import sys; from analysis.figures.__main__ import main; assert main(['--list']) == 0; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'chai', 'torch', 'experiments', 'analysis'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['analysis']"
