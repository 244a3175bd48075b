"""Training DejaVu's predictors: end to end, resumed, refused; and the one that comes with the embedded model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from chai.loading import load_model
from chai.methods.dejavu import num_kept
from chai.offline.predictor import BottleneckNetwork, Predictor, load_predictor
from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.config.validate import check_overrides
from experiments.execute import run_config
from experiments.microworld.items import write_tasks
from experiments.microworld.tokenizer import build_tokenizer, vocabulary
from experiments.offline import predictor_training, train_dejavu
from experiments.offline.predictor_training import NetworkTraining, RecallCounter, Recipe, weighted_loss
from experiments.runs.identity import run_id
from experiments.runs.model import model_source

SHAPE = {"vocab_size": len(vocabulary()), "max_position_embeddings": 256, "num_hidden_layers": 2, "hidden_size": 32,
         "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
SMALL = [
    "experiment=train_dejavu", "device=cpu", "experiment.steps=12", "experiment.batch_size=2",
    "experiment.sequence_length=16", "experiment.bottleneck=8", "experiment.held_out=2", "experiment.validation=2",
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
    assert set(result["metrics"]) == {"recall_10", "recall_30", "recall_50"}
    record = json.loads((path / "predictor.json").read_text())
    for saved in (result, record):
        by_layer = saved["recall"]["heads"]["0.5"]
        assert len(by_layer) == 2 and sum(by_layer) / 2 == pytest.approx(saved["metrics"]["recall_50"], abs=1e-4)
        assert [[step for step, _ in curve] for curve in saved["curves"]["heads"].values()] == [[12], [12]]
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
    scored = json.loads(found.read_text())
    assert scored["predictor"]["heads"]["recall"] == pytest.approx(record["metrics"]["recall_50"], abs=1e-4)
    output = " ".join(capfd.readouterr().out.split())
    assert f"predictor recall {record['metrics']['recall_50']:.2f} at 50 %" in output  # before the run
    assert "recall of heads at 50 %" in output  # below its table
    savings = scored["savings"]
    assert savings["kind"] == "simulated"
    assert savings["kv_bytes"] == savings["kv_bytes_mha"]
    assert savings["heads_kept"] == [2, 2]
    capfd.readouterr()
    for model, message in (("twin", "same shape with other weights"), ("opt", "model_type=llama, this one has opt")):
        assert run_config(compose_config([*score, f"model.path={workplace / model}"])) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0] and "experiment=train_dejavu" in errors[0]
    assert len(list(tmp_path.glob("accuracy/*"))) == 1  # nothing written of the refused


@pytest.mark.parametrize("when", ["before any network has stopped", "after some have"])
def test_a_stopped_training_goes_on_where_it_was(workplace, tmp_path, monkeypatch, when):
    """Bit-equal to one that was never stopped, before and after some of the networks have stopped by themselves."""
    common = ["experiment.steps=20", "experiment.evaluate_every=1", "experiment.patience=2"]
    common += ["experiment.learning_rate=0.05", "experiment.mlp=true", "experiment.mlp_bottleneck=4"]
    whole = command(workplace, tmp_path / "whole", *common, model="opt")
    assert run_config(compose_config(whole)) == 0
    record = json.loads((predictor_of(tmp_path / "whole") / "predictor.json").read_text())
    ends = [curve[-1][0] for part in record["curves"].values() for curve in part.values()]
    stop_at = min(ends) if when.startswith("before") else max(ends)
    resumed_from = (stop_at - 1) // 2 * 2
    assert len(ends) == 4 and resumed_from > 0
    assert (resumed_from < min(ends)) if when.startswith("before") else (min(ends) <= resumed_from < max(ends))
    original, steps = train_dejavu.train_step, []

    def stopped(*args):
        steps.append(args)
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        return original(*args)

    overrides = command(workplace, tmp_path / "cut", *common, "experiment.checkpoint_every=2", model="opt")
    with monkeypatch.context() as patch:
        patch.setattr(train_dejavu, "train_step", stopped)
        with pytest.raises(SystemExit):
            run_config(compose_config(overrides))
    (checkpoint,) = (tmp_path / "cut").rglob("checkpoint.pt")
    assert json.loads(checkpoint.with_name("status.json").read_text())["error"] == "interrupted"
    steps.clear()
    monkeypatch.setattr(train_dejavu, "train_step", lambda *args: steps.append(1) or original(*args))
    assert run_config(compose_config(overrides)) == 0
    assert len(steps) == max(ends) - resumed_from  # from the last checkpoint to the end of the last network
    first, second = (load_file(predictor_of(tmp_path / name) / "predictor.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = json.loads((predictor_of(tmp_path / "cut") / "predictor.json").read_text())
    assert (again["curves"], again["recall"]) == (record["curves"], record["recall"])


def test_a_network_stops_when_its_recall_is_flat_and_keeps_its_best_weights():
    torch.manual_seed(0)
    training = NetworkTraining(BottleneckNetwork(4, 4, 6), Recipe("heads", [0.5], 0.1, patience=3))
    best = None
    for step, recall in enumerate([0.5, 0.7, 0.6, 0.7, 0.69], 1):
        assert not training.is_finished
        training.take_step(torch.randn(5, 4), torch.rand(5, 6))
        if step == 2:
            best = {name: value.clone() for name, value in training.network.state_dict().items()}
        training.record(step, recall)
    assert training.is_finished and training.curve[-1] == [5, 0.69]
    training.restore_best()
    for name, value in training.network.state_dict().items():
        assert torch.equal(value, best[name].half().float())


def test_recall_equals_a_slow_loop():
    torch.manual_seed(0)
    sparsities, batches = [0.1, 0.5, 0.75], [(torch.randn(7, 8), torch.randn(7, 8).clamp(min=0)) for _ in range(3)]
    batches[1][1][2] = 0  # a token without any active neuron
    counter = RecallCounter(sparsities)
    for scores, importance in batches:
        counter.add(scores, importance)
    for sparsity in sparsities:
        hits = wanted = 0
        for scores, importance in batches:
            for score, true in zip(scores.tolist(), importance.tolist(), strict=True):
                keep = num_kept(8, sparsity)
                predicted = sorted(range(8), key=lambda n: (-score[n], n))[:keep]
                required = [n for n in sorted(range(8), key=lambda n: (-true[n], n))[:keep] if true[n] > 0]
                hits += len(set(predicted) & set(required))
                wanted += len(required)
        assert 0 < hits < wanted
        assert counter.recalls()[sparsity] == hits / wanted


@pytest.mark.parametrize("extra", [0.0, 0.005])
def test_negatives_weigh_as_much_as_the_share_of_positives(extra):
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 10, dtype=torch.float64), torch.rand(6, 10) < 0.3
    total, share = 0.0, labels.sum().item() / 60 + extra
    for score, label in zip(scores.flatten().tolist(), labels.flatten().tolist(), strict=True):
        probability = 1 / (1 + math.exp(-score))
        total += -math.log(probability) if label else -share * math.log(1 - probability)
    assert weighted_loss(scores, labels, extra).item() == pytest.approx(total / 60, rel=1e-12)


def test_labels_of_heads_and_neurons():
    """Heads: the top ones at each sparsity, the loss is the mean; neurons: those with a positive activation."""
    torch.manual_seed(0)
    scores, norms = torch.randn(5, 8), torch.rand(5, 8)
    expected = []
    for sparsity in (0.25, 0.5):
        labels = torch.zeros(5, 8, dtype=torch.bool)
        for token in range(5):
            for head in sorted(range(8), key=lambda h: -norms[token, h])[: round(8 * (1 - sparsity))]:
                labels[token, head] = True
        expected.append(weighted_loss(scores, labels))
    loss = Recipe("heads", [0.25, 0.5], 1e-3, 5).loss(scores, norms)
    torch.testing.assert_close(loss, (expected[0] + expected[1]) / 2)
    activations = torch.randn(5, 8).clamp(min=0)
    loss = Recipe("neurons", [0.5], 1e-3, 5).loss(scores, activations)
    torch.testing.assert_close(loss, weighted_loss(scores, activations > 0, predictor_training.NEURON_WEIGHT))


def test_training_on_each_layer_as_it_passes_is_training_on_all_of_them_afterwards():
    """The hooks neither change the model's output nor reach other networks; stopped networks are left alone."""
    model = load_model(model_source(compose_config(["device=cpu"])))
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    shape = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 16}
    predictors = []
    for _ in range(2):
        torch.manual_seed(0)
        predictors.append(Predictor(shape, 8, dense_layers=[1]))
    recipes = {"heads": Recipe("heads", [0.5], 1e-2, 5)}
    together = predictor_training.train_networks(predictors[0], recipes)
    assert [layer for _, layer in together] == [0, 2, 3]
    seen = {}
    with torch.no_grad():
        before = model(ids).logits
    predictor_training.observe(model, ids, together, lambda part, layer, *tensors: seen.update({layer: tensors}))
    active = {key: together[key] for key in (("heads", 0), ("heads", 3))}
    loss = predictor_training.train_step(model, ids, active)
    apart = predictor_training.train_networks(predictors[1], recipes)
    losses = [apart["heads", layer].take_step(*seen[layer]) for layer in (0, 3)]
    assert loss.item() == pytest.approx(sum(value.item() for value in losses) / 2)
    for (name, trained), (_, expected) in zip(
        predictors[0].state_dict().items(), predictors[1].state_dict().items(), strict=True
    ):
        assert torch.equal(trained, expected), name
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_training_learns_which_heads_matter(tmp_path):
    """On the embedded model a short training already finds clearly more top heads than chance does."""
    overrides = [*SMALL, f"results_dir={tmp_path}", "experiment.steps=60", "experiment.batch_size=4"]
    assert run_config(compose_config([*overrides, "experiment.learning_rate=0.01"])) == 0
    metrics = json.loads((predictor_of(tmp_path).parent / "result.json").read_text())["metrics"]
    assert metrics["recall_50"] > 0.6
    assert metrics["recall_10"] > metrics["recall_30"] > metrics["recall_50"]


