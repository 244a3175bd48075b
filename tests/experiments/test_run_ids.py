"""Results of earlier versions are found: run ids and folders do not change, since keys of the configuration do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from experiments.config.compose import choices, compose_config
from experiments.execute import run_config
from experiments.runs.files import write_json
from experiments.runs.identity import run_id
from experiments.runs.resolve import run_folders

#: Folders of the runs of each command line, as the first version named them. The ids of the embedded model's runs
#: depend on its files, too: compute them again only where these change.
KNOWN: dict[str, list[str]] = json.loads(Path(__file__).with_name("run_ids.json").read_text())


@pytest.mark.parametrize("method", ["", *choices("method")])
def test_run_ids_are_those_of_the_first_version(method):
    """One test per method; the first is for command lines without one."""
    commands = [
        command
        for command in KNOWN
        if next((w for w in command.split() if w.startswith("method=")), "method=") == f"method={method}"
    ]
    assert commands
    for command in commands:
        folders = run_folders(compose_config(command.split()))
        assert [str(folder.path.relative_to("results")) for folder in folders] == KNOWN[command], command


def test_pruning_for_the_whole_sequence_has_ids_of_its_own():
    """SpAtten's earlier runs chose per row: the default of today is another method, though the command is the same."""
    commands = [command for command in KNOWN if "method=spatten" in command.split()]
    assert commands and all("method.pruning=per_row" in command for command in commands)
    for command in commands:
        words = [word for word in command.split() if word != "method.pruning=per_row"]
        (earlier, *_) = run_folders(compose_config(command.split()))
        for changes in ([], ["method.preset=linear"], ["method.pruning=per_row", "method.preset=authors"]):
            (folder, *_) = run_folders(compose_config([*words, *changes]))
            assert folder.path != earlier.path
        # Numbers that were the defaults may be written out.
        same = ["method.pruning=per_row", "method.preset=linear", "method.heads=0.75"]
        assert run_folders(compose_config([*words, *same]))[0].path == earlier.path


def test_a_stride_of_the_window_is_the_default():
    command = ["experiment=perplexity", "method=mha", "experiment.window=256"]
    ids = {stride: run_id(compose_config([*command, f"experiment.stride={stride}"])) for stride in ("null", 256, 128)}
    assert ids["null"] == ids[256] != ids[128]


def test_a_result_of_an_earlier_version_is_shown_and_not_redone(tmp_path, capsys):
    command = "method=mha model=tiny task=micro_piqa"
    (name,) = KNOWN["method=mha model=tiny task=micro_piqa"]
    folder = tmp_path / name
    folder.mkdir(parents=True)
    result = {
        "experiment": "accuracy", "method": "mha", "model": "tiny", "task": "micro_piqa", "metric": "acc_norm",
        "metrics": {"acc": 0.5, "acc_norm": 0.625}, "stderr": {"acc": 0.1, "acc_norm": 0.1}, "n": 100,
        "savings": {"kind": "none", "kv_bytes": 4096.0, "kv_bytes_mha": 4096.0, "heads_kept": [16] * 4},
        "flops": {"tokens": 2048, "method": 1.0, "mha": 1.0}, "seconds": 1.0, "seed": 0, "settings_id": "0",
        "run_id": folder.name, "versions": {"chai-lab": "0.1.0"},
    }  # fmt: skip
    write_json(folder / "result.json", result)
    write_json(folder / "status.json", {"state": "done", "run_id": folder.name})
    before = {path: path.read_text() for path in folder.iterdir()}
    assert run_config(compose_config([*command.split(), f"results_dir={tmp_path}"])) == 0
    output = capsys.readouterr().out
    assert f"{folder}" in output.replace("\n", "") and "62.5" in output
    assert {path: path.read_text() for path in folder.iterdir()} == before


def test_settings_of_later_versions_have_ids_of_their_own():
    """Written out, their defaults are the runs of earlier versions; any other value is another run."""
    profile, chai = ["experiment=profile", "model=tiny"], ["method=chai", "model=tiny", "task=micro_piqa"]
    output = ["method=chai_output", "model=tiny", "task=micro_piqa", "method.profile=null"]
    for command, defaults, changes in (
        (
            profile,
            [
                "profile.metrics=null", "profile.budget=heads", "profile.kl=0.1", "profile.sensitivity_tokens=256",
                "profile.metric=output", "profile.heads=null", "profile.sensitivity_texts=null",
                "profile.refit_texts=null",
            ],
            [
                "profile.metrics=[cosine]", "profile.metrics=[output]", "profile.budget=kl", "profile.heads=6",
                "profile.kl=0.2", "profile.metric=cosine", "profile.sensitivity_texts=4",
                "profile.sensitivity_tokens=64", "profile.rule=sensitivity", "profile.saving=0.3",
                "profile.refit_texts=8",
            ],
        ),
        (
            chai,
            ["method.metric=attention"],
            ["method.metric=cosine", "method.membership=kmedoids", "method.representative=output"],
        ),
        (
            output,
            ["method.metric=output", "method.prior=null", "method.refit=false"],
            [
                "method.prior=5", "method.prior=measured", "method.refit=true", "method.metric=attention",
                "method.metric=cosine", "method.group_aware=true",
            ],
        ),
    ):  # fmt: skip
        config = compose_config(command)

        def own_id(setting, config=config):
            changed, (key, _, value) = config.copy(), setting.partition("=")
            OmegaConf.update(changed, key, yaml.safe_load(value), force_add=False)
            return run_id(changed)

        first = run_id(config)
        assert all(own_id(setting) == first for setting in defaults)
        assert len({first, *map(own_id, changes)}) == len(changes) + 1
