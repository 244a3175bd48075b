"""Definitions of tasks in a user's folder: refused where they cannot be scored, and fingerprints of what they use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from transformers import PreTrainedConfig

from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.evaluation.groups import group_result
from experiments.evaluation.tasks import build_task, refusal
from experiments.runs.definitions import metric_keys, split_files
from experiments.runs.folder import RunError
from experiments.runs.identity import run_id
from experiments.runs.registry import registered_members

SPEC = {
    "task": "one", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the task ``one``; names of lm-eval are not looked up."""
    monkeypatch.setattr("experiments.runs.registry.built_in", dict)
    path = tmp_path / "own"
    path.mkdir()
    (path / "utils.py").write_text("def prompt(doc):\n    return doc['question']\n")
    return write(path, "one", SPEC)


def write(folder, name, spec):
    (folder / f"{name}.yaml").write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec))
    return folder


def members(folder, name="one", *more):
    return registered_members(
        compose_config(["method=mha", "task=lm_eval", f"task.name={name}", f"task.include_path={folder}", *more])
    )


# Functions.


@pytest.mark.parametrize(
    "group",
    [
        "group: all\ntask: [one]\ndoc_to_text: !function utils.prompt\n",
        "group: all\ntask:\n  - task: one\n    doc_to_text: !function utils.prompt\n",
        "group: all\ntask:\n  - {group: inner, task: [{task: one, doc_to_text: !function utils.prompt}]}\n",
        "include: base.inc\ngroup: all\ntask: [one]\n",
    ],
)
def test_functions_of_a_group_are_refused(folder, group):
    (folder / "base.inc").write_text("doc_to_text: !function utils.prompt\n")
    write(folder, "all", group)
    with pytest.raises(ConfigError, match="group 'all' sets 'doc_to_text' with !function"):
        members(folder, "all")


def test_functions_that_do_not_reach_the_tasks_are_left_alone(folder):
    write(folder, "task", "include: one.yaml\ntask: two\ndoc_to_text: !function utils.prompt\n")
    means = "aggregate_metric_list: [{metric: acc, aggregation: !function utils.prompt}]\n"
    write(folder, "all", f"group: all\ntask: [one, two]\n{means}")
    assert [single.task.overrides for single in members(folder, "all")] == [None, None]
    config = compose_config(["task=lm_eval", "task.name=all", f"task.include_path={folder}"])
    assert group_result(config.task, [{"metrics": {"acc": 0.5}, "n": 2, "stderr": {}}]) is None


def test_a_part_of_a_dictionary_with_a_function_cannot_be_overridden(folder):
    write(folder, "two", "include: one.yaml\ntask: two\nfewshot_config:\n  samples: !function utils.prompt\n")
    with pytest.raises(ConfigError, match="sets a part of 'fewshot_config', in which task 'two' has a !function"):
        members(folder, "two", "task.overrides={fewshot_config:{sampler:first_n}}")


# Shapes.


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("{metric_list:3}", "task 'one': metric_list is 3; valid: a list like"),
        ("{metric_list:acc}", "task 'one': metric_list is 'acc'; valid: a list like"),
        ("{metric_list:[acc]}", "task 'one': metric_list is .*; valid: a list like"),
        ("{metric_list:[]}", "task 'one': metric_list is .*; valid: a list like"),
        ("{filter_list:[{filter:[{function:take_first}]}]}", "task 'one': filter_list is .*; valid: a list like"),
        ("{filter_list:[{name:a,filter:take_first}]}", "task 'one': filter_list is .*; valid: a list like"),
        ("{metric_list:[{metric:3}]}", "task 'one': metric_list is .*; valid: a list like"),
        ("{oops:3}", "unknown key in the definition of task 'one': 'oops'; valid: custom_dataset, dataset_kwargs"),
        ("{generation_kwargs:3}", "task 'one': generation_kwargs is 3; valid: a dictionary"),
        ("{generation_kwargs:{max_gen_tok:1}}", r"key 'max_gen_tok' \(did you mean 'max_gen_toks'\?\); valid: until"),
        ("{generation_kwargs:{use_cache:true}}", "generation_kwargs has the key 'use_cache'"),
    ],
)
def test_mistakes_in_a_definition_are_one_line(folder, overrides, said):
    with pytest.raises(ConfigError, match=said) as error:
        members(folder, "one", f"task.overrides={overrides}")
    assert "\n" not in str(error.value)


