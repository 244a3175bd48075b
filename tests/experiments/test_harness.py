"""Scores are the harness's own: equal to plain lm-eval, to the last digit, on a real model and real data."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pandas as pd
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from experiments.config.compose import compose_config
from experiments.execute import run_config

LIMIT = 30
#: task -> (definition, split, file), written out here so that a slip in conf/task shows
REAL = {
    "piqa": ("piqa/piqa.yaml", "validation", "piqa_validation.jsonl"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", "hellaswag_validation.jsonl"),
    "arc_easy": ("arc/arc_easy.yaml", "test", "arc_easy_test.jsonl"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test", "arc_challenge_test.jsonl"),
    "boolq": ("super_glue/boolq/default.yaml", "validation", "boolq_validation.jsonl"),
}


@pytest.fixture(scope="session")
def plain(shared, tmp_path_factory):
    """What ``lm_eval`` itself says: its model class, its task files, the data through its own JSON loading."""
    folder = tmp_path_factory.mktemp("harness")
    definitions = Path(lm_eval.__file__).parent / "tasks"
    for task, (definition, split, name) in REAL.items():
        splits = "".join(f"{other}_split: null\n" for other in ("training", "validation", "test") if other != split)
        (folder / f"{task}.yaml").write_text(
            f"include: {definitions / definition}\ntask: {task}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    {split}: {shared / 'data' / 'tasks' / name}\n"
            f"{split}_split: {split}\n{splits}"
        )
    lm = HFLM(pretrained=str(shared / "models" / "stories260K"), batch_size=16, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    # One task at a time: several in one call share batches, and a row's last digits depend on its batch's width.
    return {
        task: lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=LIMIT, log_samples=True)
        for task in REAL
    }


def test_accuracy_and_loglikelihoods_are_those_of_plain_lm_eval(plain, shared, tmp_path):
    overrides = [
        f"results_dir={tmp_path}",
        "method=mha",
        f"model.path={shared / 'models' / 'stories260K'}",
        "task=paper",
        f"task.data_dir={shared / 'data' / 'tasks'}",
        f"limit={LIMIT}",
        "device=cpu",
    ]
    assert run_config(compose_config(overrides)) == 0
    for task in REAL:
        (path,) = tmp_path.glob(f"accuracy/stories260K/mha/{task}/*/result.json")
        result, samples = json.loads(path.read_text()), pd.read_parquet(path.with_name("samples.parquet"))
        for metric, value in result["metrics"].items():
            assert value == plain[task]["results"][task][f"{metric},none"]
        for metric, value in result["stderr"].items():
            assert value == plain[task]["results"][task][f"{metric}_stderr,none"]
        theirs = {
            sample["doc_id"]: [answer[0][0] for answer in sample["resps"]] for sample in plain[task]["samples"][task]
        }
        ours = dict(zip(samples.doc_id, samples.loglikelihoods, strict=True))
        assert {key: list(value) for key, value in ours.items()} == theirs


def test_chai_runs_on_a_grouped_query_model(shared, tmp_path, capsys):
    """stories260K has 8 query heads on 4 key heads: clustered, it keeps the key heads that are still read."""
    overrides = [
        f"results_dir={tmp_path}",
        f"model.path={shared / 'models' / 'stories260K'}",
        f"task.data_dir={shared / 'data' / 'tasks'}",
        f"limit={LIMIT}",
        "task=piqa",
        "device=cpu",
    ]
    assert run_config(compose_config([*overrides, "method=chai", "method.clusters=[8,4,2,2,1]"])) == 0
    (path,) = tmp_path.glob("accuracy/stories260K/chai/piqa/*/result.json")
    savings = json.loads(path.read_text())["savings"]
    assert savings["heads_kept"] == [8, 4, 2, 2, 1]
    stored = savings["key_heads_stored"]
    assert stored[0] == 4
    assert stored[4] == 1
    assert all(1 <= kept <= 4 for kept in stored)
    assert savings["kv_bytes"] < savings["kv_bytes_mha"]
    assert run_config(compose_config([*overrides, "method=chai"])) == 2
    assert "model 'stories260K' defines no default cluster counts" in capsys.readouterr().err
