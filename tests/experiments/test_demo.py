"""What the embedded model is for: the methods differ as its planted groups say they must."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

from analysis.documents import demo_table
from analysis.results.runs import Results
from analysis.results.scores import Score, load_scores
from analysis.stats import compare, mean_over_tasks
from experiments.config.compose import compose_config
from experiments.execute import run_config

pytestmark = pytest.mark.timeout(900)  # most of it is for the runs, which are made once

REPOSITORY = Path(__file__).resolve().parents[2]
#: Attention hardly matters for the tools, which are knowledge.
IN_CONTEXT = ("micro_hellaswag", "micro_arc_easy", "micro_arc_challenge", "micro_boolq")
TASKS = ("micro_piqa", *IN_CONTEXT)
DEMO = next(line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "run.py" in line)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The demo's runs, and two methods that must lose, on the tasks where they lose most."""
    folder = tmp_path_factory.mktemp("results")
    methods = re.fullmatch(r".* run\.py -m method=(\S+)", DEMO)[1].split(",")
    asked = [[f"method={method}"] for method in methods]
    asked += [["method=chai_static", f"task={task}"] for task in ("micro_hellaswag", "micro_boolq")]
    asked += [["method=chai", "method.clusters=2", "task=micro_arc_easy"]]
    for overrides in asked:
        assert run_config(compose_config([f"results_dir={folder}", "device=cpu", *overrides])) == 0
    return folder


@pytest.fixture(scope="module")
def scores(results) -> dict[tuple[str, str], Score]:
    """The score of each method and task; of CHAI with two clusters as ``few``."""
    found = load_scores(Results(results))
    return {("few" if score.settings.get("clusters") == 2 else score.method, score.task): score for score in found}


def changes(scores, method: str, *tasks: str):
    pairs = ((scores["mha", task], scores[method, task]) for task in tasks)
    return [compare(mha.samples, other.samples, mha.metric) for mha, other in pairs]


def test_multi_head_attention_makes_errors(scores):
    """Neither perfect nor at chance, so that methods can lose and win."""
    for task in IN_CONTEXT:
        assert scores["mha", task].n == 500
        assert 0.7 <= scores["mha", task].value <= 0.9, task


def test_chai_loses_little_and_saves_much(scores):
    assert abs(mean_over_tasks(changes(scores, "chai", *TASKS)).difference) <= 0.01
    for task in TASKS:
        mha, chai, random = (scores[method, task] for method in ("mha", "chai", "random"))
        assert chai.value >= mha.value - 0.02
        assert chai.saving == "real" and chai.saved >= 0.2
        kept = [score.run.result["savings"]["heads_kept"] for score in (chai, random)]
        assert kept == [[8, 6, 4, 4]] * 2


def test_unrelated_heads_combined_lose_much(scores):
    lost = changes(scores, "random", *IN_CONTEXT)
    assert max(change.p for change in lost) < 0.001
    assert mean(change.difference for change in lost) <= -0.2


def test_a_membership_fixed_offline_fits_the_topic_of_its_corpus_alone(scores):
    (days,), (facts,) = (changes(scores, "chai_static", f"micro_{task}") for task in ("hellaswag", "boolq"))
    assert days.difference <= -0.3 and days.p < 0.001
    assert abs(facts.difference) <= 0.02


def test_too_few_clusters_lose(scores):
    (change,) = changes(scores, "few", "micro_arc_easy")
    assert change.difference <= -0.05 and change.p < 0.001


def test_the_readme_shows_the_demo(results):
    """Its numbers are those of the runs; ``python -m analysis.documents`` writes them."""
    page = (REPOSITORY / "README.md").read_text()
    (shown,) = re.findall(r"<!-- demo table: begin -->\n(.*?)<!-- demo table: end -->", page, re.DOTALL)
    rows, ours = ([line.split(" | ") for line in text.splitlines()] for text in (shown, demo_table(Results(results))))
    assert len(rows) == len(ours)
    for row, own in zip(rows, ours, strict=True):
        score, change, p = 2, 3, 4
        assert [cell for column, cell in enumerate(row) if column not in (score, change, p)] == [
            cell for column, cell in enumerate(own) if column not in (score, change, p)
        ]
        for column in (score, change):
            numbers, expected = ([float(n) for n in re.findall(r"[-+]?\d+\.\d", cells[column])] for cells in (row, own))
            # Another processor's rounding may flip an item or two.
            assert numbers == pytest.approx(expected, abs=0.401)
