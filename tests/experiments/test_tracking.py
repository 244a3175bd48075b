from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.config.validate import check_overrides
from experiments.runs import tracking
from experiments.runs.experiment import Outcome, run_lifecycle
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.identity import run_id
from experiments.runs.tracking import choose_mode, flatten

RESULT = {"metrics": {"acc": 0.5}, "savings": {"kind": "real", "kv_bytes": 10}, "n": 4, "seconds": 1.5, "heads": [1, 2]}


def make_run(tmp_path: Path, *settings: str) -> RunFolder:
    return RunFolder(compose_config(["task=micro_boolq", "logger=wandb", f"results_dir={tmp_path}", *settings]))


def work(folder: RunFolder) -> dict:
    matplotlib.image.imsave(folder.path / "map.png", np.zeros((4, 4)))
    rows = {"doc_id": [0, 1], "loglikelihoods": [[-1.0, -2.0], [-3.0]], "target": ["a", "b"]}
    pd.DataFrame(rows).to_parquet(folder.path / "samples.parquet")
    (folder.path / "weights.safetensors").write_bytes(b"large")
    return RESULT


def records(file: Path) -> Iterator:
    """What an offline run holds: records in blocks of 32 KiB, each chunk behind its checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = (1 << 15) - place % (1 << 15)
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole, or its last chunk
            yield Record.FromString(whole)
            whole = b""


def shown(tmp_path: Path) -> list:
    return [list(records(file)) for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]


def test_a_run_is_shown_offline(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    folder = make_run(results, "logger.group=sweep")
    assert run_lifecycle(folder, lambda: work(folder)) is Outcome.DONE
    out = capsys.readouterr().out.replace("\n", "")
    assert "logger=wandb: offline, `wandb sync " in out
    assert list(tmp_path.iterdir()) == [results]  # the tracker's files are with the results, not where we are
    (told,) = shown(results)
    (run,) = (one.run for one in told if one.HasField("run"))
    assert (run.run_id, run.display_name, run.run_group, run.job_type) == (folder.id, folder.id, "sweep", "accuracy")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["method"]["name"] == "chai" and config["limit"] is None
    summary = {}
    for one in told:
        summary |= {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in one.summary.update}
    assert summary["metrics/acc"] == 0.5 and summary["savings/kv_bytes"] == 10 and summary["state"] == "done"
    assert {item.key or item.nested_key[0] for one in told for item in one.history.item} >= {"samples", "map.png"}
    artefacts = [one.request.log_artifact.artifact for one in told if one.request.HasField("log_artifact")]
    artefacts += [one.artifact for one in told if one.HasField("artifact")]
    files = {entry.path for artefact in artefacts for entry in artefact.manifest.contents if artefact.type == "run"}
    assert files == {"config.yaml", "status.json", "result.json", "samples.parquet", "map.png"}


def test_a_run_that_goes_on_is_the_same_one_there(tmp_path):
    def fail() -> dict:
        raise RunError("the disk is full")

    folder = make_run(tmp_path)
    assert run_lifecycle(folder, fail) is Outcome.FAILED
    assert run_lifecycle(folder, lambda: RESULT) is Outcome.DONE
    told = shown(tmp_path)
    runs = [next(one.run for one in one_start if one.HasField("run")) for one_start in told]
    assert [run.run_id for run in runs] == [folder.id] * 2
    exits = [next(one.exit.exit_code for one in one_start if one.HasField("exit")) for one_start in told]
    assert sorted(exits) == [0, 1]


@pytest.mark.parametrize(
    ("wandb", "reason"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("raise ImportError('no wandb here')", r"no wandb here \(pip install 'chai-attention\[wandb\]'\)"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import time; time.sleep(600)", "no answer for 3 seconds"),
    ],
)
def test_nothing_there_fails_a_run(tmp_path, capsys, monkeypatch, wandb, reason):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text(wandb)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    folder = make_run(tmp_path / "results", "logger.timeout=3" if "sleep" in wandb else "logger.timeout=120")
    assert run_lifecycle(folder, lambda: work(folder)) is Outcome.DONE
    assert folder.is_done
    printed = capsys.readouterr()
    lines = printed.out.replace("\n", " ").split("logger=wandb: ")
    assert len(lines) == 2 and lines[1].startswith("not tracked: ")
    assert re.search(reason, lines[1])
    assert not printed.err


def test_not_even_a_process_that_cannot_be_started(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking.sys, "executable", str(tmp_path / "gone"))
    folder = make_run(tmp_path)
    assert run_lifecycle(folder, lambda: RESULT) is Outcome.DONE
    assert "not tracked: FileNotFoundError" in capsys.readouterr().out


def test_no_tracker_by_default(tmp_path, capsys):
    folder = RunFolder(compose_config(["task=micro_boolq", f"results_dir={tmp_path}"]))
    assert run_lifecycle(folder, lambda: RESULT) is Outcome.DONE
    assert not (tmp_path / "wandb").exists()
    assert "wandb" not in capsys.readouterr().out


def test_mode(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert choose_mode("online") == "online"
    assert choose_mode(None) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    assert choose_mode(None) == "offline"
    monkeypatch.setattr(tracking, "create_connection", lambda *args, **kwargs: io.BytesIO())
    assert choose_mode(None) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode(None) == "offline"


def test_flatten():
    assert flatten(RESULT) == {"metrics/acc": 0.5, "savings/kv_bytes": 10, "n": 4, "seconds": 1.5}


def test_configuration():
    assert run_id(compose_config([])) == run_id(compose_config(["logger=wandb", "logger.project=mine"]))
    for wrong, told in [
        (["logger=wand"], "unknown logger 'wand' .did you mean 'wandb'.*none, wandb"),
        (["logger=wandb", "logger.mode=sometimes"], "logger.mode is 'sometimes'; valid: online, offline, null"),
        (["logger.timeout=0"], "logger.timeout is 0.0; valid: more than 0"),
        (["logger.nmae=x"], "unknown key 'logger.nmae'"),
    ]:
        with pytest.raises(ConfigError, match=told):
            check_overrides(wrong)
