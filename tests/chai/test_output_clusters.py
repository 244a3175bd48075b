"""CHAI with other distances between heads, and by the output: clusters against loops in float64, and divided calls."""

from __future__ import annotations

import copy
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

import chai.patching.clustered
from chai.clustering.kmeans import cluster
from chai.heads import repeat_kv
from chai.methods import Chai, ChaiOutput
from chai.offline.head_profile import build_profile, model_shape
from chai.offline.head_statistics import HeadStatistics, StatisticsOptions
from chai.patching.apply import capture
from chai.patching.model_info import find_blocks
from chai.patching.outputs import HeadOutputs, output_weight
from experiments.offline.profile_heads import look
from tests.chai.test_distances import cost_of
from tests.chai.test_static import TEXTS
from tests.models import HEADS, LAYERS, clusters_of, make_batch, make_model, relative_error
from tests.oracle import oracle

COUNTS = [HEADS, 3, 2]
TOKENS = 6
FAMILIES = ("llama", "qwen2", "gpt2", "gemma2")
SETTINGS = {
    "cosine": {"metric": "cosine"},
    "jensen_shannon": {"metric": "jensen_shannon"},
    "sink_removed": {"metric": "sink_removed"},
    "attention by medoids": {"membership": "kmedoids"},
    "cosine by medoids": {"metric": "cosine", "membership": "kmedoids"},
    "output": {"metric": "output", "membership": "kmedoids"},
    "representative": {"representative": "output"},
    "cosine and representative": {"metric": "cosine", "representative": "output"},
}
#: Methods whose clusters depend on the outputs of a request's tokens.
BY_OUTPUT = {name: SETTINGS[name] for name in ("output", "representative")}


def profile_of(model, folder, metrics=("output", "cosine"), joint=True, features="causal", about=()) -> str:
    """A head profile of three texts with these counts and metrics."""
    wanted = StatisticsOptions(
        LAYERS, HEADS, features=features, tokens=8, saved_samples=1, map_tokens=4, trace_tokens=6, trace_samples=1,
        metrics=metrics, joint=joint,
    )  # fmt: skip
    statistics = HeadStatistics(wanted)
    statistics.add(look(model, TEXTS, wanted, HeadOutputs(model)), [list(map(str, text)) for text in TEXTS])
    named = {"name": "small", "id": None, "fingerprint": None, **model_shape(model.config)}
    corpus = {"samples": len(TEXTS), "tokens": 8 * len(TEXTS)}
    folder.mkdir(exist_ok=True)
    about = {"model": named, "corpus": corpus, "features": features, **dict(about)}
    build_profile(statistics, COUNTS, about).save(folder)
    return str(folder)


@torch.no_grad()
def reference_costs(model, ids: Tensor, metric: str) -> list[np.ndarray]:
    """``[H, H]`` of each layer for the tokens of one row, by loops over the stock model's attention in float64."""
    exact = copy.deepcopy(model).double()
    values: dict[int, Tensor] = {}
    with capture(exact, lambda inputs: values.setdefault(inputs.layer_idx, inputs.value)):
        exact(ids)
    exact.set_attn_implementation("eager")
    attentions = exact(ids, output_attentions=True).attentions
    found = []
    for layer, block in enumerate(find_blocks(exact)):
        own = repeat_kv(values[layer], HEADS)[0]
        weight = output_weight(block.output).unflatten(1, (HEADS, -1))  # [d, H, D]
        costs = np.empty((HEADS, HEADS))
        for h in range(HEADS):
            product = own[h] @ weight[:, h].T
            costs[h] = [
                cost_of(metric, attentions[layer][0, h], attentions[layer][0, r], product) for r in range(HEADS)
            ]
        found.append(costs)
    return found


def clusters_after(model, method, batch) -> list:
    with torch.no_grad(), method(model):
        store = method.new_cache(model)
        model(**batch, past_key_values=store)
    return clusters_of(store)


def medoid_cost(cost: np.ndarray, assignment, representatives) -> float:
    return sum(float(cost[h, representatives[label]]) for h, label in enumerate(assignment))


# CHAI with other metrics.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_clusters_are_those_of_the_models_own_attention(family, name):
    """Left padding: every row is clustered by its own first tokens alone."""
    model, settings = make_model(family), SETTINGS[name]
    # Learned positions count padding, unless generate() passes others.
    batch = make_batch([12, 12, 12] if family == "gpt2" else [11, 14, 7])
    found = clusters_after(model, Chai(clusters=COUNTS, tokens=TOKENS, **settings), batch)
    assert found[0] is None
    for row in (0, 2):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None, :TOKENS]
        costs = reference_costs(model, ids, settings.get("metric", "attention"))
        errors = reference_costs(model, ids, "output") if settings.get("representative") == "output" else None
        for layer in (1, 2):
            k, (assignment, representatives) = COUNTS[layer], (part[row].tolist() for part in found[layer])
            if settings.get("membership") == "kmedoids":
                least = min(
                    sum(costs[layer][h, list(chosen)].min() for h in range(HEADS))
                    for chosen in combinations(range(HEADS), k)
                )
                assert medoid_cost(costs[layer], assignment, representatives) <= least * (1 + 2e-3)
                continue
            labels, nearest, _ = cluster(costs[layer][None].astype(np.float32), np.array([k]), nearest=True)
            together = np.array(assignment)[:, None] == np.array(assignment)
            assert (together == (labels[0][:, None] == labels[0])).all()
            if errors is None:
                assert representatives == nearest[0, :k].tolist()
                continue
            for label, head in enumerate(representatives):
                members = np.flatnonzero(np.array(assignment) == label)
                sums = {int(r): errors[layer][members, r].sum() for r in members}
                assert sums[head] <= min(sums.values()) * (1 + 2e-3)


