"""``experiment=ablations``: simulated choices against the product and plain references, and runs of all questions."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from chai.clustering.distances import head_costs
from chai.heads import repeat_kv
from chai.methods.chai import Chai
from chai.patching.apply import capture
from chai.patching.outputs import HeadOutputs, output_projections, output_weight
from experiments.ablations.costs import output_costs
from experiments.ablations.counts import by_error, by_gap, by_silhouette
from experiments.ablations.mapped import MappedPass, Segment, rounded, shared_value_errors
from experiments.ablations.measure import Reference, by_position, logits_of
from experiments.ablations.observed import ObservedPass
from experiments.ablations.questions import QUESTIONS, Scope
from experiments.ablations.saved import FILE, Saved
from experiments.ablations.settings import Passes, Setting
from experiments.ablations.stability import agreements
from experiments.ablations.texts import measured_texts, offline_texts
from experiments.cli import main
from experiments.config.compose import compose_config
from experiments.config.schema import CorpusConfig
from experiments.execute import run_config
from experiments.microworld.tokenizer import build_tokenizer
from experiments.runs.files import read_json
from tests.models import HEADS, LAYERS, VOCABULARY, clusters_of, make_model, relative_error

FAMILIES = ("llama", "mistral", "mistral_sliding", "gemma2", "gpt2")
K = 3
SMALL = [
    "experiment=ablations", "experiment.texts=3", "experiment.tokens=40", "experiment.first_scored=8",
    "experiment.samples=32", "experiment.sample_tokens=8", "experiment.domains=[docs]",
]  # fmt: skip


def make_ids(rows: int = 2, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits(model, setting: Setting, ids, costs=None) -> torch.Tensor:
    return logits_of(model, Passes(model, costs or {}).build(setting), ids)


# The pass.


@pytest.mark.parametrize("family", FAMILIES)
def test_own_heads_are_multi_head_attention(family):
    model, ids = make_model(family), make_ids()
    expected = model(ids).logits
    assert relative_error(logits(model, Setting(K, all_heads=True), ids), expected) < 1e-5
    with_segments = MappedPass(lambda inputs: [Segment(5, own_heads(inputs)), Segment(9, own_heads(inputs))])
    assert relative_error(logits_of(model, with_segments, ids), expected) < 1e-5
    assert with_segments.mean_kept().tolist() == [HEADS, HEADS]


def own_heads(inputs) -> torch.Tensor:
    return torch.arange(inputs.query.shape[1]).expand(len(inputs.query), -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "choices",
    [{}, {"tokens": 9}, {"membership": "kmedoids", "metric": "output"}, {"representative": "lowest"}],
    ids=["paper", "9 tokens", "output", "lowest"],
)
def test_a_setting_gives_the_logits_of_the_method(family, choices):
    model, ids = make_model(family), make_ids()
    with Chai(clusters=K, **choices)(model), torch.inference_mode():
        expected = model(ids).logits
    found = logits(model, Setting(K, **choices), ids)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(found, model(ids).logits) > 1e-2


def test_shared_values_are_those_of_the_representative():
    """Against a loop; half of the members: those with the least error of the output."""
    model, ids = make_model("mistral"), make_ids()
    errors = {}

    def look(inputs):
        heads = (own_heads(inputs) // 4) * 4
        factors = Passes(model, {})._factors[inputs.layer_idx]
        errors[inputs.layer_idx] = (
            shared_value_errors(inputs, heads, 5, factors), reference_errors(model, inputs, heads, 5),
        )  # fmt: skip

    with capture(model, look), torch.no_grad():
        model(ids)
    for found, expected in errors.values():
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-6)
    plain, half, full = (logits(model, Setting(K, values=name), ids) for name in ("own", "half", "shared"))
    assert relative_error(half, plain) > 1e-3 and relative_error(full, half) > 1e-3
    passed = Passes(model, {}).build(Setting(K, values="half"))
    segments = []
    choose = passed.choose
    passed.choose = lambda inputs: segments.append(choose(inputs)) or segments[-1]
    logits_of(model, passed, ids)
    for (segment,) in segments:
        members = HEADS - torch.tensor([len(row.unique()) for row in segment.heads])
        assert segment.shared.sum(1).tolist() == (members // 2).tolist()


def reference_errors(model, inputs, heads, tokens) -> torch.Tensor:
    """``|A_r (V_r - V_h) W_O,h|^2`` in fp64."""
    weight = output_weight(output_projections(model)[inputs.layer_idx]).double()  # [d, H * D]
    query, key, value = (
        repeat_kv(part[:, :, :tokens].double(), HEADS) for part in (inputs.query, inputs.key, inputs.value)
    )
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    found = torch.zeros(heads.shape, dtype=torch.float64)
    for row in range(len(heads)):
        for head in range(HEADS):
            chosen = heads[row, head]
            scores = inputs.scaling * query[row, chosen] @ key[row, chosen].T
            attention = scores.masked_fill(later, -torch.inf).softmax(-1)
            block = weight[:, head * value.shape[3] : (head + 1) * value.shape[3]]
            error = attention @ (value[row, chosen] - value[row, head]) @ block.T
            found[row, head] = error.square().sum()
    return found


def test_layers_share_the_clusters_of_the_first_of_their_group():
    model, ids = make_model("llama"), make_ids()
    seen = {}

    def watch(choose):
        def chosen(inputs):
            segments = choose(inputs)
            seen[inputs.layer_idx] = segments[0].heads
            return segments

        return chosen

    passed = Passes(model, {}).build(Setting(K, layers_sharing=2))
    passed.choose = watch(passed.choose)
    logits_of(model, passed, ids)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_clusters_that_are_made_again_change_later_tokens_alone():
    model, ids = make_model("llama"), make_ids(tokens=40)
    once, again = (logits(model, Setting(K, every=every, window=8), ids) for every in (None, 16))
    assert relative_error(again[:, :16], once[:, :16]) < 1e-5
    assert relative_error(again[:, 16:], once[:, 16:]) > 1e-2


def test_a_recent_map_is_of_the_last_tokens_attention():
    """Identical heads in the last tokens share a cluster, however they differed before."""
    model = make_model("llama")
    passed = Passes(model, {}).build(Setting(HEADS - 1, every=12, window=4))
    found = []

    def look(inputs):
        query = inputs.query.clone()
        query[:, 5, 8:12], key = query[:, 2, 8:12], inputs.key.clone()
        key[:, 5] = key[:, 2]
        twins = type(inputs)(inputs.module, query, key, inputs.value, None, inputs.scaling, None, {})
        found.append(passed.choose(twins)[1].heads)

    with capture(model, look), torch.no_grad():
        model(make_ids())
    assert len(found) == LAYERS and all((heads[:, 5] == 2).all() for heads in found)


def test_a_static_map_has_the_least_total_cost():
    """All heads but one alike: each stands for the others, at no cost."""
    model, ids = make_model("llama"), make_ids()
    cost = np.ones((LAYERS, HEADS, HEADS)) - np.eye(HEADS)
    cost[:, :4, :4] = cost[:, 4:, 4:] = 0
    setting = Setting(2, static=("texts", 8))
    passed = Passes(model, {("texts", 8): cost}).build(setting)
    logits_of(model, passed, ids)
    assert passed.mean_kept().tolist() == [2, 2]
    with capture(model, lambda inputs: check_halves(passed.choose(inputs)[0].heads)):
        model(ids)


def check_halves(heads):
    assert set(heads[0, :4].tolist()) == {0} and set(heads[0, 4:].tolist()) == {4}


def test_rounded_states_are_within_half_a_step():
    states = torch.randn(2, 3, 5, 16)
    for bits in (8, 4):
        step = (states.amax(-1, keepdim=True) - states.amin(-1, keepdim=True)) / (2**bits - 1)
        difference = (rounded(states, bits) - states).abs()
        assert (difference <= step / 2 + 1e-6).all() and difference.max() > step.min() / 4
        assert len(rounded(states, bits)[0, 0, 0].unique()) <= 2**bits
    assert torch.equal(rounded(torch.full((1, 1, 1, 4), 3.0), 4), torch.full((1, 1, 1, 4), 3.0))


# Measures.


def test_divergence_and_change_of_the_loss_are_those_of_a_loop():
    targets = make_ids(2, 8)
    one, two = 5 * torch.randn(2, 8, VOCABULARY), 5 * torch.randn(2, 8, VOCABULARY)
    kl, changes = Reference(one, targets).compare(two)
    assert kl.shape == changes.shape == (2, 8)
    for row in range(2):
        for place in range(8):
            p, q = (part[row, place].double().softmax(0) for part in (one, two))
            target = targets[row, place]
            assert kl[row, place].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
            assert changes[row, place].item() == pytest.approx((p[target] / q[target]).log().item(), rel=1e-4)
    assert Reference(one, targets).compare(one)[0].abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_logits_from_a_position_on_are_the_last_of_all(family):
    model, ids = make_model(family), make_ids()
    build = Passes(model, {}).build
    whole, part = (logits_of(model, build(Setting(K)), ids, first) for first in (0, 7))
    assert relative_error(part, whole[:, 7:]) < 1e-6


def test_positions_are_averaged_by_range():
    values = torch.arange(128.0, 599.0)[None]  # the value is the position, of texts of 600 tokens
    ranges = by_position(values, 128)
    assert list(ranges) == ["kl 128-256", "kl 256-512", "kl 512-600"]
    assert [float(value) for value in ranges.values()] == [191.5, 383.5, 555.0]


def test_costs_are_means_of_the_first_texts():
    model = make_model("mistral")
    rows = make_ids(5, 10).tolist()
    found = output_costs(model, iter(rows), [2, 5, 9])
    assert set(found) == {2, 5}  # there are no 9 texts
    for count, cost in found.items():
        expected = np.mean([reference_cost(model, row) for row in rows[:count]], 0)
        np.testing.assert_allclose(cost, expected, rtol=1e-3, atol=1e-6)


def reference_cost(model, row) -> np.ndarray:
    outputs, found = HeadOutputs(model), []

    def look(inputs):
        query, key = inputs.query.double(), repeat_kv(inputs.key.double(), HEADS)
        scores = inputs.scaling * query @ key.transpose(2, 3)
        weights = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        found.append(head_costs("output", weights, outputs([inputs.layer_idx], inputs.value[None])[0])[0].numpy())

    with capture(model, look), torch.no_grad():
        model(torch.tensor([row]))
    return np.stack(found)


def test_what_is_observed_is_multi_head_attention_and_the_methods_clusters():
    model, ids = make_model("llama"), make_ids()
    observed = ObservedPass(K)
    assert relative_error(logits_of(model, observed, ids), model(ids).logits) < 1e-5
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    first, entropy = (torch.stack(values).detach() for values in (observed.first_token, observed.entropy))
    assert torch.allclose(first, torch.stack([weights[:, :, 1:, 0].mean((1, 2)) for weights in maps]), atol=1e-5)
    uniform = torch.arange(2, ids.shape[1] + 1).log()
    expected = [(torch.special.entr(weights).sum(-1)[:, :, 1:] / uniform).mean((1, 2)) for weights in maps]
    assert torch.allclose(entropy, torch.stack(expected), atol=1e-4)
    model.set_attn_implementation("sdpa")
    cache = Chai(clusters=K).new_cache(model)
    with Chai(clusters=K)(model):
        model(ids, past_key_values=cache, use_cache=True)
    assert (observed.labels[0] == clusters_of(cache)[0][0].numpy()).all()  # later layers' inputs differ
    (one, two) = observed.summary(torch.tensor([[1.0, 3], [2, 2]]), ["12, a", ""], torch.tensor([[4, 4], [4, 5]]))
    assert [one[name] for name in ("loss_mha", "digits", "punctuation", "distinct")] == [2.0, 0.4, 0.2, 0.5]
    assert two["distinct"] == 1.0 and two["digits"] == 0.0 and np.shape(two["labels"]) == (LAYERS, HEADS)


def test_texts_are_the_first_that_are_long_enough_or_windows_of_one_document(tmp_path):
    tokenizer = build_tokenizer()
    words = [" ".join(["the"] * count) for count in (9, 3, 12, 8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    corpus = CorpusConfig(name="texts", path=str(tmp_path / "texts.jsonl"))
    texts, read = measured_texts(corpus, 0, tokenizer, 8, 2)
    assert [text.name for text in texts] == ["texts 0", "texts 2"] and read == 3
    assert {len(text.ids) for text in texts} == {8}
    assert [len(ids) for ids in offline_texts(corpus, 0, tokenizer, 5, read)] == [5]
    (tmp_path / "long.txt").write_text(" ".join(["the"] * 20))
    windows, _ = measured_texts(CorpusConfig(name="long", path=str(tmp_path / "long.txt")), 0, tokenizer, 8, 4)
    whole = tokenizer(" ".join(["the"] * 20)).input_ids
    assert [list(text.ids) for text in windows] == [whole[:8], whole[8:16]]


# Numbers of clusters of a request.


@pytest.mark.parametrize("rule", [by_silhouette, by_gap])
def test_separate_groups_are_counted(rule):
    generator = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [20, 0], [0, 30]]) @ np.eye(2, 6)
    points = np.repeat(centres, 4, 0)[None] + generator.normal(0, 0.1, (5, 12, 6))
    distances = ((points[:, :, None] - points[:, None]) ** 2).sum(-1).astype(np.float32)
    assert rule(distances, points.astype(np.float32), 0.0).tolist() == [3] * 5


def test_the_error_rule_keeps_the_share_that_it_is_given():
    points = np.array([0.0, 0.1, 10, 10.1, 30, 30.1])[None, :, None]
    distances = ((points[:, :, None] - points[:, None]) ** 2).sum(-1).astype(np.float32)
    assert by_error(distances, points, 0.01).tolist() == [3]
    assert by_error(distances, points, 0.2).tolist() == [2]
    assert by_error(distances, points, 0.0).tolist() == [6]


def test_agreements_compare_requests_domains_layers_and_lengths():
    generator = np.random.default_rng(0)
    labels, whole = (list(generator.integers(0, 3, (3, 2, 8))) for _ in range(2))
    corpora = ["one", "one", "two"]
    found = agreements(labels, whole, corpora)

    def mean(first, second):
        return np.mean([adjusted_rand_score(*pair) for pair in zip(first, second, strict=True)])

    assert found[0]["first tokens: two requests of a corpus"] == pytest.approx(mean(labels[0], labels[1]))
    assert found[0]["first tokens: requests of two corpora"] == pytest.approx(mean(labels[0], labels[2]))
    assert found[2]["first tokens: requests of two corpora"] == pytest.approx(
        (mean(labels[2], labels[0]) + mean(labels[2], labels[1])) / 2
    )
    assert "first tokens: two requests of a corpus" not in found[2]
    assert found[1]["first tokens and the whole text"] == pytest.approx(mean(labels[1], whole[1]))
    layers = adjusted_rand_score(labels[0][0], labels[0][1])
    assert found[0]["first tokens: neighbouring layers"] == pytest.approx(layers)


# Runs.


def start(results, *overrides: str) -> int:
    return run_config(compose_config([*SMALL, "experiment.clusters=6", f"results_dir={results}", *overrides]))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All questions on the embedded model."""
    results = tmp_path_factory.mktemp("results")
    assert start(results) == 0
    (folder,) = results.glob("ablations/tiny/none/*/*")
    return folder


