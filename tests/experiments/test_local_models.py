"""Models from a user's own files: their names, what they keep of the chosen model, and one command for two methods."""

from __future__ import annotations

import json
import sys

import pytest

from experiments.cli import main
from experiments.config.compose import compose_config
from experiments.runs.identity import gguf_file, run_id
from experiments.runs.resolve import resolve_runs
from experiments.sweeps.plan import plan_jobs
from tests.chai.gguf_models import small_model, write_gguf

ITEM = {"goal": "a", "sol1": "b c", "sol2": "d", "label": 0}


def resolved(*overrides):
    (single,) = resolve_runs(compose_config(["task=piqa", *overrides]))
    return single


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return write_gguf(small_model(), tmp_path_factory.mktemp("gguf") / "my-model.gguf")


def test_a_gguf_file_names_the_model_and_keeps_only_what_was_set(gguf, tmp_path):
    config = resolved("method=mha", f"model.gguf={gguf}")
    assert config.model.name == "my-model" and config.model.fingerprint
    assert config.model.clusters is config.model.profile is config.model.predictor is None
    config = resolved(f"model.gguf={gguf}", "model.clusters=2")
    assert config.method.clusters == 2
    copied = tmp_path / gguf.name
    copied.write_bytes(gguf.read_bytes())
    assert run_id(config) == run_id(resolved(f"model.gguf={copied}", "model.clusters=2"))


def test_a_folder_of_another_shape_keeps_what_was_set_on_the_command_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    assert resolved("method=mha", f"model.path={tmp_path}").model.clusters is None
    for setting, key in (("model.clusters=4", "clusters"), ("model.predictor=oracle", "predictor")):
        config = resolved("method=mha", f"model.path={tmp_path}", setting)
        assert str(config.model[key]) == setting.partition("=")[2]
        assert config.model.name == tmp_path.name


def test_the_package_is_used_where_it_is_installed(gguf, tmp_path, monkeypatch):
    assert gguf_file(compose_config(["model=smollm2_135m", "model.package=not_installed_here"]).model) is None
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config = resolved("method=mha", "model=smollm2_135m", "model.package=some_weights")
    assert gguf_file(config.model) == str(package / "weights.gguf")
    assert config.model.name == "smollm2_135m" and config.model.fingerprint and config.model.clusters == 7
    with_path = compose_config(["model=smollm2_135m", "model.package=some_weights", f"model.path={tmp_path}"])
    assert gguf_file(with_path.model) is None


def test_the_package_is_not_used_for_other_weights(gguf, tmp_path, monkeypatch):
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "weights.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    common = ["method=mha", "model=smollm2_135m", "model.package=some_weights"]
    for other in (
        ["model.hub_id=other/model"],
        ["model.revision=abc"],
        ["model.name=mine", "model.hub_id=other/model"],
    ):
        config = resolved(*common, *other)
        assert gguf_file(config.model) is None and config.model.fingerprint is None
    same = resolved(*common, "model.hub_id=HuggingFaceTB/SmolLM2-135M-Instruct", "model.revision=main")
    assert gguf_file(same.model) and run_id(same) == run_id(resolved(*common))


def test_a_value_that_equals_the_chosen_models_own_is_kept(gguf, monkeypatch):
    """The default of smollm2_135m is 7, too; what was not given belongs to the chosen model alone."""
    common = ["model=smollm2_135m", f"model.gguf={gguf}"]
    config = resolved(*common, "model.clusters=7")
    assert config.model.clusters == config.method.clusters == 7
    assert resolved(*common, "method=mha").model.clusters is None
    planned = plan_jobs([["task=piqa", *common, "model.clusters=7,6"]])
    assert [one.folders[0].config.method.clusters for one in planned] == [7, 6]
    seen = []
    monkeypatch.setattr("experiments.cli.run_config", lambda config: seen.append(config.model.given) or 0)
    assert main(["task=piqa", *common, "model.clusters=7", "hydra.verbose=false"]) == 0  # composed by Hydra's own main
    assert seen == [["clusters", "gguf"]]


def test_path_and_gguf_together_are_refused(gguf, capsys):
    assert main([f"model.gguf={gguf}", "model.path=/x", "method=mha", "task=piqa"]) == 2
    assert "model.path and model.gguf are both set; valid: one of them" in capsys.readouterr().err


def test_mha_and_chai_are_compared_on_a_folder_by_one_command(gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "piqa_validation.jsonl").write_text(f"{json.dumps(ITEM)}\n" * 3)
    model = small_model()
    folder = tmp_path / "my-llama"
    common = ["model.clusters=2", "task=piqa", f"task.data_dir={tmp_path}", "device=cpu", f"results_dir={tmp_path}/r"]
    assert main(["-m", "method=mha,chai", f"model.gguf={gguf}", *common]) == 0
    model.save_pretrained(folder)
    for path in (tmp_path / "cache" / "chai-attention" / "gguf").glob("*/tokenizer*.json"):
        (folder / path.name).write_text(path.read_text())
    capsys.readouterr()
    assert main(["-m", "method=mha,chai", f"model.path={folder}", *common]) == 0
    results = {
        (result["model"], result["method"]): result
        for result in map(json.loads, (path.read_text() for path in (tmp_path / "r").glob("accuracy/**/result.json")))
    }
    assert set(results) == {(name, method) for name in ("my-model", "my-llama") for method in ("mha", "chai")}
    for name in ("my-model", "my-llama"):
        assert results[name, "chai"]["savings"]["heads_kept"] == [2, 2]
        assert results[name, "chai"]["settings_id"] == results[name, "mha"]["settings_id"]
    # The same weights, by two ways.
    assert results["my-model", "mha"]["metrics"] == results["my-llama", "mha"]["metrics"]
