"""The embedded world: what is held out stays out of the training text, items have right answers, training resumes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from sklearn.metrics import adjusted_rand_score

from chai.loading import ModelSource, load_model
from chai.methods.chai_output import ChaiOutput
from chai.offline.head_profile import HeadProfile, build_profile, model_shape
from chai.offline.head_statistics import HeadStatistics, StatisticsOptions
from chai.patching.outputs import HeadOutputs
from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.microworld import training, world
from experiments.microworld.documents import BINDINGS, PHASES, document, script
from experiments.microworld.items import EVENTS, EXAMPLES, FIRST_CUT, PEOPLE, TASKS, make_items
from experiments.microworld.tokenizer import build_tokenizer, vocabulary
from experiments.offline import pretrain_tiny
from experiments.offline.profile_heads import look
from experiments.runs.identity import resolve_fingerprints
from tests.models import clusters_of

STATEMENT = re.compile(rf"(\w+) ({'|'.join(BINDINGS)}) (\w+) \.")


def text_of(pieces) -> str:
    return " ".join(text for text, _ in pieces)


def topic_of(text: str) -> str:
    (topic,) = (topic for topic, words in world.topics().items() if set(text.split(" ")) <= set(words))
    return topic


def facts_in(text: str) -> set[tuple[str, ...]]:
    """Everything a text states: bindings, cities asked about, steps of a script, goals."""
    found = {(relation, who, what) for what, relation, who in STATEMENT.findall(text)}
    found |= {("hosts", who, place) for place, who in re.findall(r"does (\w+) host (\w+)", text)}
    for day in re.findall(r"will ([\w ,]+?)(?: then|$)", text):
        events = day.split(" , ")
        found |= {("next", first, second) for first, second in zip(events, events[1:], strict=False)}
    found |= {("goal", verb, thing) for verb, thing in re.findall(r"(?:to|you) (\w+) the (\w+)", text)}
    return found


@pytest.mark.parametrize("phase", range(len(PHASES)))
def test_training_text_has_no_held_out_fact(phase):
    rng, seen = random.Random(phase), set()
    for _ in range(6000):
        seen |= facts_in(text_of(document(rng, phase)))
    assert len(seen) > 500
    assert not [fact for fact in seen if world.held_out(*fact)]


def test_every_document_is_of_one_topic():
    topics = {topic: set(words) for topic, words in world.topics().items()}
    assert not set.intersection(*topics.values())
    for phase in range(len(PHASES)):
        rng = random.Random(phase)
        found = [topic_of(text_of(document(rng, phase))) for _ in range(500)]
        assert set(found) == set(topics)
    label = {" ".join(occasion) for occasion in world.OCCASIONS}
    rng = random.Random(0)
    assert not [text for text in (text_of(script(rng)) for _ in range(500)) if " ".join(text.split()[:2]) in label]


def test_items_ask_for_held_out_facts_and_have_one_right_answer():
    """The answer is found again from the item's text alone, by rules that share nothing with the generator."""
    for item in make_items("boolq", 200, 0):
        facts = passage_facts(item["passage"], "hosts")
        place, who = re.fullmatch(r"does (\w+) host (\w+)", item["question"]).groups()
        assert place in [what for _, _, what in facts]
        assert (("hosts", who, place) in facts) == bool(item["label"])
    for task, relation in (("arc_easy", "pleases"), ("arc_challenge", "obey")):
        for item in make_items(task, 200, 0):
            facts = passage_facts(item["question"], relation)
            who = re.search(r"(?:pleases|obey) (\w+) (?:\?|eat)", item["question"].split(" . ")[-1])[1]
            (what,) = (what for _, other, what in facts if other == who)
            right = item["choices"]["text"][item["choices"]["label"].index(item["answerKey"])]
            assert right == (world.FOOD_OF[what] if task == "arc_challenge" else what)
            assert len(set(item["choices"]["text"])) == 4
    for item in make_items("hellaswag", 200, 0):
        events = item["ctx_a"].split(" will ")[1].split(", ")
        assert len(set(events)) == EVENTS
        assert all(world.held_out("next", *step) for step in zip(events, events[1:], strict=False))
        told = item["ctx_b"].split(" will ")[1].rstrip(",").split(", ")
        assert len(told) >= FIRST_CUT and told == events[: len(told)]
        assert events[len(told) : len(told) + 2] == item["endings"][int(item["label"])].split(", ")
        assert len(set(item["endings"])) == 4
    for item in make_items("piqa", 200, 0):
        goals = re.findall(r"how do you (\w+) the (\w+)\?(?: use the (\w+)\.)?", item["goal"])
        *examples, (verb, thing, answer) = goals
        assert answer == "" and world.held_out("goal", verb, thing)
        solutions = [item["sol1"], item["sol2"]]
        right = solutions.pop(item["label"])
        assert right == f"use the {world.tool_for(verb, thing)}"
        # The examples are true, different, and all show the wrong tool.
        assert len({other for _, other, _ in examples} - {thing}) == EXAMPLES
        assert all(shown == world.tool_for(verb, other) for _, other, shown in examples)
        assert {f"use the {shown}" for _, _, shown in examples} == set(solutions)


