"""Any task of lm-eval by its name: each kind of request, filters, groups, local data; equal to plain lm-eval."""

from __future__ import annotations

import json
import math
import os

import lm_eval
import pandas as pd
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.config.compose import compose_config
from experiments.evaluation.groups import group_result
from experiments.evaluation.lm import ONE_PROCESS, auto_batch_size
from experiments.execute import run_config
from experiments.microworld import world
from experiments.runs.definitions import metric_key

BATCH = 3
KINDS = ("own_gsm", "own_rolling", "own_choice", "own_loglikelihood")
FILTERS = [
    {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
    {
        "name": "last",
        "filter": [
            {"function": "regex", "regex_pattern": r"(\w+)", "group_select": -1},
            {"function": "take_first"},
        ],
    },
]


def texts(count: int, length: int) -> list[str]:
    words = world.words()
    return [
        " ".join(words[(7 * item + 3 * place) % len(words)] for place in range(length + item)) for item in range(count)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of definitions with their data: one of each kind, and a group of two of them."""
    folder = tmp_path_factory.mktemp("own")
    items = {
        "own_gsm": [{"question": text, "answer": text.split()[0]} for text in texts(8, 5)],
        "own_gsm_train": [{"question": text, "answer": text.split()[-1]} for text in texts(12, 3)[8:]],
        "own_rolling": [{"page": text} for text in [*texts(5, 20)[:4], " ".join(texts(40, 12))]],
        "own_choice": [{"question": text, "choices": text.split()[:3], "label": 1} for text in texts(9, 6)],
        "own_loglikelihood": [{"question": text, "answer": text.split()[2]} for text in texts(7, 6)],
    }
    for name, rows in items.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    specs = {
        "own_gsm": asked | {
            "output_type": "generate_until", "fewshot_split": "train", "num_fewshot": 2, "filter_list": FILTERS,
            "generation_kwargs": {"until": [" ."], "max_gen_toks": 7, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "own_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "own_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "label", "tag": "own_tag",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "own_loglikelihood": asked | {"doc_to_target": " {{answer}}"} | {
            "output_type": "loglikelihood", "tag": "own_tag",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    }  # fmt: skip
    for name, spec in specs.items():
        files = {"test": str(folder / f"{name}.jsonl")}
        if "fewshot_split" in spec:
            files["train"] = str(folder / f"{name}_train.jsonl")
        spec |= {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    group = {"group": "own_group", "task": ["own_gsm", {"task": "own_choice", "num_fewshot": 0}]}
    for name, weighted in (("own_items", True), ("own_tasks", False)):
        means = [{"metric": "acc", "weight_by_size": weighted}]
        scored = {"group": name, "task": ["own_choice", "own_loglikelihood"], "aggregate_metric_list": means}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(scored))
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder


def overrides_of(workplace, tasks, results, name, method="mha"):
    settings = ["method.clusters=2"] if method in ("chai", "random") else []
    return [
        f"results_dir={results}", f"model.path={workplace / 'small'}", "task=lm_eval", f"task.name={name}",
        f"task.include_path={tasks}", f"batch_size={BATCH}", f"method={method}", "device=cpu", *settings,
    ]  # fmt: skip


def outcomes(results) -> dict[str, tuple[dict, pd.DataFrame]]:
    """Result, without what is about one attempt alone, and items of each task."""
    found = {}
    for path in results.rglob("result.json"):
        result = json.loads(path.read_text())
        kept = {key: value for key, value in result.items() if key not in ("seconds", "resumed")}
        found[result["task"]] = kept, pd.read_parquet(path.with_name("samples.parquet"))
    return found


@pytest.fixture(scope="module")
def plain(workplace, tasks):
    """What lm-eval itself says of each task."""
    folder = workplace / "small"
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=BATCH,
    )  # fmt: skip
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return {
        name: lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=manager, log_samples=True) for name in KINDS
    }


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_task_is_that_of_plain_lm_eval(workplace, tasks, plain, tmp_path, name):
    assert run_config(compose_config(overrides_of(workplace, tasks, tmp_path, name))) == 0
    ((result, items),) = outcomes(tmp_path).values()
    theirs = plain[name]["results"][name]
    numbers = {key: value for key, value in theirs.items() if "," in key and isinstance(value, (int, float))}
    renamed = {}
    for key, value in numbers.items():
        metric, label = key.split(",")
        part = "stderr" if metric.endswith("_stderr") else "metrics"
        renamed[part, metric_key(metric.removesuffix("_stderr"), label)] = value
    ours = {(part, key): value for part in ("metrics", "stderr") for key, value in result[part].items()}
    assert ours == renamed
    assert result["n"] == len(items) == len({sample["doc_id"] for sample in plain[name]["samples"][name]})
    responses = {sample["doc_id"]: sample["resps"] for sample in plain[name]["samples"][name]}
    for item in items.to_dict("records"):
        flat = [response for repeats in responses[item["doc_id"]] for response in repeats]
        if name == "own_gsm":
            assert list(item["responses"]) == flat
        elif name == "own_rolling":
            assert list(item["loglikelihoods"]) == flat
        else:
            assert list(item["loglikelihoods"]) == [nats for nats, _ in flat]


def test_generated_texts_differ_and_end_before_a_stop_sequence(plain):
    said = [sample["resps"][0][0] for sample in plain["own_gsm"]["samples"]["own_gsm"]]
    assert len(set(said)) > 2 and all(said)
    assert not any(" ." in text for text in said)


@pytest.mark.parametrize("name", ["own_gsm", "own_rolling", "own_group"])
def test_an_interrupted_run_under_chai_goes_on_and_ends_with_the_same_numbers(workplace, tasks, tmp_path, saves, name):
    assert run_config(compose_config(overrides_of(workplace, tasks, tmp_path / "whole", name, "chai"))) == 0
    whole, saves.limit = saves.count, 2
    saves.count = 0
    cut = compose_config(overrides_of(workplace, tasks, tmp_path / "cut", name, "chai"))
    with pytest.raises(SystemExit):
        run_config(cut)
    saves.limit = None
    assert run_config(cut) == 0
    assert saves.count == whole  # no batch twice
    expected, found = outcomes(tmp_path / "whole"), outcomes(tmp_path / "cut")
    assert found.keys() == expected.keys() == ({"own_gsm", "own_choice"} if name == "own_group" else {name})
    for task, (result, items) in expected.items():
        assert found[task][0] == result
        pd.testing.assert_frame_equal(found[task][1], items, check_exact=True)


@pytest.mark.parametrize("method", ["random", "spatten", "chai_qkv"])
def test_generated_and_rolling_tasks_run_under_every_method(workplace, tasks, tmp_path, method):
    more = ["method.clusters=2"] if method == "chai_qkv" else []
    for name in ("own_gsm", "own_rolling"):
        command = [*overrides_of(workplace, tasks, tmp_path, name, method), *more, "limit=0.5"]
        assert run_config(compose_config(command)) == 0
    found = outcomes(tmp_path)
    assert found["own_gsm"][0]["n"] == 4 and found["own_rolling"][0]["n"] == 3  # rounded up, as in lm-eval
    for result, _ in found.values():
        assert 0 < result["savings"]["kv_bytes"] <= result["savings"]["kv_bytes_mha"]


@pytest.mark.parametrize("group", ["own_items", "own_tasks"])
def test_the_scores_of_a_group_are_those_of_plain_lm_eval(workplace, tasks, tmp_path, group, capsys, monkeypatch):
    monkeypatch.delenv(ONE_PROCESS)
    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a process with threads is forked"))
    command = overrides_of(workplace, tasks, tmp_path, group)
    config = compose_config([*command, "task.metric=acc", "limit=0.6"])
    assert run_config(config) == 0 and ONE_PROCESS not in os.environ
    monkeypatch.setenv(ONE_PROCESS, "1")
    results = [result for result, _ in outcomes(tmp_path).values()]
    for result in results:
        result["seconds"] = 1.0
    found = group_result(config.task, results)
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(workplace / "small"), batch_size=BATCH,
              tokenizer=AutoTokenizer.from_pretrained(workplace / "small"))  # fmt: skip
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    plain = lm_eval.simple_evaluate(model=lm, tasks=[group], task_manager=manager, limit=config.limit)["groups"][group]
    assert found["metrics"] == {"acc": plain["acc,none"]} and found["stderr"] == {"acc": plain["acc_stderr,none"]}
    assert f"{group} (group)" in capsys.readouterr().out


def test_the_filters_of_a_metric_are_shown_and_stored_each(workplace, tasks, tmp_path, capsys):
    command = overrides_of(workplace, tasks, tmp_path, "own_gsm")
    assert run_config(compose_config([*command, "task.metric='exact_match,last'"])) == 0
    (result, items), output = outcomes(tmp_path)["own_gsm"], capsys.readouterr().out
    assert result["metric"] == "exact_match,last"
    for label in ("first", "last"):
        assert f"own_gsm ({label})" in output
        assert result["metrics"][f"exact_match,{label}"] == items[f"exact_match,{label}"].mean()


def test_a_rolling_item_has_its_own_perplexity(workplace, tasks, tmp_path):
    assert run_config(compose_config(overrides_of(workplace, tasks, tmp_path, "own_rolling"))) == 0
    _, items = outcomes(tmp_path)["own_rolling"]
    sizes = [len(json.loads(line)["page"].encode()) for line in (tasks / "own_rolling.jsonl").read_text().splitlines()]
    for item, size in zip(items.to_dict("records"), sizes, strict=True):
        assert item["bits_per_byte"] == pytest.approx(-item["loglikelihoods"][0] / size / 0.6931471805599453)


def test_an_automatic_batch_fits_in_half_of_the_free_memory(workplace, monkeypatch):
    """A row of a token: its logits in three forms, the cache and activations, by hand; half of the machine's memory."""
    model, length = AutoModelForCausalLM.from_pretrained(workplace / "small"), 50
    weights = sum(weight.numel() * 4 for weight in model.parameters())
    config = model.config
    cache = 2 * 2 * config.num_hidden_layers * config.hidden_size * 4
    activations = 4 * (config.hidden_size + config.intermediate_size) * 4
    row = length * (config.vocab_size * (4 + 8) + cache + activations)
    free = {"SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", free.__getitem__)
    for rows, size in ((0.5, 1), (1, 1), (3.9, 2), (4, 4), (63, 32), (64, 64), (1000, 64)):
        free["SC_PHYS_PAGES"] = 2 * (weights + math.ceil(2 * rows * row))
        assert auto_batch_size(model, length) == size
    assert auto_batch_size(model, 20 * length) == 32  # of 50 that fit


def test_an_automatic_batch_size_is_that_of_the_longest_row(workplace, tasks, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("experiments.evaluation.lm.auto_batch_size", lambda model, length: asked.append(length) or 2)
    for size in ("auto", "2"):
        command = overrides_of(workplace, tasks, tmp_path / size, "own_choice")
        assert run_config(compose_config([*command, f"batch_size={size}", "limit=3"])) == 0
    auto, fixed = (outcomes(tmp_path / size)["own_choice"] for size in ("auto", "2"))
    assert auto[0]["metrics"] == fixed[0]["metrics"] and len(asked) == 1
    assert list(map(list, auto[1].loglikelihoods)) == list(map(list, fixed[1].loglikelihoods))


def test_a_tag_is_its_tasks_and_a_user_overrides_parts_of_a_definition(workplace, tasks, tmp_path):
    command = overrides_of(workplace, tasks, tmp_path, "own_tag")
    assert run_config(compose_config([*command, "limit=2"])) == 0
    assert set(outcomes(tmp_path)) == {"own_choice", "own_loglikelihood"}
    command = overrides_of(workplace, tasks, tmp_path / "short", "own_gsm")
    assert run_config(compose_config([*command, "task.overrides={generation_kwargs:{max_gen_toks:1}}"])) == 0
    _, items = outcomes(tmp_path / "short")["own_gsm"]
    assert max(len(said[0].split()) for said in items.responses) == 1


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (["task.name=own_gms"], 2, "unknown task 'own_gms' (did you mean own_gsm"),
        (["task.name=own_choice", "task.metric=f1"], 2, "task 'own_choice' has no metric 'f1'; valid: acc, acc_norm"),
        (["task.name=own_gsm", "task.overrides={oops:3}"], 2, "key in the definition of task 'own_gsm': 'oops'; valid"),
        (["task.name=own_gsm", "task.overrides={generation_kwargs:{oops:3}}"], 2, "kwargs has the key 'oops'; valid"),
        (["task.name=odd"], 2, "task 'odd' has output_type 'sung'; valid: loglikelihood, loglikelihood_rolling"),
        (["task.name=own_choice", "task.apply_chat_template=true"], 1, "tokenizer has no chat template"),
        (["task.name=own_gsm", "task.overrides={generation_kwargs:{max_gen_toks:256}}"], 1, "the model has 256 pos"),
        (["task.name=own_gsm", "task.overrides={num_fewshot:0}", "task.num_fewshot=1"], 1, "with num_fewshot 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(
    workplace, tasks, tmp_path, monkeypatch, capsys, settings, code, said
):
    (tasks / "odd.yaml").write_text("task: odd\noutput_type: sung\ndataset_path: json\ntest_split: test\n")
    monkeypatch.setattr("experiments.runs.registry.built_in", dict)
    monkeypatch.setattr("experiments.evaluation.accuracy.load_model", lambda source: pytest.fail("loaded"))
    assert run_config(compose_config([*overrides_of(workplace, tasks, tmp_path, "x"), *settings])) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_chat_template_changes_the_prompts_as_in_plain_lm_eval(workplace, tasks, tmp_path):
    folder = tmp_path / "chat"
    model = AutoModelForCausalLM.from_pretrained(workplace / "small")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "small")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} . {{ m.content }} , {% endfor %}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [*overrides_of(workplace, tasks, tmp_path / "results", "own_choice"), f"model.path={folder}"]
    assert run_config(compose_config([*command, "task.apply_chat_template=true"])) == 0
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=BATCH), tasks=["own_choice"],
        task_manager=manager, apply_chat_template=True, log_samples=True,
    )  # fmt: skip
    _, items = outcomes(tmp_path / "results")["own_choice"]
    expected = [[nats for ((nats, _),) in sample["resps"]] for sample in theirs["samples"]["own_choice"]]
    assert [list(values) for values in items.loglikelihoods] == expected