def test_a_filter_is_lm_evals_or_one_that_the_code_of_the_task_registers(folder):
    def refused(name):
        steps = f"task.overrides={{filter_list:[{{name:a,filter:[{{function:{name}}}]}}]}}"
        (single,) = members(folder, "coded", steps)
        return refusal(single.task, PreTrainedConfig(), None)

    register = "from lm_eval.api.registry import register_filter\n@register_filter('of_the_task')\nclass Own: pass\n"
    (folder / "utils.py").write_text(f"{register}def prompt(doc): return ''\n")
    write(folder, "coded", "include: one.yaml\ntask: coded\ndoc_to_text: !function utils.prompt\n")
    assert refused("take_first") is refused("of_the_task") is None
    assert "filter of task 'coded': 'take_frst' (did you mean 'take_first'?)" in refused("take_frst")


def test_keys_of_lm_eval_and_of_generate_are_accepted(folder):
    members(folder, "one", "task.overrides={generation_kwargs:{until:[x],max_gen_toks:2,repetition_penalty:1.5}}")
    members(folder, "one", "task.overrides={filter_list:[{name:a,filter:[{function:take_first}]}],gen_prefix:x}")
    assert metric_keys({"output_type": "loglikelihood"}) == ["perplexity", "acc"]


# Local data.


def test_a_task_whose_code_loads_its_data_refuses_a_data_folder(folder):
    write(folder, "coded", "task: coded\nclass: !function utils.prompt\n")
    members(folder, "coded")
    with pytest.raises(ConfigError, match="task 'coded' loads its data with code of its own; valid: task.data_dir=nul"):
        members(folder, "coded", f"task.data_dir={folder}")


def rows(path, *answers):
    path.write_text("".join(json.dumps({"question": "a", "answer": answer}) + "\n" for answer in answers))


def test_the_files_that_are_read_are_those_that_count(folder, tmp_path):
    """Without a split in the definition, ``test`` is scored; a file of another split is neither read nor counted."""
    write(folder, "bare", {key: value for key, value in SPEC.items() if key != "test_split"} | {"task": "bare"})
    data = tmp_path / "data"
    data.mkdir()
    rows(data / "bare_test.jsonl", "b")
    (single,) = members(folder, "bare", f"task.data_dir={data}")
    assert split_files(single.task, {}) == [("test", data / "bare_test.jsonl")]
    assert set(build_task(single.task)["custom_dataset"]()) == {"test"}
    rows(data / "bare_validation.jsonl", "b")
    (same,) = members(folder, "bare", f"task.data_dir={data}")
    assert run_id(same) == run_id(single)
    rows(data / "bare_test.jsonl", "c")
    (other,) = members(folder, "bare", f"task.data_dir={data}")
    assert run_id(other) != run_id(single)


def test_a_missing_file_of_a_definition_is_named_before_a_model_is_loaded(folder):
    missing = folder / "gone.jsonl"
    write(folder, "one", SPEC | {"dataset_kwargs": {"data_files": {"test": str(missing)}}})
    (single,) = members(folder)
    assert (
        refusal(single.task, PreTrainedConfig(), None)
        == f"task 'one': data file {missing} of its definition does not exist"
    )
    rows(missing, "b")
    assert refusal(single.task, PreTrainedConfig(), None) is None


def test_a_damaged_file_of_a_definition_is_one_line_with_its_cause(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (folder / "bad.jsonl").write_text('{"question": 1}\n{"question": \n')
    write(folder, "one", SPEC | {"dataset_kwargs": {"data_files": {"test": str(folder / "bad.jsonl")}}})
    (single,) = members(folder)
    with pytest.raises(RunError, match=r"cannot read the data of task 'one' \(json\): .*JSON") as error:
        build_task(single.task)
    assert "\n" not in str(error.value) and "hub" not in str(error.value)


# Where the folder is.


def test_the_run_is_the_same_wherever_the_folder_is(folder, tmp_path, monkeypatch):
    write(folder, "two", "include: one.yaml\ntask: two\ndoc_to_text: !function utils.prompt\n")
    ids = set()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for place in (folder, "own", tmp_path / "link", "link", os.path.join("own", "..", "own")):
        (single,) = members(place, "two")
        ids.add(run_id(single))
    folder.rename(tmp_path / "moved")
    (single,) = members(tmp_path / "moved", "two")
    assert ids == {run_id(single)}


def test_code_in_any_subfolder_counts(folder):
    (folder / "code").mkdir()
    (folder / "code" / "more.py").write_text("x = 1\n")
    (before,) = members(folder)
    (folder / "code" / "more.py").write_text("x = 2\n")
    (after,) = members(folder)
    assert run_id(before) != run_id(after)


def test_names_of_tasks_are_found_without_torch():
    """Mistakes on the command line are reported before anything heavy is imported."""
    program = "import sys, experiments.runs.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
