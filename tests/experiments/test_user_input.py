"""Input that users give: right, or refused in one line that names the place and what is valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from chai.loading import ModelSource, load_model
from chai.methods import Mha
from experiments.cli import main
from experiments.config.aliases import quote_home
from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.config.validate import check_overrides
from experiments.evaluation import savings
from experiments.evaluation.tasks import build_task
from experiments.offline.corpus import file_batches
from experiments.runs.folder import RunError
from experiments.runs.jsonl import read_jsonl
from tests.models import FAMILIES as MODELS

ITEMS = [{"goal": f"to {letter}", "sol1": "b c", "sol2": "d", "label": 0} for letter in "abcd"]


def write_items(folder, items):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    (folder / "piqa_validation.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def piqa(folder):
    return compose_config(["method=mha", "task=piqa", f"task.data_dir={folder}"]).task


# Items.


def test_unicode_line_separators_are_part_of_an_item(tmp_path):
    items = [{**item, "goal": "before\u2028middle\u2029and\x85after"} for item in ITEMS]
    (path,) = write_items(tmp_path / "data", items).iterdir()
    assert list(read_jsonl(path, ["goal"])) == items
    (data,) = build_task(piqa(path.parent))["custom_dataset"]().values()
    assert data["goal"][:] == [item["goal"] for item in items]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", None, "line 3: 'label' is null; valid: a value"),
        ("label", "a", """line 3: 'label' is text \\("a"\\), in line 1 a number; valid: one type"""),
        ("label", -1, "line 3: 'label' is -1, a hidden label"),
        ("label", "", "line 3: 'label' is text"),
        ("goal", ["a"], "line 3: 'goal' is a list of text .*, in line 1 text"),
        ("more", 1, "line 4: 'more' is text .*, in line 3 a number"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named_by_its_line(tmp_path, column, value, message):
    items = [dict(item) for item in ITEMS]
    items[2][column] = value
    items[3].setdefault("more", "text")
    with pytest.raises(RunError, match=message):
        build_task(piqa(write_items(tmp_path / "data", items)))


def test_the_file_of_a_corpus_is_not_called_the_tasks(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"other": "text"}\n')
    with pytest.raises(RunError, match=r"corpus.jsonl, line 1, has no text; expected columns: text$"):
        file_batches(path, "text", None, 0, 1, 8, 1)


# A metric that the task does not have.


def test_a_metric_that_the_task_does_not_have_is_a_failure_before_the_model_is_loaded(
    workplace, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("experiments.evaluation.accuracy.load_both", pytest.fail)
    arguments = [f"results_dir={tmp_path}", f"model.path={workplace / 'small'}", "task=micro_boolq", "method=mha"]
    assert main([*arguments, "task.metric=acc_norm"]) == 1
    assert "error: task 'micro_boolq' has no metric 'acc_norm'; valid: acc" in capsys.readouterr().err
    (status,) = tmp_path.rglob("status.json")
    assert json.loads(status.read_text())["state"] == "failed"
    assert not list(tmp_path.rglob("result.json"))


# Models.


def write_tokenizer(folder, **special):
    alphabet = [*map(chr, range(33, 127)), "Ġ"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def small_llama():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path, capsys):
    small_llama().save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    data = write_items(tmp_path / "data", ITEMS)
    code = main(["method=mha", "task=piqa", f"model.path={tmp_path / 'model'}", f"task.data_dir={data}",
                 f"results_dir={tmp_path / 'results'}"])  # fmt: skip
    assert code == 1
    assert "has neither a bos_token nor an eos_token" in capsys.readouterr().err


OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=256)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_multi_head_attention_is_scored_on_families_without_clustering(family, tmp_path):
    model = OTHERS[family]()
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", eos_token="!")
    data = write_items(tmp_path / "data", ITEMS)
    arguments = ["task=piqa", f"model.path={tmp_path / 'model'}", f"task.data_dir={data}"]
    assert main([*arguments, "method=mha", f"results_dir={tmp_path / 'results'}"]) == 0
    (path,) = (tmp_path / "results").rglob("result.json")
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "ln" not in name]
    entries = sum(weight.numel() for weight in matrices)  # without the embeddings, but with the tied output matrix
    entries -= model.transformer.wpe.weight.numel() if family == "gpt2" else 0
    layers = entries - model.get_output_embeddings().weight.numel()
    tokens, width, count = savings.PROMPT_TOKENS, 32, 2
    scored = 2 * 2 * width * count * tokens * (tokens + 1) // 2
    expected = 2 * layers * tokens + scored + 2 * model.get_output_embeddings().weight.numel()
    assert json.loads(path.read_text())["flops"] == {"tokens": tokens, "method": expected, "mha": expected}


def test_operations_of_an_unknown_layout_are_unknown(monkeypatch):
    model = MODELS["llama"]()
    assert savings.count_flops(Mha(), model)["mha"] > 0
    monkeypatch.setattr(model.config, "kv_lora_rank", 16, raising=False)
    assert savings.count_flops(Mha(), model) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_auto_is_that_of_the_weights(tmp_path, dtype):
    """A config.json without a dtype, as of models that were converted by hand."""
    small_llama().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(ModelSource("small", path=str(tmp_path), device="cpu")).dtype == getattr(torch, dtype)
    explicit = ModelSource("small", path=str(tmp_path), device="cpu", dtype="bfloat16")
    assert load_model(explicit).dtype == torch.bfloat16


# Paths.


def test_a_home_folder_is_expanded_quoted_or_not():
    home = Path("~").expanduser()
    for value in ("~/x", "'~/x'"):
        overrides = quote_home(["method=mha", "task=piqa", f"model.path={value}", f"results_dir={value}"])
        check_overrides(overrides)
        config = compose_config(overrides)
        assert config.model.path == config.results_dir == str(home / "x")
    assert quote_home(["model.path=~/x,~/y", "limit=3"]) == ["model.path='~/x','~/y'", "limit=3"]
    assert quote_home(["x=[~/a,~/b]", "x={a:~/a,b:~}", "x=~/a]", "x='[~/a,~/b]'"]) == [
        "x=['~/a','~/b']", "x={a:'~/a',b:'~'}", "x='~/a']", "x='[~/a,~/b]'",
    ]  # fmt: skip
    task = compose_config(quote_home(["task=lm_eval", "task.name=x", "task.include_path=~/x"])).task
    assert task.include_path == str(home / "x")
    assert compose_config(["task=piqa", "task.fewshot_file='~/x'"]).task.fewshot_file == str(home / "x")
    assert quote_home(["~method", "model.path=/a~/b", "task.data_dir=a~b"]) == [
        "~method", "model.path=/a~/b", "task.data_dir=a~b",
    ]  # fmt: skip


def test_a_value_that_needs_quotes_says_so():
    with pytest.raises(ConfigError, match=r"special characters in two pairs of quotes: .model.path='/data/my model"):
        check_overrides(["model.path=/a b (c)"])
