"""The worked examples, as a reader would follow them: each named block is written to its file in a copy of the project,
and each command is run there, at a small size; so are those of all pages but the ones about the tables.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pandas as pd
import pytest

from tests.docs.pages import PAGES, TABLES, blocks
from tests.docs.walk import walk

EXAMPLES = [page for page in PAGES if page not in TABLES]
WRITTEN = {
    "chai/methods/neighbours.py", "conf/method/neighbours.yaml", "chai/methods/sinks.py", "conf/method/sinks.yaml",
    "conf/model/pythia_160m.yaml",
    "conf/task/openbookqa.yaml", "data/openbookqa_test.jsonl", "conf/task/own.yaml",
}  # fmt: skip
CODE = """
import torch
from chai.methods import Neighbours
found = Neighbours(clusters=3).cluster_heads([0], [3], *[torch.empty(1, 2, 8, 0, 1)] * 2, 1.0)[0]
found.check()
print(found.assignment[0].tolist(), found.representatives[0].tolist())
"""


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_compiled_kmeans")
def test_the_examples_and_the_commands_beside_them_work(tmp_path, record_property):
    """One test, for all commands are run in one process."""
    assert {block.path for page in EXAMPLES for block in blocks(page) if block.path is not None} == WRITTEN
    done = walk(EXAMPLES, tmp_path, [shlex.join(["python", "-c", CODE])])
    for name, value in done.properties():
        record_property(name, value)
    assert not done.failed, "\n\n".join(done.failed)
    assert len(done.outcomes) > 20
    assert done.more[0].output.strip() == "[0, 0, 0, 1, 1, 1, 2, 2] [0, 3, 6]"
    for check in (check_method, check_own_cache, check_model, check_task):
        check(done.project)


def results(project, pattern):
    """Return the content of each ``result.json`` below ``results/<pattern>``."""
    return [json.loads(path.read_text()) for path in sorted(project.glob(f"results/{pattern}/*/result.json"))]


def check_method(project):
    """The method runs beside the others, and its clusters are blocks of adjacent heads."""
    found = results(project, "accuracy/tiny/neighbours/*")
    assert sorted(result["savings"]["heads_kept"] for result in found) == [[2] * 4, [8, 6, 4, 4]]
    assert all(result["savings"]["kind"] == "real" for result in found)
    assert all(result["savings"]["kv_bytes"] < result["savings"]["kv_bytes_mha"] for result in found)


def check_own_cache(project):
    """One file and one YAML: accuracy, memory, latency, and figures that show it beside the others."""
    (accuracy,) = results(project, "accuracy/tiny/sinks/micro_piqa")
    savings = accuracy["savings"]
    assert savings["kind"] == "real" and savings["kv_bytes"] < savings["kv_bytes_mha"]
    (memory,) = results(project, "memory/tiny/sinks/none")
    assert memory["metrics"]["kv_saved"] == pytest.approx(1 - 12 / 64)
    (folder,) = project.glob("results/memory/tiny/sinks/none/*")
    rows = pd.read_parquet(folder / "measurements.parquet")
    assert (rows.cache_bytes == rows.formula_bytes).all()
    (latency,) = results(project, "latency/tiny/sinks/none")
    assert {"model_prefill", "model_decode"} <= latency["metrics"].keys()
    command = [sys.executable, "-m", "analysis.figures", "fig1", "fig11", "--model", "tiny", "--out", "figures"]
    drawn = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert {path.name for path in (project / "figures").glob("*.png")} >= {"fig1.png", "fig11.png"}


def check_model(project):
    """The benchmark of the model, with the documented two layers."""
    (result,) = results(project, "memory/pythia_160m-random/chai/none")
    assert result["metrics"]["kv_saved"] == pytest.approx((1 - 4 / 12) / 2)


def check_task(project):
    """The task is scored on the data of the page, by both methods."""
    found = {result["method"]: result for result in results(project, "accuracy/tiny/*/openbookqa")}
    assert {"mha", "chai"} <= found.keys()
    assert found["chai"]["n"] == 2 and found["chai"]["metric"] == "acc_norm"
