"""The worked examples, as a reader would follow them: each named block is written to its file in a copy of the project,
each ``python run.py`` line composes there, and those in blocks of bash are run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from tests.docs.pages import PAGES, REPOSITORY, blocks, commands

EXAMPLES = [page for page in PAGES if page.name.startswith("adding_")]
#: One process for all, for most of its time goes into imports.
CODE = """
import json, sys
from experiments.cli import main
from experiments.config.validate import check_overrides
from experiments.sweeps.expand import expand
composed, run = json.load(sys.stdin)
for command in composed:
    sweeps = expand([word for word in command if word != "-m"], multirun="-m" in command)
    check_overrides(sweeps[0], multirun="-m" in command)
for command in run:
    code = main(command)
    if code:
        sys.exit(f"{command}: exit code {code}")
from chai.methods import Neighbours
found = Neighbours(clusters=3).cluster_heads([0], [3], *[__import__("torch").empty(1, 2, 8, 0, 1)] * 2, 1.0)[0]
found.check()
print(found.assignment[0].tolist(), found.representatives[0].tolist())
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with the examples' files in it, and what running their commands left."""
    project = tmp_path_factory.mktemp("project")
    for name in ("chai", "conf", "experiments", "analysis", "results/paper"):
        shutil.copytree(REPOSITORY / name, project / name)  # with __pycache__, where the compiled K-means is
    written = [block for page in EXAMPLES for block in blocks(page) if block.path is not None]
    for block in written:
        path = project / block.path
        assert not path.exists(), f"{block.path} is there already: choose another example"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    asked = [command for page in EXAMPLES for command in commands(page)]
    run = [[*command, "device=cpu"] for page in EXAMPLES for command in commands(page, "bash")]
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=project, input=json.dumps([asked, run]), capture_output=True, text=True, timeout=230,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return project, {block.path for block in written}, done.stdout


def test_the_pages_write_what_they_promise(copy):
    _, written, _ = copy
    assert written == {
        "chai/methods/neighbours.py", "conf/method/neighbours.yaml", "chai/methods/sinks.py", "conf/method/sinks.yaml",
        "conf/model/pythia_160m.yaml",
        "conf/task/openbookqa.yaml", "data/openbookqa_test.jsonl", "conf/task/own.yaml",
    }  # fmt: skip


def test_the_method_runs_beside_the_others(copy):
    project, _, said = copy
    results = [
        json.loads(path.read_text()) for path in project.glob("results/accuracy/tiny/neighbours/*/*/result.json")
    ]
    assert sorted(result["savings"]["heads_kept"] for result in results) == [[2] * 4, [8, 6, 4, 4]]
    assert all(result["savings"]["kind"] == "real" for result in results)
    assert all(result["savings"]["kv_bytes"] < result["savings"]["kv_bytes_mha"] for result in results)
    assert said.strip().splitlines()[-1] == "[0, 0, 0, 1, 1, 1, 2, 2] [0, 3, 6]"


def test_a_method_with_its_own_cache_is_measured_and_drawn(copy):
    """One file and one YAML: accuracy, memory, latency, and figures that show it beside the others."""
    project, _, _ = copy

    def result(experiment: str, task: str) -> dict:
        (path,) = project.glob(f"results/{experiment}/tiny/sinks/{task}/*/result.json")
        return json.loads(path.read_text())

    savings = result("accuracy", "micro_piqa")["savings"]
    assert savings["kind"] == "real" and savings["kv_bytes"] < savings["kv_bytes_mha"]
    metrics = result("memory", "none")["metrics"]
    assert metrics["kv_saved"] == pytest.approx(1 - 12 / 64)
    (folder,) = project.glob("results/memory/tiny/sinks/none/*")
    rows = pd.read_parquet(folder / "measurements.parquet")
    assert (rows.cache_bytes == rows.formula_bytes).all()
    assert {"model_prefill", "model_decode"} <= result("latency", "none")["metrics"].keys()
    command = [sys.executable, "-m", "analysis.figures", "fig1", "fig11", "--out", str(project / "figures")]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in (project / "figures").glob("*.png")} >= {"fig1.png", "fig11.png"}


def test_the_model_is_measured(copy):
    project, _, _ = copy
    (path,) = project.glob("results/memory/pythia_160m-random/chai/none/*/result.json")
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["kv_saved"] == pytest.approx((1 - 4 / 12) / 2)


def test_the_task_is_scored(copy):
    project, _, _ = copy
    found = {path.parts[-4:-2] for path in project.glob("results/accuracy/tiny/*/*/*/result.json")}
    assert {("mha", "openbookqa"), ("chai", "openbookqa")} <= found
    (path,) = project.glob("results/accuracy/tiny/chai/openbookqa/*/result.json")
    result = json.loads(path.read_text())
    assert result["n"] == 2 and result["metric"] == "acc_norm"
