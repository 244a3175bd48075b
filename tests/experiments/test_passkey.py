"""Passkey tasks: the items are what they say, what is sent is what was counted, and answers are scored exactly."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments.cli import main
from experiments.config.compose import compose_config
from experiments.evaluation.lm import MethodLM
from experiments.evaluation.passkey import COLUMNS, KINDS, SENTENCES, make_items
from experiments.execute import run_config
from experiments.microworld.tokenizer import build_tokenizer
from experiments.runs.resolve import run_folders
from experiments.tables.passkey import show_lengths

SMALL = ["task.lengths=[96,128]", "task.depths=[0,0.5,1]", "task.items_per_cell=2", "batch_size=3", "device=cpu"]


def words() -> PreTrainedTokenizerFast:
    """Every word and every full stop is one token."""
    return build_tokenizer()


def pieces(template: str | None = None) -> PreTrainedTokenizerFast:
    """Most words are several tokens, without special tokens at the start."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([SENTENCES[:300]], vocab_size=330, special_tokens=["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def task_of(*overrides, name="passkey"):
    return compose_config(["method=mha", f"task={name}", *SMALL, *overrides]).task


def whole(item):
    """The prompt with the beginning of its answer."""
    return f"{item['prompt']} {item['answer_prefix']}"


@pytest.mark.parametrize("key", KINDS)
def test_prompts_have_exactly_the_asked_tokens(key):
    tokenizer = words()
    items = make_items(task_of(f"task.key={key}"), tokenizer)
    assert [(item["length"], item["depth"]) for item in items[:6]] == [
        (length, depth) for length in (96, 128) for depth in (0, 0.5, 1)
    ]
    assert len(items) == 12  # every cell, then every cell again
    for item in items:
        assert item["tokens"] == item["length"] == len(tokenizer(whole(item)).input_ids)


def test_words_of_several_tokens_leave_a_small_gap_at_most():
    tokenizer = pieces()
    items = make_items(task_of("task.lengths=[300,500,900]", "task.items_per_cell=8"), tokenizer)
    gaps = [item["length"] - item["tokens"] for item in items]
    for item in items:
        assert item["tokens"] == len(tokenizer(whole(item)).input_ids)
    most = max(len(tokenizer(f" {word}").input_ids) for word in SENTENCES.split())
    assert min(gaps) == 0 and max(gaps) < most and gaps.count(0) > len(gaps) / 2


@pytest.mark.parametrize("key", KINDS)
def test_the_key_is_at_its_depth_and_nowhere_else(key):
    tokenizer, kind = pieces(), KINDS[key]
    task = task_of("task.lengths=[700]", "task.depths=[0,0.25,0.5,0.75,1]", f"task.key={key}")
    longest = max(map(len, re.split(r"(?<=\.) ", SENTENCES)))
    for item in make_items(task, tokenizer):
        ids = tokenizer(item["prompt"]).input_ids
        before, after = tokenizer.decode(ids[: item["key_at"]]), tokenizer.decode(ids[item["key_at"] :])
        opening = kind.statement.partition("{")[0] or item["answer_prefix"].partition(" ")[0]
        assert after.lstrip().startswith(opening) and item["key"] not in before
        assert item["prompt"].count(item["key"]) == kind.statement.count("{key}")
        # The rest is one piece of the filler, read in a circle, which ends with a sentence.
        body = item["prompt"].removeprefix(kind.instruction).partition(f"\n\n{kind.question.partition('{')[0]}")[0]
        statement = kind.statement
        for name in re.findall(r"\{(\w+)\}", kind.statement):
            statement = statement.replace(f"{{{name}}}", r"[\w ]+" if name == "key" else r"\w+")
        left, right = re.split(statement, body.strip())
        filler = " ".join([*left.split(), *right.split()])
        assert filler in f"{SENTENCES} " * 8 and filler[-1] == "."
        assert abs(len(left) - item["depth"] * len(filler)) <= longest + 20
        assert (not left.strip()) == (item["depth"] == 0) and (not right.strip()) == (item["depth"] == 1)


def test_items_follow_from_the_seed_and_the_cell_alone():
    tokenizer = words()
    items = make_items(task_of(), tokenizer)
    assert items == make_items(task_of(), tokenizer)
    assert len({item["key"] for item in items}) == len(items)
    other = make_items(task_of("task.seed=1"), tokenizer)
    assert not {item["key"] for item in items} & {item["key"] for item in other}
    part = make_items(task_of("task.lengths=[128]", "task.depths=[1,0]"), tokenizer)
    assert all(item in items for item in part) and len(part) == 4