def test_each_question_has_a_value_of_each_choice_and_text(done):
    frame, result = pd.read_parquet(done / "samples.parquet"), read_json(done / "result.json")
    assert set(frame.question) == set(QUESTIONS) == set(result["questions"])
    assert not frame.value.isna().any()
    scope = Scope(Setting(6), 16, 8, 32, ("micro", "python_docs"))
    for question, choices in QUESTIONS.items():
        own = frame[frame.question == question]
        corpora = 2 if question in ("inputs", "stability") else 1
        for choice in choices(scope):
            values = own[(own.choice == choice) & (own.measure == "kl")]
            assert len(values) == 3 * corpora and (values.value > -1e-6).all(), (question, choice)
    paper = frame[(frame.question == "warmup") & (frame.choice == "5 tokens") & (frame.measure == "kl")]
    assert result["metrics"]["kl"] == pytest.approx(paper.value.mean()) and result["n"] == 3


def test_a_stopped_run_goes_on(done, tmp_path, monkeypatch, capsys):
    """It measures what is missing, and has the same numbers as one that was not stopped."""
    one = "experiment.questions=[warmup]"
    calls, measured = [], Reference.compare

    def counted(*arguments):
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(Reference, "compare", counted)
    with pytest.raises(SystemExit, match="130"):
        start(tmp_path, one)
    (folder,) = tmp_path.glob("ablations/tiny/none/*/*")
    with open(folder / FILE, "a") as file:
        file.write('{"key": "half a li')  # as a process leaves it that is killed
    assert start(tmp_path, one) == 0
    assert len(calls) - 4 == 5 - 3  # five numbers of warm-up tokens up to 8
    frame = pd.read_parquet(folder / "samples.parquet")
    whole = pd.read_parquet(done / "samples.parquet")
    for measure in ("kl", "loss"):
        own, other = (
            part[(part.question == "warmup") & (part.measure == measure)].value.to_numpy() for part in (frame, whole)
        )
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    assert start(tmp_path, one) == 0
    assert len(calls) - 4 == 2 and "already complete" in capsys.readouterr().out