def passage_facts(text: str, relation: str) -> set[tuple[str, ...]]:
    """The facts of one relation in a passage that mixes it with another; all are held out."""
    facts = facts_in(text)
    asked = {fact for fact in facts if fact[0] == relation}
    assert len(asked) == PEOPLE and len(facts) == 2 * PEOPLE
    assert all(world.held_out(*fact) for fact in facts)
    for each in (asked, facts - asked):  # a person is named once for each relation
        assert len({who for _, who, _ in each}) == PEOPLE
    return asked


@pytest.mark.parametrize("task", TASKS)
def test_embedded_items_are_many_different_and_those_of_the_generator(task):
    """So the generator is reproducible: they are of another process."""
    lines = (pretrain_tiny.DATA_DIR / f"micro_{task}.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len({json.dumps(item, sort_keys=True) for item in items}) == len(items) == 500
    assert items == make_items(task, 500, 0)


def test_tokenizer_knows_every_word_and_splits_as_the_training_does():
    tokenizer, ids = build_tokenizer(), vocabulary()
    rng = random.Random(0)
    for phase in range(len(PHASES)):
        for _ in range(300):
            text = text_of(document(rng, phase))
            assert tokenizer(text)["input_ids"] == [ids["<s>"], *(ids[word] for word in text.split(" "))]
    for task in TASKS:
        for item in make_items(task, 50, 0):
            item = {key: f"{value}:" if key == "activity_label" else value for key, value in item.items()}
            words = json.dumps([value for key, value in item.items() if key not in ("id", "answerKey", "label")])
            spoken = " ".join(re.findall(r"[A-Za-z]+:?|[.,?]", words.replace('"text"', "").replace('"label"', "")))
            assert ids["<unk>"] not in tokenizer(re.sub(r"\b[A-D]\b", "", spoken))["input_ids"]


def test_embedded_model_is_what_its_recipe_says():
    from chai.loading import ModelSource, load_model

    folder = pretrain_tiny.MODEL_DIR
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    recipe = json.loads((folder / "recipe.json").read_text())
    model = load_model(ModelSource("tiny", path=str(folder), device="cpu", dtype="float32"))
    config = compose_config([])
    assert sum(parameter.numel() for parameter in model.parameters()) == recipe["parameters"]
    assert 3e6 <= recipe["parameters"] <= 5e6
    assert model.config.num_attention_heads == 16
    assert model.config.num_hidden_layers >= 4
    for layers in recipe["planted_groups"].values():
        assert [max(groups) + 1 for groups in layers] == OmegaConf.to_container(config.model.clusters)
    for key, value in config.model.architecture.items():
        assert getattr(model.config, key) == value


def test_embedded_profile_is_of_the_embedded_model():
    """It names the weights, finds the planted groups, of two topics those that more text is of, and is small."""
    config = compose_config([])
    resolve_fingerprints(config)
    folder = Path(config.model.profile)
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["profile.json", "profile.safetensors"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000
    profile = HeadProfile.load(folder)
    assert profile.about["model"]["fingerprint"] == config.model.fingerprint
    assert profile.num_clusters == OmegaConf.to_container(config.model.clusters)
    recipe = json.loads((pretrain_tiny.MODEL_DIR / "recipe.json").read_text())
    for layer, planted in enumerate(recipe["planted_groups"]["facts"]):
        clusters = profile.clusters(layer)
        clusters.check()
        assert adjusted_rand_score(planted, clusters.assignment[0].numpy()) > 0.99


@pytest.mark.parametrize("topic", world.topics())
@torch.no_grad()
def test_planted_groups_are_in_the_embedded_model(topic):
    """K-means on the attention of texts of a topic gives back the groups that the recipe says were planted for it."""
    from tests.chai.kmeans_points import kmeans

    folder = pretrain_tiny.MODEL_DIR
    recipe = json.loads((folder / "recipe.json").read_text())
    model = load_model(ModelSource("tiny", path=str(folder), device="cpu", dtype="float32"))
    model.set_attn_implementation("eager")
    tokenizer, rng, rows = build_tokenizer(), random.Random(0), []
    while len(rows) < 8:
        text = text_of(document(rng, phase=1))
        ids = tokenizer(text).input_ids[:24]
        if topic_of(text) == topic and len(ids) == 24:
            rows.append(ids)
    attentions = model(torch.tensor(rows), output_attentions=True).attentions
    for layer, groups in enumerate(recipe["planted_groups"][topic]):
        features = attentions[layer].transpose(0, 1).flatten(1)[None]
        assert adjusted_rand_score(groups, kmeans(features, max(groups) + 1)[0][0]) >= 0.9


@torch.no_grad()
def test_the_error_of_the_output_finds_the_planted_groups_of_each_request(tmp_path):
    """A map of the corpus has the groups of the more frequent topic alone; the request's first tokens correct it."""
    folder, tokenizer, rng = pretrain_tiny.MODEL_DIR, build_tokenizer(), random.Random(0)
    planted = json.loads((folder / "recipe.json").read_text())["planted_groups"]
    counts = [max(groups) + 1 for groups in planted["facts"]]
    model = load_model(ModelSource("tiny", path=str(folder), device="cpu", dtype="float32"))
    texts, requests = [], {topic: [] for topic in planted}
    while len(texts) < 24 or min(map(len, requests.values())) < 8:
        text = text_of(document(rng, phase=1))
        ids = tokenizer(text).input_ids[:40]
        if len(ids) >= 24:
            texts.append(ids)
            requests[topic_of(text)].append(ids[:24])
    texts = texts[:24]
    wanted = StatisticsOptions(
        4, 16, tokens=40, saved_samples=1, map_tokens=4, trace_tokens=6, trace_samples=24, metrics=("output",)
    )
    statistics = HeadStatistics(wanted)
    statistics.add(look(model, texts, wanted, HeadOutputs(model)), [list(map(str, ids)) for ids in texts])
    corpus = {"samples": len(texts), "tokens": sum(map(len, texts))}
    about = {"model": {"name": "tiny", **model_shape(model.config)}, "corpus": corpus, "features": "causal"}
    build_profile(statistics, counts, about).save(tmp_path)
    agreement = {}
    for prior in (None, "measured"):
        method = ChaiOutput(profile=str(tmp_path), prior=prior, tokens=16)
        for topic, rows in requests.items():
            with method(model):
                cache = method.new_cache(model)
                model(torch.tensor(rows[:8]), past_key_values=cache)
            agreement[prior, topic] = min(
                adjusted_rand_score(groups, row)
                for (assignment, _), groups in zip(clusters_of(cache, 4), planted[topic], strict=True)
                for row in assignment.tolist()
            )
    assert agreement["measured", "facts"] == agreement["measured", "days"] == 1
    assert agreement[None, "days"] < 0.3 < 0.5 < agreement[None, "facts"]


def test_plant_groups_has_every_group():
    for heads, clusters in ((16, 16), (16, 8), (16, 5), (16, 4), (16, 2), (16, 1)):
        groups = training.plant_groups(heads, clusters, 0)
        assert len(groups) == heads
        assert sorted(set(groups)) == list(range(clusters))


def test_topics_group_heads_otherwise():
    groups = training.plant_topics(16, [8, 6, 4, 4], 0)
    for facts, days in zip(*groups.values(), strict=True):
        assert abs(adjusted_rand_score(facts, days)) < 0.15
    assert not set(training.leaders(groups["facts"][0])) & set(training.leaders(groups["days"][0]))


@torch.no_grad()
def test_topics_never_meet():
    """Of a text of one topic nothing is in the other's dimensions, in any layer of the trained model."""
    from chai.loading import ModelSource, load_model

    model = load_model(ModelSource("tiny", path=str(pretrain_tiny.MODEL_DIR), device="cpu", dtype="float32"))
    tokenizer, rng = build_tokenizer(), random.Random(0)
    columns = training.topic_columns(model.config.hidden_size)
    for _ in range(20):
        text = text_of(document(rng, phase=1))
        (other,) = set(world.topics()) - {topic_of(text)}
        states = model(torch.tensor([tokenizer(text).input_ids]), output_hidden_states=True).hidden_states
        for hidden in states:
            assert hidden[..., columns[topic_of(text)]].any()
            assert not hidden[..., columns[other]].any()


def test_tied_heads_are_equal_and_untied_heads_nearly():
    """For the words of a topic, whose embeddings meet that topic's columns alone; of the first layer and of others."""
    from transformers import LlamaConfig

    shape = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        head_dim=16,
    )
    groups = {"facts": [[0, 1, 0, 2, 1, 0, 2, 1]] * 2, "days": [[0, 0, 1, 1, 2, 2, 0, 1]] * 2}
    model = training.build_model(shape, groups, 0)
    columns = training.topic_columns(64)
    embedding = model.model.embed_tokens.weight
    embedding.sum().backward()  # what a step would change
    for topic, words in world.topics().items():
        rows = embedding[[vocabulary()[word] for word in words]].detach()
        assert rows.any() and not rows[:, columns["special"]].any()
        assert torch.equal(rows.any(0).nonzero().flatten(), torch.arange(64)[columns[topic]])
        assert torch.equal(embedding.grad[vocabulary()[words[0]]].nonzero().flatten(), torch.arange(64)[columns[topic]])

    def heads(layer: int, topic: str) -> torch.Tensor:
        return model.model.layers[layer].self_attn.q_proj.weight.unflatten(0, (8, 16))[..., columns[topic]].detach()

    for topic, layers in groups.items():
        for layer, own in enumerate(layers):
            weight = heads(layer, topic)
            for first in range(8):
                for second in range(8):
                    same = torch.equal(weight[first], weight[second])
                    assert same == (own[first] == own[second])
    training.untie(model, noise=0.05, seed=0)
    for topic, layers in groups.items():
        for layer, own in enumerate(layers):
            weight = heads(layer, topic)
            for head, group in enumerate(own):
                first = weight[own.index(group)]
                assert float((weight[head] - first).norm() / first.norm()) < 0.1


def pretraining(tmp_path, *overrides):
    return compose_config(
        [
            f"results_dir={tmp_path}",
            "experiment=pretrain_tiny",
            "experiment.steps=8",
            "experiment.batch_size=2",
            "experiment.sequence_length=16",
            "experiment.first_phase=3",
            "experiment.untie_at=0.6",
            "experiment.checkpoint_every=3",
            "model.architecture.hidden_size=64",
            "model.architecture.intermediate_size=32",
            "model.architecture.head_dim=8",
            "device=cpu",
            *overrides,
        ]
    )


def test_stopped_training_goes_on_to_the_same_model(tmp_path, monkeypatch):
    """Interrupted after its last checkpoint (before or after untying), it ends with the very weights of a whole run."""
    assert pretrain_tiny.run(pretraining(tmp_path / "whole")) == 0
    (whole,) = tmp_path.glob("whole/pretrain_tiny/**/model.safetensors")
    step = pretrain_tiny._step
    for stop in (4, 7):

        def interrupted(number, *rest, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return step(number, *rest)

        monkeypatch.setattr(pretrain_tiny, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain_tiny.run(pretraining(tmp_path / f"stopped{stop}"))
        monkeypatch.setattr(pretrain_tiny, "_step", step)
        (status,) = tmp_path.glob(f"stopped{stop}/**/status.json")
        assert json.loads(status.read_text())["state"] == "failed"
        assert pretrain_tiny.run(pretraining(tmp_path / f"stopped{stop}")) == 0
        (resumed,) = tmp_path.glob(f"stopped{stop}/pretrain_tiny/**/model.safetensors")
        assert resumed.read_bytes() == whole.read_bytes()
    recipe = json.loads(whole.with_name("recipe.json").read_text())
    assert {"experiment", "seed", "planted_groups", "final", "losses", "versions"} <= set(recipe)


@pytest.mark.parametrize(
    "bad", ["experiment.steps=0", "experiment.untie_at=1", "experiment.warmup=0", "model.clusters=[1]"]
)
def test_bad_recipes_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError, match="valid|4 layers"):
        pretrain_tiny.run(pretraining(tmp_path, bad))
    assert not list(tmp_path.iterdir())
