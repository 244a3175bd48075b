"""The tables of docs/ablations.md: from saved measurements, and against them."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.ablations.__main__ import PAGE, PUBLISHED, main
from analysis.ablations.answers import mean_interval, rank_correlation
from analysis.ablations.blocks import BLOCKS

MODEL = "smollm2_135m"
TEXT = "Before.\n\n<!-- ablations:warmup -->\nold\n<!-- end -->\n\nAfter.\n"
KL = {"5 tokens": [0.4, 0.6, 0.8], "32 tokens": [0.2, 0.3, 0.1]}


def save(root, run_id="one", rows=None, updated=1.0, **fields):
    """A finished run with rows ``(question, choice, corpus, text, measure, value)``."""
    folder = root / "ablations" / MODEL / "none" / "c4" / run_id
    folder.mkdir(parents=True)
    frame = pd.DataFrame(rows, columns=["question", "choice", "corpus", "text", "measure", "value"])
    result = {
        "model": MODEL, "method": "none", "run_id": run_id, "questions": sorted(set(frame.question)), "n": 3,
        "tokens": 512, "sample_tokens": 64, "first_scored": 128, "task": "c4",
        "clusters": 6, "heads": 9, "corpus": "texts.jsonl", "dtype": "float32",
        "further": {"code": "Python, code"}, "properties": {"entropy": "entropy of the attention"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result | fields))
    (folder / "status.json").write_text(json.dumps({"state": "done", "updated": updated}))
    frame.to_parquet(folder / "samples.parquet")
    return root


def warmup_rows(scale=1.0):
    return [
        ("warmup", choice, "c4", text, measure, value)
        for choice, values in KL.items()
        for text, kl in enumerate(values)
        for measure, value in (("kl", scale * kl), ("loss", scale * kl / 2), ("heads", 6.0))
    ]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(TEXT)
    return path


def test_a_table_is_written_and_a_stale_page_is_reported(tmp_path, page, capsys):
    results = save(tmp_path / "results", rows=warmup_rows())
    command = [str(page), "--results", str(results)]
    assert main([*command, "--check"]) == 1
    assert page.read_text() == TEXT and "numbers differ from" in capsys.readouterr().err
    assert main(command) == 0
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- ablations:warmup -->\n| Choice") and "old" not in text
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    settings = "questions='[warmup]' experiment.texts=3 experiment.tokens=512 experiment.sample_tokens=64"
    assert f"Settings: `corpus=c4 experiment.{settings}`." in text
    assert main([*command, "--check"]) == 0
    page.write_text(text.replace("0.600", "0.500", 1))
    assert main([*command, "--check"]) == 1
    assert main(command) == 0 and page.read_text() == text


def test_the_numbers_are_means_with_student_intervals_and_paired_differences(tmp_path, page):
    results = save(tmp_path / "results", rows=warmup_rows())
    main([str(page), "--results", str(results)])
    lines = {line.split(" | ")[0]: line.split(" | ") for line in page.read_text().splitlines()}
    base, other = lines["| 5 tokens (base)"], lines["| 32 tokens"]
    low, high = stats.t.interval(0.95, 2, 0.6, stats.sem(KL["5 tokens"]))
    assert base[1:3] == ["6.0", f"0.600 [{low:.3f}, {high:.3f}]"] and base[4] == "3"
    assert base[3].startswith(f"{math.exp(0.3):.2f} [")
    differences = np.subtract(KL["32 tokens"], KL["5 tokens"])
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert other[5] == f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}] |"


def test_the_run_with_the_most_texts_answers_then_the_newest(tmp_path, page):
    results = tmp_path / "results"
    save(results, "few", warmup_rows(9), updated=9.0, n=2)
    save(results, "old", warmup_rows(7), updated=1.0)
    save(results, "new", warmup_rows(1), updated=2.0)
    main([str(page), "--results", str(results)])
    assert "0.600 [" in page.read_text()


def test_each_kind_of_table(tmp_path, capsys):
    generator = np.random.default_rng(0)
    rows = []
    for text in range(5):
        for k, kl in ((4, 0.8), (6, 0.4)):
            name = f"k = {k} everywhere"
            rows += [("counts", name, "c4", text, "kl", kl), ("counts", name, "c4", text, "loss", 0.1)]
            rows += [("counts", name, "c4", text, "heads", float(k))]
        for name, kl, heads in (("by request: gap", 0.7, 5.0), ("by request: silhouette", 0.7, 2.0)):
            rows += [("counts", name, "c4", text, measure, value)
                     for measure, value in (("kl", kl), ("loss", 0.1), ("heads", heads))]  # fmt: skip
        for name, value in (("kl", 0.5), ("kl 128-256", 0.25), ("kl 256-512", 0.75), ("heads", 6.0)):
            rows += [("length", choice, "c4", text, name, value) for choice in ("first 5 tokens", "again")]
        rows.append(("stability", "two requests", "c4", text, "agreement", 0.5))
        for corpus, shift in (("c4", 0), ("code", 10)):
            kl = shift + generator.random()
            rows += [("inputs", "CHAI", corpus, text, "kl", kl),
                     ("inputs", "properties", corpus, text, "entropy", -kl)]  # fmt: skip
    save(tmp_path, rows=rows, n=5)
    assert main(["--print", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| by request: gap | 5.0 | 0.700 [0.700, 0.700] | 1.11 [1.11, 1.11] | 5 | +0.100 [+0.100, +0.100] |" in said
    assert "| by request: silhouette | 2.0 | 0.700 [0.700, 0.700] | 1.11 [1.11, 1.11] | 5 | no such k |" in said
    assert "| KL from MHA, positions: | all | 128-256 | 256-512 | n | Against the base |" in said
    ranges = "0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] | 0.750 [0.750, 0.750]"
    assert f"| first 5 tokens (base) | {ranges} | 5 |  |" in said
    assert f"| again | {ranges} | 5 | +0.000 [+0.000, +0.000] |" in said
    assert "| two requests | 0.500 [0.500, 0.500] | 5 |" in said
    assert "| entropy of the attention | -1.00 [-1.00, -1.00] | -1.00 [-1.00, -1.00] | 10 |" in said
    assert "The worst quarter of the texts: 2 of code." in said


def test_batch_sizes_come_from_latency_runs(tmp_path, capsys):
    save(tmp_path, rows=warmup_rows())
    for size in (1, 4):
        folder = tmp_path / "latency" / "llama7b-random" / "chai" / "none" / str(size)
        folder.mkdir(parents=True)
        common = {"part": "layer", "phase": "decode", "length": 1024, "rounds": 9, "best_baseline": "sdpa"}
        rows = [
            {**common, "k": None, "implementation": "sdpa", "baseline": True, "role": "baseline", "ms": 10.0 * size},
            {**common, "k": 8, "implementation": "chai", "baseline": False, "role": "method", "ms": 8.0 * size,
             "ms_p25": 7.0, "ms_p75": 9.0, "speedup": 1.25, "speedup_p25": 1.2, "speedup_p75": 1.3, "limit": 1.4},
        ]  # fmt: skip
        pd.DataFrame(rows).to_parquet(folder / "measurements.parquet")
        result = {"model": "llama7b-random", "method": "chai", "run_id": str(size), "heads_kept": [8], "heads": 32,
                  "dtype": "float32", "batch_size": size, "versions": {}, "layers": 1, "device": "cpu"}  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "status.json").write_text(json.dumps({"state": "done", "updated": 1.0}))
    assert main(["--print", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| 1 | 10.0 | 8.0 | 1.25 [1.20, 1.30] | 1.40 | 9 |" in said
    assert "| 4 | 40.0 | 32.0 | 1.25 [1.20, 1.30] | 1.40 | 9 |" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("ablations:warmup", "ablations:warmpu"), "unknown table 'warmpu' (did you mean 'warmup'?)"),
        (TEXT.replace("<!-- end -->", ""), "a table has no end"),
        (TEXT.replace("ablations:warmup", "ablations:values"), "has the question 'values'; make one with: python run"),
        (TEXT.replace("ablations:warmup", "ablations:batch"), "no two batch sizes among the latency runs"),
    ],
)
def test_mistakes_of_a_page_are_one_line(text, message, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    results = save(tmp_path / "results", rows=warmup_rows())
    assert main([str(page), "--results", str(results)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and page.read_text() == text


def test_other_mistakes(tmp_path, capsys):
    assert main(["--results", str(tmp_path / "none")]) == 2
    assert main([str(tmp_path / "none.md"), "--results", str(tmp_path)]) == 2
    assert main(["--print", "--results", str(tmp_path)]) == 1
    assert "no results of experiment=ablations" in capsys.readouterr().err


def test_a_single_text_has_no_interval():
    assert mean_interval([0.5]).value == 0.5 and math.isnan(mean_interval([0.5]).low)


def test_rank_correlation_is_spearmans_with_an_interval_that_covers_it():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        pairs = generator.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 40)
        found = rank_correlation(pairs[:, 0], pairs[:, 1])
        assert found.value == pytest.approx(stats.spearmanr(pairs).statistic)
        covered += found.low <= 6 / math.pi * math.asin(0.25) <= found.high
    assert 180 <= covered <= 200
    assert math.isnan(rank_correlation(np.ones(9), np.arange(9.0)).value)


def test_the_published_page_is_up_to_date():
    """The page of the repository has every table, and its published results still make it."""
    assert main(["--check"]) == 0
    assert all(f"<!-- ablations:{name} -->" in PAGE.read_text() for name in BLOCKS)
    assert sum(path.stat().st_size for path in PUBLISHED.rglob("*") if path.is_file()) < 200_000