def test_heads_and_neurons_of_an_opt_model_end_to_end(workplace, tmp_path, capfd):
    """Trained with dense layers, then used: savings, operations and recall are those of the sparse layers."""
    training = ["experiment.mlp=true", "experiment.mlp_bottleneck=4", "experiment.mlp_sparsities=[0.75]"]
    training += ["experiment.dense_layers=1", "experiment.dense_mlp_layers=1"]
    assert run_config(compose_config(command(workplace, tmp_path, *training, model="opt"))) == 0
    path = predictor_of(tmp_path)
    predictor, record = load_predictor(path), json.loads((path / "predictor.json").read_text())
    assert (list(predictor.heads), list(predictor.neurons)) == (["1"], ["0"])
    assert predictor.neurons["0"].up.out_features == 48
    assert set(record["metrics"]) == {"recall_10", "recall_30", "recall_50", "mlp_recall_75"}
    assert record["recall"]["heads"]["0.5"][0] is None and record["recall"]["neurons"]["0.75"][1] is None
    score = [f"results_dir={tmp_path}", "task=micro_piqa", f"task.data_dir={workplace / 'data'}", "device=cpu"]
    score += [f"model.path={workplace / 'opt'}", "method=dejavu", f"method.predictor={path}"]
    assert run_config(compose_config([*score, "method.mlp_sparsity=0.75"])) == 0
    assert "MLP recall" in capfd.readouterr().out
    (found,) = tmp_path.glob("accuracy/opt/dejavu/micro_piqa/*/result.json")
    result = json.loads(found.read_text())
    assert result["savings"]["heads_kept"] == [4, 2]
    assert result["predictor"]["neurons"] == {
        "sparsity": 0.75, "recall": record["metrics"]["mlp_recall_75"], "dense_layers": [1],
    }  # fmt: skip
    # One layer lacks half of W_Q, W_K, W_V, W_O and of the attention, the other three quarters of the MLP.
    tokens = result["flops"]["tokens"]
    attention = 2 * tokens * 4 * 32 * 32 // 2 + 2 * 8 * tokens * (tokens + 1) // 2 * 2 * 2
    mlp = 2 * tokens * 2 * 32 * 36
    networks = 2 * tokens * (8 * (32 + 4) + 4 * (32 + 48))
    assert result["flops"]["mha"] - result["flops"]["method"] == attention + mlp - networks
    # Layers that were not trained cannot be masked.
    assert run_config(compose_config([*score, "method.dense_layers=0"])) == 2
    assert "no network for the heads of layers [0]" in capfd.readouterr().err