def test_few_shot_examples_come_from_a_local_file(workplace, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    lines = (workplace / "data" / "micro_piqa.jsonl").read_text().splitlines(keepends=True)
    (data / "micro_piqa.jsonl").write_text("".join(lines[:6]))
    command = [
        f"model.path={workplace / 'small'}", f"task.data_dir={data}", "task=micro_piqa", "method=mha", "device=cpu",
    ]  # fmt: skip
    shots = [*command, "task.num_fewshot=2", f"results_dir={tmp_path / 'two'}"]
    assert run_config(compose_config(shots)) == 1
    assert "micro_piqa_train.jsonl: No such file" in capsys.readouterr().err
    (data / "micro_piqa_train.jsonl").write_text("".join(lines[6:]))
    assert run_config(compose_config(shots)) == 0
    assert run_config(compose_config([*command, f"results_dir={tmp_path / 'none'}"])) == 0
    two, none = (outcomes(tmp_path / name)["micro_piqa"] for name in ("two", "none"))
    assert two[0]["run_id"] != none[0]["run_id"]
    assert list(two[1].loglikelihoods[0]) != list(none[1].loglikelihoods[0])


def test_a_registered_task_takes_its_splits_from_a_local_folder(workplace, tmp_path, monkeypatch):
    """gsm8k itself, as lm-eval defines it, with files in place of the hub."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"question": text, "answer": f"{text} #### 3"} for text in texts(6, 4)]
        (data / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = lm_eval.__path__[0] + "/tasks/gsm8k"
    command = [*overrides_of(workplace, definition, tmp_path / "results", "gsm8k", "chai"), f"task.data_dir={data}"]
    short = ["task.num_fewshot=2", "task.overrides={generation_kwargs:{max_gen_toks:4}}"]
    assert run_config(compose_config([*command, *short])) == 0
    ((result, items),) = outcomes(tmp_path / "results").values()
    assert set(result["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert len(items) == 6 and result["metric"] == "exact_match,strict-match"