def test_saved_values_are_kept_and_a_torn_line_is_not(tmp_path):
    saved = Saved(tmp_path / FILE)
    saved.add("a", {"x": {"kl": 1.0}})
    with open(tmp_path / FILE, "a") as file:
        file.write('{"key": "b", "val')
    again = Saved(tmp_path / FILE)
    assert not again.missing("a", ["x"]) and again.missing("a", ["x", "y"]) and again.missing("b", ["x"])
    again.add("b", {"x": {"kl": 2.0}})
    assert Saved(tmp_path / FILE).values == {"a": {"x": {"kl": 1.0}}, "b": {"x": {"kl": 2.0}}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment.questions=[warmpu]", "unknown question 'warmpu' (did you mean 'warmup'?); valid: warmup, metric"),
        ("experiment.domains=[prose]", "domains has 'prose'; valid: docs, code, packages"),
        ("experiment.tokens=9", "tokens is 9; valid: 10 (first_scored + 2) or more"),
        ("experiment.first_scored=4", "first_scored is 4; valid: 5 or more"),
        ("experiment.tokens=5000", "experiment.tokens is 5000; the model has"),
        ("experiment.clusters=17", "experiment.clusters is 17; valid: 1 to 16"),
        ("experiment.clusters=null", "set experiment.clusters=K"),
    ],
)
def test_mistakes_are_one_line(override, message, tmp_path, capsys):
    arguments = [*SMALL, "experiment.clusters=6", f"results_dir={tmp_path}"]
    key = override.partition("=")[0]
    code = main([*(argument for argument in arguments if not argument.startswith(f"{key}=")), override])
    said = " ".join(capsys.readouterr().err.split())
    assert code == 2 and message in said and not list(tmp_path.iterdir())