def test_the_low_rank_is_that_of_the_authors_or_the_hidden_size(workplace, tmp_path):
    overrides = command(workplace, tmp_path, "experiment.mlp=true", "experiment.bottleneck=null", model="opt")
    assert run_config(compose_config(overrides)) == 0
    sizes = load_predictor(predictor_of(tmp_path)).sizes
    assert (sizes["bottleneck"], sizes["neuron_bottleneck"]) == (32, 32)
    assert train_dejavu.LOW_RANK == 1000


def test_a_model_without_cluster_counts_can_be_trained_for():
    """The default method, CHAI, needs counts; the training does not depend on it."""
    for overrides in (["experiment=train_dejavu", "model=opt66b"], ["experiment=train_dejavu", "model=qwen3_8b"]):
        check_overrides(overrides)
    with pytest.raises(ConfigError, match="defines no default cluster counts"):
        check_overrides(["model=opt66b"])


def test_settings_of_this_version_leave_the_ids_of_earlier_runs_alone():
    """At their defaults they are no part of the identity; else they are."""
    plain = run_id(compose_config(["method=dejavu", "method.predictor=oracle"]))
    assert plain == run_id(compose_config(["method=dejavu", "method.predictor=oracle", "method.dense_layers=null"]))
    for setting in ("method.dense_layers=0", "method.dense_layers=[0]", "method.dense_mlp_layers=1"):
        assert run_id(compose_config(["method=dejavu", "method.predictor=oracle", setting])) != plain


