"""``make real`` on a small model: its runs, what it repeats and refuses, and the table of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from analysis import documents
from analysis.results.runs import MissingRun, Results
from analysis.tables.__main__ import main as show
from analysis.tables.real import real_table
from experiments import real
from experiments.config.schema import REPOSITORY
from experiments.tables.perplexity import paired_change

METHODS = ["mha", "chai", "chai_static", "random"]


@pytest.fixture
def small(workplace, tmp_path, monkeypatch):
    """Arguments for runs on a small model, with few tokens, in an empty results folder."""
    monkeypatch.setattr(real, "TASKS", ("micro_piqa", "micro_boolq"))
    monkeypatch.setattr(
        real, "PROFILE",
        (*real.PROFILE, "profile.samples=3", "profile.tokens=24", "profile.history=6", "profile.tolerance=0.3"),
    )  # fmt: skip
    monkeypatch.setattr(
        real,
        "PERPLEXITY",
        (*real.PERPLEXITY, "experiment.window=16", "experiment.tokens=60", "experiment.document_tokens=20"),
    )
    return [f"model.path={workplace / 'small'}", "device=cpu", f"results_dir={tmp_path / 'results'}"]


def test_every_method_on_every_corpus_and_a_table(small, workplace, tmp_path, capsys):
    results = tmp_path / "results"
    data = ["--data", str(workplace / "data"), "--limit", "6"]
    assert real.main([*small, *data]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("[1/17] head profile of small on python_packages\n") and "[17/17] random on micro_boolq" in out
    )
    record = json.loads((results / "real.json").read_text())
    assert len(record["runs"]) == 17 and all((results / name / "result.json").is_file() for name in record["runs"])
    found = {
        (path.parts[-4], path.parts[-3]): json.loads(path.read_text())
        for path in results.glob("perplexity/small/*/*/*/result.json")
    }
    assert set(found) == {(method, corpus) for method in METHODS for corpus in ("python_docs", "python_code")}
    counts = [found[method, "python_docs"]["savings"]["heads_kept"] for method in METHODS[1:]]
    assert counts[0] == counts[1] == counts[2] and sum(counts[0]) < 8
    assert len({result["settings_id"] for (_, corpus), result in found.items() if corpus == "python_docs"}) == 1

    # The table has the numbers of the runs.
    assert show(["real", "--results", str(results)]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
             if line.startswith("|")]  # fmt: skip
    head, rows = lines[0], {line[0]: line for line in lines[2:]}
    assert list(rows) == METHODS and head[-2:] == ["PIQA", "BoolQ"]
    frames = {
        method: pd.read_parquet(next(results.glob(f"perplexity/small/{method}/python_code/*/samples.parquet")))
        for method in ("mha", "random")
    }
    mean, low, high = paired_change(frames["mha"], frames["random"])
    place = head.index("python_code")
    metrics = found["random", "python_code"]["metrics"]
    assert rows["random"][place : place + 3] == [
        f"{metrics['perplexity']:.2f}", f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", f"{metrics['bits_per_byte']:.3f}",
    ]  # fmt: skip
    assert rows["chai"][head.index("Heads")] == f"{sum(counts[0]) / len(counts[0]):.1f}"
    assert rows["mha"][head.index("KV saved")] == "0.0 %" and rows["chai"][head.index("KV saved")] != "0.0 %"
    score = json.loads(next(results.glob("accuracy/small/mha/micro_piqa/*/result.json")).read_text())
    assert rows["mha"][-2] == f"{100 * score['metrics'][score['metric']]:.1f}"

    # Again: nothing is run; without data its tasks leave the table.
    assert real.main([*small]) == 0
    assert capsys.readouterr().out == ""
    assert "PIQA" not in documents.BLOCKS["real table"](Results(results))


def test_an_interrupted_sequence_goes_on_with_what_is_left(small, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    done = real.run_config
    monkeypatch.setattr(real, "run_config", lambda config: 1 if config.method.name == "random" else done(config))
    assert real.main(small) == 1
    assert not (results / "real.json").exists()  # no table of a part
    assert show(["real", "--results", str(results)]) == 1
    assert "no real.json in" in capsys.readouterr().err
    monkeypatch.setattr(real, "run_config", done)
    assert real.main(small) == 0
    assert re.findall(r"^\[(\d+)/9\]", capsys.readouterr().out, re.M) == ["5", "9"]
    shutil.rmtree(next(results.glob("perplexity/small/random/*/*")))
    with pytest.raises(MissingRun, match="a run that .* lists is missing; make it with: make real"):
        real_table(Results(results))


def test_what_cannot_be_run_is_refused_in_one_line(small, workplace, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(workplace / "data" / "micro_piqa.jsonl", tmp_path)
    assert real.main([*small, "--data", str(empty)]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"error: {empty} has no data of a task; valid: a folder with piqa_validation.jsonl ..., or hub\n"
    )
    assert f"left out: micro_piqa, for there is no {empty}/micro_piqa.jsonl" in captured.out
    assert real.main(["nosuch=1"]) == 2
    assert "unknown key 'nosuch'" in capsys.readouterr().err
    assert [run[0] for run in real.task_runs(str(tmp_path), 5)] == ["task=micro_piqa"] * 4
    assert show(["real", "--format", "tex", "--results", str(tmp_path)]) == 2
    assert "real has no other format than md" in capsys.readouterr().err


def test_the_demo_ends_with_what_comes_next():
    """The target that its last line names is there, and runs the methods and the table."""

    def recipe(target):
        command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", "-o", ".venv/.real", target]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.splitlines()

    last = recipe("demo")[-1]
    assert re.match(r'echo "Next: make real - ', last)
    assert recipe("real") == [
        '.venv/bin/python -m experiments.real --data "" --limit 100',
        ".venv/bin/python -m analysis.tables real",
    ]