def test_a_text_file_is_the_filler(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Alpha beta\ngamma. Delta\n\nepsilon zeta eta. Theta iota.\n")
    item = make_items(task_of(f"task.text={path}", name="needle"), words())[0]
    found = set(item["prompt"].replace("\n", " ").split(" "))
    assert {"Alpha", "gamma.", "zeta", "iota."} <= found and "river" not in found


def watch_prompts(monkeypatch):
    """Number of real tokens of each prompt that goes into ``generate``."""
    seen, generate = [], MethodLM._model_generate

    def watched(self, context, *rest, attention_mask, **more):
        seen.extend(attention_mask.sum(1).tolist())
        return generate(self, context, *rest, attention_mask=attention_mask, **more)

    monkeypatch.setattr(MethodLM, "_model_generate", watched)
    return seen


def command(workplace, results, *more, method="mha", name="passkey"):
    settings = ["method.clusters=2"] if method in ("chai", "random") else []
    model = f"model.path={workplace / 'small'}"
    return [f"results_dir={results}", model, f"method={method}", f"task={name}", *settings, *SMALL, *more]


def outcome(results):
    """Result without what is about one attempt alone, and items."""
    (path,) = results.rglob("result.json")
    result = json.loads(path.read_text())
    samples = pd.read_parquet(path.with_name("samples.parquet"))
    return {key: value for key, value in result.items() if key not in ("seconds", "resumed")}, samples


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"])
def test_what_is_sent_is_what_was_counted(workplace, tmp_path, monkeypatch, template):
    seen, more = watch_prompts(monkeypatch), []
    if template:
        AutoModelForCausalLM.from_pretrained(workplace / "small").save_pretrained(tmp_path / "chat")
        tokenizer = words()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "chat")
        more = [f"model.path={tmp_path / 'chat'}", "task.apply_chat_template=true"]
    assert run_config(compose_config([*command(workplace, tmp_path / "results"), *more])) == 0
    _, samples = outcome(tmp_path / "results")
    assert sorted(seen) == sorted(samples.tokens)
    assert set(COLUMNS) <= set(samples.columns) and (samples.tokens == samples.length).all()


ANSWERS = {
    "digits": [("{key}", 1), (" {key}. The", 1), (" is {key}", 1), ("{key}7", 0), (" 12345 {key}", 0), ("", 0)],
    "word": [(" {key}.", 1), ("{key}", 1), (" {key}s", 0), ("the {key}", 0), (" 12", 0), (" {key} x", 1)],
    "sentence": [(" {key}.", 1), ("{key}, and", 1), (" {key} x", 0), ("the {key}", 0), ("", 0), (" {key}", 1)],
}


@pytest.mark.parametrize("key", KINDS)
def test_answers_are_scored_by_exact_match_of_the_key(workplace, tmp_path, monkeypatch, key):
    keys = {whole(item): item["key"] for item in make_items(task_of(f"task.key={key}"), words())}
    expected, generate = {}, HFLM.generate_until

    def planted(self, requests, disable_tqdm=False):
        generate(self, requests, disable_tqdm)
        said = []
        for request in requests:
            answer, right = ANSWERS[key][len(expected) % len(ANSWERS[key])]
            said.append(answer.format(key=keys[request.args[0]]) + " " * len(expected))  # tells the items apart
            expected[said[-1]] = right
        return said

    monkeypatch.setattr(HFLM, "generate_until", planted)
    assert run_config(compose_config([*command(workplace, tmp_path), f"task.key={key}"])) == 0
    result, samples = outcome(tmp_path)
    assert samples.exact_match.tolist() == [expected[response] for (response,) in samples.responses]
    assert result["metrics"]["exact_match"] == sum(expected.values()) / 12 and len(expected) == 12