@cache
def output_model(family: str):
    return make_model(family)


def output_methods(model, folder) -> dict:
    methods = {name: Chai(clusters=COUNTS, **settings) for name, settings in BY_OUTPUT.items()}
    return methods | {"chai_output": ChaiOutput(profile=profile_of(model, folder), prior=4.0)}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_the_result_does_not_depend_on_how_the_prompt_is_cut(family, tmp_path, monkeypatch):
    """In one pass of the whole prompt, in a pass of the warm-up tokens and one of the others, and in any chunks."""
    model, batch = output_model(family), make_batch([16, 16])
    for method in output_methods(model, tmp_path).values():
        passes = []
        for one_pass in (True, False):
            requests = chai.patching.clustered._Requests
            monkeypatch.setattr(requests, "in_one_pass", lambda *_, own=one_pass: own)
            with method(model):
                store = method.new_cache(model)
                logits = model(batch["input_ids"], past_key_values=store).logits
            passes.append((logits, clusters_of(store)))
        (whole, found), (divided, again) = passes
        assert relative_error(divided, whole) < 1e-5
        for one, other in zip(found[1:], again[1:], strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        monkeypatch.undo()
        with method(model):
            for sizes in ([2, 1, 13], [5, 11], [1] * 16):
                store, logits = method.new_cache(model), []
                for chunk in batch["input_ids"].split(sizes, 1):
                    logits.append(model(chunk, past_key_values=store).logits)
                assert relative_error(torch.cat(logits, 1), whole) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_clustered_each_by_itself(side, tmp_path):
    model, batch = output_model("llama"), make_batch([11, 14, 7], side=side)
    for method in output_methods(model, tmp_path).values():
        found = clusters_after(model, method, batch)
        for row in range(3):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
            alone = clusters_after(model, method, {"input_ids": ids})
            for layer in (1, 2):
                for part, own in zip(found[layer], alone[layer], strict=True):
                    assert torch.equal(part[row], own[0])
        assert any(not torch.equal(found[layer][0][0], found[layer][0][row]) for layer in (1, 2) for row in (1, 2))


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 9, 12]], ids=["short", "mixed"])
@torch.no_grad()
def test_generate_equals_rescoring_from_scratch(lengths, tmp_path):
    model, batch = output_model("qwen2"), make_batch(lengths)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 8), value=1)
    for method in output_methods(model, tmp_path).values():
        with method(model):
            steps = model.generate(
                **batch, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            for row in range(3):
                whole = model(steps.sequences[row][mask[row].bool()][None]).logits[0, -9:-1]
                assert relative_error(torch.stack([logits[row] for logits in steps.logits]), whole) < 1e-4


@torch.no_grad()
def test_logits_equal_the_oracle(tmp_path):
    """Batch 3, left padding: the fp64 loop over the same clusters."""
    model, batch = output_model("qwen2"), make_batch([11, 14, 7])
    exact, real = copy.deepcopy(model).double(), batch["attention_mask"].bool()
    for method in output_methods(model, tmp_path).values():
        with method(model):
            store = method.new_cache(model)
            logits = model(**batch, past_key_values=store).logits
        with oracle(exact, clusters_of(store), tokens=5):
            assert relative_error(logits[real], exact(**batch, use_cache=False).logits[real]) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "euclid"}, "metric is 'euclid'; valid: attention, cosine, jensen_shannon, sink_removed, output"),
        ({"metric": "output"}, "metric=output has no means; valid: membership=kmedoids"),
        ({"metric": "cosine", "membership": "agglomerative"}, "its own metric.*valid: metric=attention"),
        ({"membership": "kmedoids", "representative": "output"}, "chooses the representatives itself.*valid: nearest"),
        ({"membership": "kmedoids", "representative": "lowest"}, "chooses the representatives itself.*valid: nearest"),
        ({"membership": "agglomerative", "representative": "output"}, "valid: nearest, lowest"),
        ({"representative": "first"}, "representative is 'first'; valid: nearest, lowest, output"),
        ({"membership": "spectral"}, "membership is 'spectral'; valid: kmeans, kmedoids, agglomerative"),
    ],
)
def test_settings_that_exclude_each_other_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Chai(clusters=3, **settings)
    assert "\n" not in str(error.value)


def test_default_settings_do_no_extra_work(monkeypatch):
    """No output projection is read, no cost computed, no value gathered."""

    def fail(*_, **__):
        raise AssertionError

    for module, name in (
        ("chai.patching.clustered", "HeadOutputs"),
        ("chai.methods.chai", "head_costs"),
        ("chai.methods.chai", "clusters_by_cost"),
        ("chai.methods.chai", "feature_distances"),
    ):
        monkeypatch.setattr(f"{module}.{name}", fail)
    model = output_model("llama")
    for settings in ({}, {"membership": "agglomerative", "representative": "lowest", "features": "unmasked"}):
        assert clusters_after(model, Chai(clusters=COUNTS, **settings), make_batch([9, 6, 12]))[1] is not None


@pytest.mark.parametrize("settings", [*BY_OUTPUT.values(), {"metric": "cosine"}])
def test_clustering_can_be_timed(settings):
    Chai(clusters=COUNTS, **settings).clustering_timer(output_model("qwen2"), 2)()
