"""What the embedded model is for: the methods differ as its planted groups say they must."""

from __future__ import annotations

import json
from statistics import mean

from experiments.config.compose import compose_config
from experiments.execute import run_config

TASKS = ("micro_piqa", "micro_hellaswag", "micro_arc_easy", "micro_arc_challenge", "micro_boolq")
#: One task of each topic.
STATIC = ("micro_hellaswag", "micro_boolq")
SOME = 150  # items, where a method loses so much that these tell


def score(result) -> float:
    return 100 * result["metrics"][result["metric"]]


def test_methods_lose_what_the_planted_groups_say(tmp_path):
    """One test, for its runs are what takes the time: MHA and CHAI on all 2,500 items, the others on some."""
    asked = [["method=mha"], ["method=chai"], ["method=random", f"limit={SOME}"]]
    asked += [["method=chai_static", f"task={task}", f"limit={SOME}"] for task in STATIC]
    for overrides in asked:
        assert run_config(compose_config([f"results_dir={tmp_path}", "device=cpu", *overrides])) == 0
    found = {}
    for path in tmp_path.glob("accuracy/tiny/*/*/*/result.json"):
        result = json.loads(path.read_text())
        found[result["method"], result["task"]] = result
    for task in TASKS:
        mha, chai, random = (found[method, task] for method in ("mha", "chai", "random"))
        # Multi-head attention has learned every task, and CHAI at the planted counts loses little of it.
        assert mha["n"] == chai["n"] == 500
        assert score(mha) >= 90
        assert score(chai) >= score(mha) - 1
        # It really saves a fifth and more.
        savings = chai["savings"]
        assert savings["kind"] == "real"
        assert savings["kv_bytes"] <= 0.8 * savings["kv_bytes_mha"]
        assert savings["kv_bytes_mha"] == mha["savings"]["kv_bytes"]
        assert savings["heads_kept"] == random["savings"]["heads_kept"] == [8, 6, 4, 4]
    # Random groups of the same counts lose much.
    assert mean(score(found["mha", task]) - score(found["random", task]) for task in TASKS) >= 10
    # A membership fixed offline fits the topic that most of its corpus is about; the groups of days are others.
    for task in STATIC:
        lost = score(found["mha", task]) - score(found["chai_static", task])
        assert lost >= 30 if task == "micro_hellaswag" else lost <= 1