def test_the_embedded_models_predictor_is_its_own():
    """It fits the weights in the repository, has the authors' size, was trained until flat, and stays small."""
    config = compose_config(["method=dejavu", "device=cpu"])
    predictor = load_predictor(train_dejavu.INSTALLED)
    predictor.check_model(load_model(model_source(config)))
    assert predictor.sizes["bottleneck"] == predictor.shape["hidden_size"] == 256
    record = json.loads((train_dejavu.INSTALLED / "predictor.json").read_text())
    patience = record["recipe"]["patience"]
    assert len(record["curves"]["heads"]) == 4
    for curve in record["curves"]["heads"].values():
        recalls = [recall for _, recall in curve]
        assert max(recalls[-patience:]) - max(recalls[:-patience]) < 0.002
    assert sum(path.stat().st_size for path in train_dejavu.INSTALLED.iterdir()) < 700_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment.corpus=null"], "a JSONL file with a column 'words'"),
        (["experiment.install=true"], "valid for that model alone"),
        (["experiment.mlp=true"], "needs a model with ReLU; this one has silu"),
        (["experiment.steps=0"], "steps is 0; valid: 1 or more"),
        (["experiment.sparsities=[0.5,1.5]"], "a list of different numbers between 0 and 1"),
        (["experiment.sparsities=[0.5,0.5]"], "sparsities is [0.5, 0.5]; valid"),
        (["experiment.learning_rate=0"], "learning_rate is 0; valid: above 0"),
        (["experiment.patience=0"], "patience is 0; valid: 1 or more"),
        (["experiment.bottleneck=0"], "bottleneck is 0; valid: 1 or more"),
        (["experiment.dense_layers=2"], "dense_layers is 2; valid for this model: a count from 0 to 1"),
        (["experiment.dense_mlp_layers=[5]"], "layers from 0 to 1"),
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