@pytest.mark.parametrize("method", ["mha", "chai"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(workplace, tmp_path, saves, method):
    assert run_config(compose_config(command(workplace, tmp_path / "whole", method=method))) == 0
    total, saves.limit = saves.count, 2
    saves.count = 0
    cut = compose_config(command(workplace, tmp_path / "cut", method=method))
    with pytest.raises(SystemExit):
        run_config(cut)
    saves.limit = None
    assert run_config(cut) == 0
    assert saves.count == total == 4  # no batch twice
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    assert found[0] == expected[0]
    pd.testing.assert_frame_equal(found[1], expected[1], check_exact=True)


def test_the_table_has_all_methods_by_length(workplace, tmp_path, capsys):
    for method in ("mha", "chai"):
        assert run_config(compose_config(command(workplace, tmp_path, method=method))) == 0
    for path in tmp_path.rglob("samples.parquet"):
        samples = pd.read_parquet(path)
        samples["exact_match"] = ((samples.length == 96) & ("mha" in path.parts)).astype(float)
        samples.to_parquet(path)
    capsys.readouterr()
    show_lengths([path.parent for path in tmp_path.rglob("result.json")], tmp_path)
    output = capsys.readouterr().out
    assert output.count("passkey on small") == 1
    rows = {line.split()[0]: line.split()[1:3] for line in output.splitlines() if line.strip()}
    assert rows["Method"] == ["96", "128"] and rows["mha"] == ["100", "0"] and rows["chai"] == ["0", "0"]


def test_runs_of_one_method_are_told_apart_by_what_differs(workplace, tmp_path, capsys):
    for tokens in (5, 7):
        more = [f"method.tokens={tokens}", "limit=2"]
        assert run_config(compose_config(command(workplace, tmp_path, *more, method="chai"))) == 0
    output = capsys.readouterr().out.rpartition("keys found")[2]
    names = [line.split()[:2] for line in output.splitlines() if line.split()[:1] == ["chai"]]
    assert names == [["chai", "tokens=5"], ["chai", "tokens=7"]]


def test_another_task_has_no_such_table(workplace, tmp_path, capsys):
    overrides = ["method=mha", f"model.path={workplace / 'small'}", f"task.data_dir={workplace / 'data'}"]
    assert run_config(compose_config([*overrides, "task=micro_piqa", "limit=2", f"results_dir={tmp_path}"])) == 0
    assert "keys found" not in capsys.readouterr().out


def test_every_setting_is_part_of_the_identity(tmp_path):
    def folder(*overrides):
        (single,) = run_folders(compose_config(["method=mha", *overrides]))
        return single.path

    changes = [
        (), ("task.lengths=[512]",), ("task.depths=[0,1]",), ("task.items_per_cell=2",), ("task.seed=1",),
        ("task.key=word",), ("task.filler=python_code",), ("task.apply_chat_template=true",),
    ]  # fmt: skip
    found = {folder("task=passkey", *change) for change in changes}
    assert len(found) == len(changes)
    assert folder("task=passkey", "task.depths=[0,0.25,0.5,0.75,1.0]") == folder("task=passkey")
    texts = [tmp_path / name for name in ("one.txt", "same.txt", "other.txt")]
    for path, text in zip(texts, ("A text.", "A text.", "Another text."), strict=True):
        path.write_text(text)
    one, same, other = (folder("task=needle", f"task.text={path}") for path in texts)
    assert one == same != other
    assert one == folder("task=needle", f"task.text={texts[0]}", "task.filler=sentences")  # without effect


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task.lengths=[]"], "task.lengths is []; valid: different numbers of tokens, 1 or more"),
        (["task.lengths=[512,512]"], "task.lengths is [512, 512]; valid"),
        (["task.lengths=[0]"], "task.lengths is [0]; valid"),
        (["task.lengths=512"], "task.lengths"),
        (["task.depths=[1.5]"], "task.depths is [1.5]; valid: different numbers from 0 to 1"),
        (["task.items_per_cell=0"], "task.items_per_cell is 0; valid: 1 or more"),
        (["task.items_per_cell=null"], "task.items_per_cell is null; valid: 1 or more"),
        (["task.seed=-1"], "task.seed is -1; valid: 0 or more"),
        (["task.key=number"], "task.key is number; valid: digits, word, sentence"),
        (["task.filler=wiki"], "task.filler is wiki; valid: sentences, python_docs, python_code"),
        (["task.data_dir=/tmp"], "task.data_dir has no effect with task=passkey, which is made here; valid: task.key"),
        (["task=piqa", "task.lengths=[4]"], "task.lengths is for tasks with a hidden key; valid with it: task=passkey"),
    ],
)
def test_impossible_settings_are_one_line(tmp_path, capsys, overrides, said):
    assert main(["method=mha", "task=passkey", *overrides, f"results_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["task.lengths=[96,250]"],
            "task 'passkey' has prompts of 250 tokens and generates 8, and the model has 256 positions; valid: "
            "task.lengths up to 248",
        ),
        (["task.lengths=[96,40]"], "the key and the question alone take 5"),
        (["task.text=/nowhere/text.txt"], "cannot read /nowhere/text.txt: No such file or directory"),
        (["task.apply_chat_template=true"], "tokenizer has no chat template"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_weights_are_loaded(
    workplace, tmp_path, monkeypatch, capsys, overrides, said
):
    monkeypatch.setattr("experiments.evaluation.accuracy.load_model", lambda source: pytest.fail("loaded"))
    assert run_config(compose_config([*command(workplace, tmp_path), *overrides])) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_group_cannot_set_examples_for_it(workplace, tmp_path, capsys):
    config = compose_config(command(workplace, tmp_path))
    config.task.num_fewshot = 2  # as a group with task.num_fewshot=2 does
    assert run_config(config) == 1
    assert "task 'passkey' is defined with num_fewshot 0" in capsys.readouterr().err


def test_the_longest_prompt_that_fits_is_scored(workplace, tmp_path):
    more = ["task.lengths=[248]", "task.depths=[0.5]", "task.items_per_cell=1"]
    assert run_config(compose_config([*command(workplace, tmp_path), *more])) == 0
    _, samples = outcome(tmp_path)
    assert samples.tokens.tolist() == [248]


def test_an_empty_text_is_refused(workplace, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    more = [f"task.text={tmp_path / 'empty.txt'}"]
    assert run_config(compose_config([*command(workplace, tmp_path / "results"), *more])) == 1
    assert "empty.txt has no words" in capsys.readouterr().err
