"""The accuracy experiment end to end on a small model made here, through the command line's own functions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from experiments.config.compose import compose_config
from experiments.config.schema import REPOSITORY, ConfigError
from experiments.evaluation import accuracy
from experiments.execute import run_config
from experiments.microworld.items import write_tasks


def command(workplace, results, *overrides):
    return [
        f"results_dir={results}",
        f"model.path={workplace / 'small'}",
        f"task.data_dir={workplace / 'data'}",
        "task=micro",
        *overrides,
    ]


def results_of(results, method):
    return {
        path.parent.parent.name: json.loads(path.read_text())
        for path in results.glob(f"accuracy/small/{method}/*/*/result.json")
    }


def test_methods_side_by_side_then_nothing_to_do(workplace, tmp_path, capsys):
    assert run_config(compose_config(command(workplace, tmp_path, "method=mha"))) == 0
    capsys.readouterr()
    chai = compose_config(command(workplace, tmp_path, "method=chai", "method.clusters=2"))
    assert run_config(chai) == 0
    shown = capsys.readouterr().out
    for word in ("micro_piqa", "micro_hellaswag", "micro_arc_easy", "micro_arc_challenge", "micro_boolq"):
        assert word in shown
    assert "mha" in shown
    assert "25.0 % real" in shown
    for method, saved in (("mha", 0.0), ("chai", 0.25)):
        found = results_of(tmp_path, method)
        assert len(found) == 5
        for task, result in found.items():
            assert (result["method"], result["model"], result["task"], result["n"]) == (method, "small", task, 12)
            savings = result["savings"]
            assert savings["kv_bytes"] == pytest.approx(savings["kv_bytes_mha"] * (1 - saved), abs=1)
            assert savings["kind"] == ("real" if saved else "none")
            assert savings["heads_kept"] == ([2, 2] if saved else [4, 4])
            assert result["architecture"]["num_hidden_layers"] == 2  # of the folder; the configuration's model has 4
            assert result["architecture"]["num_attention_heads"] == 4
            assert result["flops"]["tokens"] == 2048  # more than the model has positions
            assert (result["flops"]["method"] < result["flops"]["mha"]) == bool(saved)
            assert set(result) >= {"metrics", "stderr", "seconds", "versions", "seed", "experiment", "settings_id"}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run_config(chai) == 0
    assert capsys.readouterr().out.count("already complete") == 5
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert (
        run_config(compose_config(command(workplace, tmp_path, "method=chai", "method.clusters=2", "force=true"))) == 0
    )
    assert len(results_of(tmp_path, "chai")) == 5


def test_nothing_lists_the_packages_of_the_machine(workplace, tmp_path, monkeypatch):
    """lm-eval would after each task, in the time that is reported."""

    calls = []
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: calls.append(1) or "")
    assert run_config(compose_config(command(workplace, tmp_path, "method=mha", "task=micro_piqa"))) == 0
    assert not calls


def test_samples_say_what_the_metrics_say(workplace, tmp_path):
    assert run_config(compose_config(command(workplace, tmp_path, "method=random", "method.clusters=2"))) == 0
    for path in tmp_path.glob("accuracy/small/random/*/*/result.json"):
        result, samples = json.loads(path.read_text()), pd.read_parquet(path.with_name("samples.parquet"))
        assert len(samples) == result["n"] == samples.doc_id.nunique()
        for metric, value in result["metrics"].items():
            assert samples[metric].mean() == pytest.approx(value)


def test_a_group_and_its_members_are_the_same_runs(workplace, tmp_path, capsys):
    assert run_config(compose_config(command(workplace, tmp_path, "method=mha"))) == 0
    capsys.readouterr()
    assert run_config(compose_config(command(workplace, tmp_path, "method=mha", "task=micro_boolq"))) == 0
    assert capsys.readouterr().out.count("already complete") == 1


def test_counts_that_do_not_fit_write_nothing(workplace, tmp_path):
    for counts, message in (
        ("[2,2,2]", "3 counts, the model has 2 layers"),
        ("5", "valid: 1 to 4"),
        ("null", "set method.clusters"),
    ):
        with pytest.raises(ConfigError, match=message):
            accuracy.run(compose_config(command(workplace, tmp_path, f"method.clusters={counts}")))
    assert not list(tmp_path.iterdir())


def damaged(workplace, tmp_path, kind):
    if kind == "no folder":
        return tmp_path / "nowhere"
    folder = tmp_path / "model"
    folder.mkdir()
    for source in (workplace / "small").iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    if kind == "no model":
        (folder / "config.json").unlink()
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "cut off":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif kind == "code of its own":
        (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "does not exist"),
        ("no model", "is not a model folder: it has no config.json"),
        ("no weights", "has no weights"),
        ("pickled", "pickled ones (pytorch_model.bin)"),
        ("cut off", "cannot load the model from folder"),
        ("code of its own", "never executed"),
        ("no tokenizer", "cannot load the tokenizer from folder"),
    ],
)
def test_a_model_that_cannot_be_had_fails_its_runs_with_one_line(workplace, tmp_path, capfd, kind, message):
    folder = damaged(workplace, tmp_path, kind)
    overrides = command(workplace, tmp_path / "results", "method=mha", "task=micro_piqa", f"model.path={folder}")
    assert run_config(compose_config(overrides)) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    (status,) = (tmp_path / "results").glob("accuracy/*/mha/micro_piqa/*/status.json")
    assert json.loads(status.read_text())["state"] == "failed"
    assert message in json.loads(status.read_text())["error"]
    assert not list((tmp_path / "results").rglob("result.json"))


def test_forcing_without_a_model_keeps_the_results(workplace, tmp_path, capfd):
    overrides = command(workplace, tmp_path, "method=mha", "task=micro_piqa")
    assert run_config(compose_config(overrides)) == 0
    (tmp_path / "small").mkdir()
    for source in (workplace / "small").iterdir():
        (tmp_path / "small" / source.name).write_bytes(source.read_bytes())
    moved = [*overrides, f"model.path={tmp_path / 'small'}"]
    assert run_config(compose_config(moved)) == 0  # the same files elsewhere: the same run
    assert "already complete" in capfd.readouterr().out
    assert run_config(compose_config([*moved, "force=true", "device=cuda:99"])) == 1
    assert "device 'cuda:99' is not available" in capfd.readouterr().err
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.with_name("status.json").read_text())["state"] == "done"


def test_no_network_is_one_line(tmp_path, capfd):
    config = compose_config([f"results_dir={tmp_path}", "model=opt125m", "method=mha", "task=micro_piqa"])
    assert run_config(config) == 1
    assert "cannot download hub repository 'facebook/opt-125m': no network" in capfd.readouterr().err


def test_too_little_memory_is_said_before_anything_is_loaded(tmp_path, capfd, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**9})())
    overrides = [f"results_dir={tmp_path}", "model=llama7b", "model.random_init=true", "device=cpu", "method=mha"]
    assert run_config(compose_config([*overrides, "task=micro_piqa"])) == 1
    assert "too little memory for 'llama7b-random': its weights take 13.5 GB in float16" in capfd.readouterr().err


def test_broken_data_fails_its_own_task_only(workplace, tmp_path, capfd):
    data = tmp_path / "data"
    write_tasks(data, count=4)
    (data / "micro_boolq.jsonl").write_text('{"passage": "x", "question": "y", "label": 1}\nnot json\n')
    (data / "micro_arc_easy.jsonl").write_text('{"question": "x"}\n')
    (data / "micro_piqa.jsonl").unlink()
    overrides = command(workplace, tmp_path / "results", "method=mha", f"task.data_dir={data}")
    assert run_config(compose_config(overrides)) == 1
    errors = capfd.readouterr().err
    assert "micro_boolq.jsonl, line 2, is not valid JSON" in errors
    assert f"cannot read {data / 'micro_piqa.jsonl'}: No such file or directory" in errors
    assert "micro_arc_easy.jsonl, line 1, has no choices, answerKey; expected columns: question" in errors
    assert "Traceback" not in errors
    assert len(results_of(tmp_path / "results", "mha")) == 2


def test_data_that_the_hub_cannot_give_is_one_line(workplace, tmp_path, capfd):
    config = compose_config(command(workplace, tmp_path, "method=mha", "task=piqa", "task.data_dir=null"))
    assert run_config(config) == 1
    errors = capfd.readouterr().err
    assert "cannot load the data of task 'piqa' (baber/piqa) from the hub" in errors
    assert "task.data_dir=FOLDER with piqa_validation.jsonl" in errors
    assert "Traceback" not in errors


def test_ctrl_c_leaves_no_result_and_the_run_completes_later(workplace, tmp_path):
    """As a process; tests/experiments/test_survival.py kills one."""
    overrides = command(workplace, tmp_path, "method=mha", "batch_size=1", "task=micro_hellaswag")
    write_tasks(tmp_path / "many", count=400)
    overrides = [*overrides[:2], f"task.data_dir={tmp_path / 'many'}", *overrides[3:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(
        [sys.executable, "run.py", *overrides], cwd=REPOSITORY, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors, deadline = "", time.monotonic() + 120
    assert process.stderr is not None
    while not re.search(r"loglikelihood requests: +[1-9]\d?%", errors) and time.monotonic() < deadline:
        errors += process.stderr.read(64)  # scoring has begun, and isn't at its end
    process.send_signal(signal.SIGINT)
    errors += process.communicate(timeout=60)[1]
    (status,) = tmp_path.rglob("status.json")
    assert not list(tmp_path.rglob("result.json"))
    assert process.returncode == 130
    assert json.loads(status.read_text())["state"] == "failed"
    assert "Traceback" not in errors
    assert run_config(compose_config([*overrides, "batch_size=64"])) == 0  # another run, quick
    assert run_config(compose_config(overrides)) == 0
    assert len(list(tmp_path.rglob("result.json"))) == 2
