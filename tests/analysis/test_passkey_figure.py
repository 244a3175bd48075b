"""The heat map of passkey tasks: its cells are the means of the saved items, and its runs are comparable ones."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.figures import passkey
from analysis.figures.__main__ import main
from analysis.results.runs import MissingRun, Results

LENGTHS, DEPTHS = (512, 1024), (0.0, 0.5, 1.0)
#: Items found of 4, by length and depth.
MHA = {(512, 0.0): 4, (512, 0.5): 4, (512, 1.0): 3, (1024, 0.0): 2, (1024, 0.5): 1, (1024, 1.0): 4}
CHAI = {**MHA, (512, 0.5): 0, (1024, 0.0): 0}


def save(
    root, method, found, *, task="passkey", settings="s", heads=9, saved=0.0, n=4, key="digits", model="small", **own
):
    """Save a finished run: ``found[length, depth]`` of the ``n`` items of each cell are right; rows are shuffled."""
    rows = [
        {"length": length, "depth": depth, "exact_match": float(item < found[length, depth])}
        for item in range(n)
        for length, depth in found
    ]
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
    folder = root / "accuracy" / model / method / task / f"{settings}{heads}{method}{own.get('tokens', '')}"
    folder.mkdir(parents=True)
    frame.to_parquet(folder / "samples.parquet")
    result = {
        "experiment": "accuracy", "method": method, "model": model, "task": task, "metric": "exact_match",
        "metrics": {"exact_match": frame.exact_match.mean()}, "stderr": {}, "n": len(frame),
        "savings": {"kind": "real", "kv_bytes": 1000 * (1 - saved), "kv_bytes_mha": 1000, "heads_kept": [heads] * 3},
        "settings_id": settings, "run_id": folder.name, "device": "cpu", "dtype": "float32",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    task_section = {"name": task, "key": key, "lengths": list(LENGTHS)}
    config = {"method": {"name": method, "clusters": heads, **own}, "model": {"name": model}, "task": task_section}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "status.json").write_text(json.dumps({"state": "done", "updated": 1_790_000_000}))
    return folder


def texts(axes):
    """What each cell says, by row and column."""
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}


def panels(figure):
    """Panels by their titles without the last line, what is found and saved."""
    return {axes.get_title().rpartition("\n")[0]: axes for axes in figure.axes if axes.get_title()}


def test_cells_are_the_means_of_the_items(tmp_path):
    save(tmp_path, "chai", CHAI, heads=7, saved=0.25)
    save(tmp_path, "mha", MHA)
    figure, data = passkey.draw(Results(tmp_path))
    drawn = panels(figure)
    assert list(drawn) == ["MHA", "CHAI\nk = 7 in all 3 layers"]  # multi-head attention first
    for axes, found in zip(drawn.values(), (MHA, CHAI), strict=True):
        cells = {
            (DEPTHS.index(depth), LENGTHS.index(length)): count / 4 * 100 for (length, depth), count in found.items()
        }
        assert texts(axes) == {place: f"{value:.0f}" for place, value in cells.items()}
        (image,) = axes.images
        assert dict(np.ndenumerate(image.get_array())) == cells
        assert (image.norm.vmin, image.norm.vmax) == (0, 100)  # the same colours in every panel
    labels = [label.get_text() for label in drawn["MHA"].get_xticklabels()]
    assert labels == ["512\n92 %", "1,024\n58 %"]
    assert "50 % found, 25.0 % of KV saved" in drawn["CHAI\nk = 7 in all 3 layers"].get_title()
    assert [label.get_text() for label in drawn["MHA"].get_yticklabels()] == ["0", "0.5", "1"]
    footer = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "n = 4 a cell" in footer and "up to 25 points" in footer
    saved = data[data.method == "chai"].set_index(["length", "depth"])
    assert {place: round(4 * saved.score[place]) for place in CHAI} == CHAI and set(saved.n) == {4}


def test_only_runs_that_differ_in_the_method_are_beside_each_other(tmp_path):
    save(tmp_path, "mha", MHA)
    save(tmp_path, "chai", CHAI, heads=8)
    save(tmp_path, "chai", CHAI, heads=7)
    save(tmp_path, "mha", MHA, settings="other")
    save(tmp_path, "mha", MHA, task="needle", key="sentence")
    save(tmp_path, "mha", MHA, task="gsm8k", key=None)
    save(tmp_path, "mha", MHA, model="another")
    results = Results(tmp_path)
    figure, data = passkey.draw(results)
    clustered = [f"passkey: CHAI\nk = {heads} in all 3 layers" for heads in (8, 7)]
    assert list(panels(figure)) == ["needle: MHA", "passkey: MHA", *clustered]
    assert len(results.used) == 4 and not results.skipped and len(data) == 4 * len(MHA)


def test_runs_of_a_method_are_told_apart_by_what_differs(tmp_path):
    for tokens in (5, 64):
        save(tmp_path, "chai", CHAI, heads=7, tokens=tokens, membership="kmeans")
    figure, _ = passkey.draw(Results(tmp_path))
    assert list(panels(figure)) == [f"CHAI, tokens={tokens}\nk = 7 in all 3 layers" for tokens in (5, 64)]


def test_titles_of_panels_beside_each_other_do_not_meet(tmp_path):
    for tokens in (5, 64, 128):
        settings = {"tokens": tokens, "profile": f"results/profile/small/none/c4/{tokens}"}
        save(tmp_path, "chai", CHAI, task="passkey_long", heads=7, **settings)
    save(tmp_path, "mha", MHA)
    figure, _ = passkey.draw(Results(tmp_path))
    figure.draw_without_rendering()
    titles = sorted(
        (axes.title.get_window_extent() for axes in panels(figure).values()), key=lambda box: (-box.y0, box.x0)
    )
    for left, right in zip(titles, titles[1:], strict=False):
        assert left.x1 < right.x0 or right.x0 < left.x0


def test_a_cell_without_items_is_empty(tmp_path):
    part = {place: count for place, count in MHA.items() if place != (1024, 0.5)}
    save(tmp_path, "mha", part)
    figure, _ = passkey.draw(Results(tmp_path))
    (axes,) = panels(figure).values()
    assert (1, 1) not in texts(axes) and len(texts(axes)) == 5


def test_items_that_do_not_match_the_score_are_left_out(tmp_path):
    folder = save(tmp_path, "mha", MHA)
    save(tmp_path, "chai", CHAI)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "metrics": {"exact_match": 0.9}}))
    results = Results(tmp_path)
    figure, _ = passkey.draw(results)
    assert len(panels(figure)) == 1
    assert results.skipped == {folder: "samples.parquet does not match the score in result.json"}


def test_files_are_written_and_a_missing_run_is_one_line(tmp_path, capsys):
    save(tmp_path, "mha", MHA, task="gsm8k", key=None)
    arguments = ["passkey", "--results", str(tmp_path), "--out", str(tmp_path / "figures")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "no finished run of a passkey task" in error and "method=mha,chai task=passkey" in error
    save(tmp_path, "mha", MHA)
    assert main(arguments) == 0
    assert len(pd.read_csv(tmp_path / "figures" / "passkey.csv")) == len(MHA)
    with pytest.raises(MissingRun, match="no finished accuracy run"):
        passkey.draw(Results(tmp_path / "nowhere"))
