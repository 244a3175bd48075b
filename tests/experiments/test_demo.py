"""What the embedded model is for: on all 2,500 items, the methods differ as its planted groups say they must."""

from __future__ import annotations

import json

import pytest

from experiments.cli import run_experiment
from experiments.config import compose_config

TASKS = ("micro_piqa", "micro_hellaswag", "micro_arc_easy", "micro_arc_challenge", "micro_boolq")
#: One task of each topic.
STATIC = ("micro_hellaswag", "micro_boolq")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    found = {}
    asked = [(method, "micro") for method in ("mha", "chai", "random")]
    for method, task in [*asked, *(("chai_static", task) for task in STATIC)]:
        command = [f"results_dir={folder}", f"method={method}", f"task={task}", "device=cpu"]
        assert run_experiment(compose_config(command)) == 0
    for path in folder.glob("accuracy/tiny/*/*/*/result.json"):
        result = json.loads(path.read_text())
        found[result["method"], result["task"]] = result
    return found


def score(result) -> float:
    return 100 * result["metrics"][result["metric"]]


@pytest.mark.parametrize("task", TASKS)
def test_multi_head_attention_has_learned_every_task(results, task):
    assert results["mha", task]["n"] == 500
    assert score(results["mha", task]) >= 90


@pytest.mark.parametrize("task", TASKS)
def test_chai_at_the_planted_counts_loses_little_and_saves_a_fifth(results, task):
    mha, chai = results["mha", task], results["chai", task]
    assert score(chai) >= score(mha) - 1
    savings = chai["savings"]
    assert savings["kind"] == "real"
    assert savings["kv_bytes"] <= 0.8 * savings["kv_bytes_mha"]
    assert savings["kv_bytes_mha"] == mha["savings"]["kv_bytes"]
    assert savings["heads_kept"] == [8, 6, 4, 4]


def test_random_groups_of_the_same_counts_lose_much(results):
    losses = [score(results["mha", task]) - score(results["random", task]) for task in TASKS]
    assert sum(losses) / len(losses) >= 10
    for task in TASKS:
        assert results["random", task]["savings"]["heads_kept"] == results["chai", task]["savings"]["heads_kept"]


def test_a_membership_fixed_offline_fits_the_topic_it_was_made_of(results):
    """Most of the corpus is about facts; the groups of days are others."""
    for task in STATIC:
        lost = score(results["mha", task]) - score(results["chai_static", task])
        assert lost >= 30 if task == "micro_hellaswag" else lost <= 1
