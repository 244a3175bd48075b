"""Training DejaVu's predictors: end to end, resumed, refused; and the one that comes with the embedded model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from chai.loading import load_model
from chai.offline.predictor import load_predictor
from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.execute import run_config
from experiments.microworld.items import write_tasks
from experiments.microworld.tokenizer import build_tokenizer, vocabulary
from experiments.offline import train_dejavu
from experiments.runs.identity import run_id
from experiments.runs.model import model_source

SHAPE = {"vocab_size": len(vocabulary()), "max_position_embeddings": 256, "num_hidden_layers": 2, "hidden_size": 32,
         "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
SMALL = [
    "experiment=train_dejavu", "device=cpu", "experiment.steps=12", "experiment.batch_size=2",
    "experiment.sequence_length=16", "experiment.bottleneck=8", "experiment.held_out=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A LLaMA and an OPT model with the embedded tokenizer, a corpus of its words, and a few items of a task."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=48)).save_pretrained(folder / "small")
    OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32)).save_pretrained(folder / "opt")
    LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=48)).save_pretrained(folder / "twin")
    for name in ("small", "opt", "twin"):
        build_tokenizer().save_pretrained(folder / name)
    words = list(vocabulary())[10:40]
    lines = [json.dumps({"words": " ".join(words[start:] + words[:start])}) for start in range(30)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    write_tasks(folder / "data", count=6)
    return folder


def command(workplace, results, *overrides, model="small"):
    corpus = [f"experiment.corpus={workplace / 'corpus.jsonl'}", "experiment.column=words"]
    return [*SMALL, f"results_dir={results}", f"model.path={workplace / model}", *corpus, *overrides]


def predictor_of(results):
    (path,) = results.glob("train_dejavu/*/dejavu/none/*/predictor")
    return path


def test_trained_then_used_then_refused_for_another_model(workplace, tmp_path, capfd):
    assert run_config(compose_config(command(workplace, tmp_path))) == 0
    path = predictor_of(tmp_path)
    result = json.loads((path.parent / "result.json").read_text())
    assert set(result["metrics"]) == {"loss", "recall_10", "recall_30", "recall_50"}
    assert result["n"] == 2 * 2 * 16
    assert sorted(entry.name for entry in path.iterdir()) == ["predictor.json", "predictor.safetensors"]
    assert not list(path.parent.glob("checkpoint*"))
    assert run_config(compose_config(command(workplace, tmp_path))) == 0
    shown = capfd.readouterr().out
    assert "already complete" in shown
    assert "method.predictor=" in shown
    score = [f"results_dir={tmp_path}", "method=dejavu", "task=micro_piqa", f"task.data_dir={workplace / 'data'}"]
    score.append(f"method.predictor={path}")
    assert run_config(compose_config([*score, f"model.path={workplace / 'small'}"])) == 0
    (found,) = tmp_path.glob("accuracy/small/dejavu/micro_piqa/*/result.json")
    savings = json.loads(found.read_text())["savings"]
    assert savings["kind"] == "simulated"
    assert savings["kv_bytes"] == savings["kv_bytes_mha"]
    assert savings["heads_kept"] == [2, 2]
    capfd.readouterr()
    for model, message in (("twin", "same shape with other weights"), ("opt", "model_type=llama, this one has opt")):
        assert run_config(compose_config([*score, f"model.path={workplace / model}"])) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0] and "experiment=train_dejavu" in errors[0]
    assert len(list(tmp_path.glob("accuracy/*"))) == 1  # nothing written of the refused


def test_a_stopped_training_goes_on_where_it_was(workplace, tmp_path, monkeypatch):
    assert run_config(compose_config(command(workplace, tmp_path / "whole"))) == 0
    original, calls = train_dejavu.prediction_loss, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*args)

    overrides = command(workplace, tmp_path / "cut", "experiment.checkpoint_every=5")
    with monkeypatch.context() as patch:
        patch.setattr(train_dejavu, "prediction_loss", stopped)
        with pytest.raises(SystemExit):
            run_config(compose_config(overrides))
    (checkpoint,) = (tmp_path / "cut").rglob("checkpoint.pt")
    assert json.loads(checkpoint.with_name("status.json").read_text())["error"] == "interrupted"
    steps = []
    monkeypatch.setattr(train_dejavu, "prediction_loss", lambda *args: steps.append(1) or original(*args))
    assert run_config(compose_config(overrides)) == 0
    assert len(steps) == 12 - 5 + 2  # the steps from the checkpoint on, then the held-out batches
    whole, cut = (load_file(predictor_of(tmp_path / name) / "predictor.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_training_learns_which_heads_matter(tmp_path):
    """On the embedded model a short training already finds clearly more top heads than chance does."""
    overrides = [*SMALL, f"results_dir={tmp_path}", "experiment.steps=60", "experiment.batch_size=4"]
    assert run_config(compose_config(overrides)) == 0
    metrics = json.loads((predictor_of(tmp_path).parent / "result.json").read_text())["metrics"]
    assert metrics["recall_50"] > 0.6
    assert metrics["recall_10"] > metrics["recall_30"] > metrics["recall_50"]


def test_neurons_of_an_opt_model(workplace, tmp_path):
    overrides = command(workplace, tmp_path, "experiment.mlp=true", "experiment.mlp_bottleneck=4", model="opt")
    assert run_config(compose_config(overrides)) == 0
    predictor = load_predictor(predictor_of(tmp_path))
    assert [network.up.out_features for network in predictor.neurons] == [48, 48]


def test_the_embedded_models_predictor_is_its_own():
    """It fits the weights in the repository, and stays small."""
    config = compose_config(["method=dejavu", "device=cpu"])
    load_predictor(train_dejavu.INSTALLED).check_model(load_model(model_source(config)))
    assert sum(path.stat().st_size for path in train_dejavu.INSTALLED.iterdir()) < 200_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment.corpus=null"], "a JSONL file with a column 'words'"),
        (["experiment.install=true"], "valid for that model alone"),
        (["experiment.mlp=true"], "needs a model with ReLU; this one has silu"),
        (["experiment.steps=0"], "steps is 0; valid: 1 or more"),
        (["experiment.sparsities=[0.5,1.5]"], "a list of numbers between 0 and 1"),
        (["experiment.learning_rate=0"], "learning_rate is 0; valid: above 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_writes_nothing(workplace, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match="experiment|model") as error:
        train_dejavu.run(compose_config(command(workplace, tmp_path, *overrides)))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_corpus_that_is_missing_or_too_short_is_one_line(workplace, tmp_path, capfd):
    for overrides, message in (
        (["experiment.corpus=nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["experiment.column=text"], "has no text; expected columns: text"),
        (["experiment.held_out=100"], "required are"),
    ):
        assert run_config(compose_config(command(workplace, tmp_path, *overrides))) == 1
        errors = capfd.readouterr().err
        assert message in errors
        assert "Traceback" not in errors


def test_a_predictor_counts_by_what_it_holds(tmp_path):
    """The same files elsewhere are the same run; other files in the same place are another."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictor.json").write_text("{}")

    def identity(name):
        return run_id(compose_config(["method=dejavu", f"method.predictor={name}"]))

    assert identity(tmp_path / "here") == identity(tmp_path / "there")
    (tmp_path / "there" / "predictor.json").write_text('{"other": 1}')
    assert identity(tmp_path / "here") != identity(tmp_path / "there")
    assert len({identity("oracle"), identity("nowhere"), identity(tmp_path / "here")}) == 3
