"""A run's folder: identity, atomic files, what a dying process leaves."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.config.compose import compose_config
from experiments.runs.files import write_atomically
from experiments.runs.folder import RunError, RunFolder
from experiments.runs.identity import run_id, settings_id


def config(tmp_path, *overrides):
    return compose_config([f"results_dir={tmp_path}", "task=micro_piqa", *overrides])


def test_identity_ignores_only_what_is_about_the_machine(tmp_path):
    base = run_id(config(tmp_path))
    for same in (
        "device=cpu",
        "force=true",
        "model.device_map=auto",
        "task.data_dir=/elsewhere",
        "model.path=/elsewhere",
        "model.profile=/elsewhere",
    ):
        assert run_id(config(tmp_path, same)) == base
    assert run_id(config(tmp_path / "other")) == base
    for other in (
        "seed=1",
        "limit=5",
        "batch_size=2",
        "method=mha",
        "model.dtype=bfloat16",
        "task=micro_boolq",
        "method.tokens=4",
    ):
        assert run_id(config(tmp_path, other)) != base
    static = run_id(config(tmp_path, "method=chai_static"))
    copied = shutil.copytree(config(tmp_path).model.profile, tmp_path / "copied")
    assert run_id(config(tmp_path, "method=chai_static", f"model.profile={copied}")) == static
    (copied / "profile.json").write_text("{}")
    assert run_id(config(tmp_path, "method=chai_static", f"model.profile={copied}")) != static
    for held in ("model.fingerprint=abc", "task.fingerprint=abc"):
        assert run_id(config(tmp_path, held)) != base


def test_settings_are_the_same_for_methods_only(tmp_path):
    base = settings_id(config(tmp_path))
    assert settings_id(config(tmp_path, "method=mha")) == base
    assert settings_id(config(tmp_path, "method.tokens=4")) == base
    assert settings_id(config(tmp_path, "limit=5")) != base


def test_states_of_a_folder(tmp_path):
    folder = RunFolder(config(tmp_path))
    assert folder.path == tmp_path / "accuracy" / "tiny" / "chai" / "micro_piqa" / folder.id
    assert not folder.is_done
    folder.start()
    assert json.loads((folder.path / "status.json").read_text())["state"] == "running"
    assert "micro_piqa" in (folder.path / "config.yaml").read_text()
    folder.finish({"metrics": {"acc": 0.5}})
    assert RunFolder(config(tmp_path)).is_done
    assert json.loads((folder.path / "result.json").read_text()) == {"metrics": {"acc": 0.5}}
    folder.start()  # again: an old result never stands beside a new run
    assert not (folder.path / "result.json").exists()
    folder.fail("no luck")
    status = json.loads((folder.path / "status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", "no luck")
    assert not folder.is_done


def test_start_drops_leftovers_but_what_is_kept(tmp_path):
    folder = RunFolder(config(tmp_path))
    folder.start()
    (folder.path / "samples.parquet").write_text("old")
    (folder.path / "checkpoint.pt").write_text("old")
    folder.start(keep=("checkpoint.pt",))
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoint.pt", "config.yaml", "status.json"]


def test_a_broken_result_or_status_is_not_done(tmp_path):
    folder = RunFolder(config(tmp_path))
    folder.start()
    folder.finish({"metrics": {}})
    (folder.path / "status.json").write_text("{")
    assert not folder.is_done


def test_files_are_whole_or_absent(tmp_path):
    target = tmp_path / "file.json"
    target.write_text("before")

    def interrupted(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, interrupted)
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "accuracy").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="cannot write the run's folder"):
        RunFolder(config(tmp_path)).start()
