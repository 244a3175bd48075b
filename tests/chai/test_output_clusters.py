"""CHAI with other distances, and by the error of the output: clusters against loops in float64, calls, refusals."""

from __future__ import annotations

import copy
import json
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

import chai.patching.clustered
from chai.clustering.kmeans import cluster
from chai.clustering.medoids import medoid_clusters
from chai.errors import ChaiError
from chai.heads import HeadClusters, repeat_kv
from chai.methods import Chai, ChaiOutput, Random
from chai.offline.head_profile import HeadProfile, ProfileError, build_profile, model_shape, static_maps
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


# CHAI by the error of the output.


def as_lists(clusters: HeadClusters) -> tuple[list[int], list[int]]:
    return clusters.assignment[0].tolist(), clusters.representatives[0].tolist()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_without_a_prior_the_map_is_that_of_the_profile(family, joint, tmp_path):
    model, batch = output_model(family), make_batch([11, 14, 7])
    folder = profile_of(model, tmp_path, joint=joint)
    profile = HeadProfile.load(folder)
    for metric in ("output", "attention", "cosine"):
        method = ChaiOutput(profile=folder, metric=metric)
        assert method.heads_kept(model.config) == COUNTS
        found = clusters_after(model, method, batch)
        assert found[0] is None
        for layer in (1, 2):
            expected = profile.clusters(layer, COUNTS[layer], metric)
            for row in range(3):
                assert (found[layer][0][row].tolist(), found[layer][1][row].tolist()) == as_lists(expected)
    # The representatives are the k-medoids of the costs; joint products move members alone.
    labels, heads = medoid_clusters(profile.costs("output")[1:], np.array(COUNTS[1:]))
    for layer in (1, 2):
        k = COUNTS[layer]
        assert profile.clusters(layer, k, "output").representatives[0].tolist() == heads[layer - 1, :k].tolist()
        if not joint:
            assert profile.clusters(layer, k, "output").assignment[0].tolist() == labels[layer - 1].tolist()


def test_the_maps_that_are_measured_are_those_of_the_profile(tmp_path):
    model = output_model("qwen2")
    wanted = StatisticsOptions(
        LAYERS, HEADS, tokens=8, saved_samples=1, map_tokens=4, trace_tokens=6, trace_samples=1,
        metrics=("cosine", "output"), joint=True,
    )  # fmt: skip
    statistics = HeadStatistics(wanted)
    statistics.add(look(model, TEXTS, wanted, HeadOutputs(model)), [list(map(str, text)) for text in TEXTS])
    profile = build_profile(statistics, COUNTS, {"model": {"name": "small", **model_shape(model.config)}})
    for metric, kv_heads in (("output", None), ("output", 2), ("cosine", None), ("attention", None)):
        maps = static_maps(statistics, metric, [1, 2, 4], kv_heads)
        for layer in range(LAYERS):
            for k in (1, 2, 4):
                assert as_lists(maps[layer][k]) == as_lists(profile.clusters(layer, k, metric, kv_heads))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@torch.no_grad()
def test_the_first_tokens_are_exact(tokens, tmp_path):
    """Equal to multi-head attention; the token after them is not."""
    model, ids = output_model("llama"), make_batch([12, 12])["input_ids"]
    expected = model(ids).logits
    with ChaiOutput(profile=profile_of(model, tmp_path), tokens=tokens)(model):
        found = model(ids).logits
    torch.testing.assert_close(found[:, :tokens], expected[:, :tokens], atol=1e-5, rtol=1e-4)
    assert relative_error(found[:, tokens:], expected[:, tokens:]) > 1e-3


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_prior_leads_from_the_request_to_the_corpus(family, joint, tmp_path):
    """0: the request's own k-medoids; many tokens: the map of the corpus, with or without joint products."""
    model, batch = output_model(family), make_batch([11, 14, 7])
    folder = profile_of(model, tmp_path, joint=joint)

    def after(method):
        return clusters_after(model, method, batch)[1:]

    def same(one, other) -> bool:
        return all(torch.equal(*pair) for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True))

    own = after(Chai(clusters=COUNTS, metric="output", membership="kmedoids"))
    corpus = after(ChaiOutput(profile=folder))
    assert not same(own, corpus)
    assert same(after(ChaiOutput(profile=folder, prior=0.0)), own)
    assert same(after(ChaiOutput(profile=folder, prior=1e7)), corpus)


@pytest.mark.parametrize(("features", "divisor"), [("causal", 8), ("last_row", 1)])
def test_the_corpus_counts_by_the_token(features, divisor, tmp_path):
    """Costs ``(p E + e) / (p + n)``, E per token: of the last rows there is one in each text."""
    model, batch, prior = output_model("llama"), make_batch([9]), 3.0
    folder = profile_of(model, tmp_path, joint=False, features=features)
    profile = HeadProfile.load(folder)
    found = clusters_after(model, ChaiOutput(profile=folder, prior=prior, tokens=TOKENS), batch)
    own = reference_costs(model, batch["input_ids"][:, :TOKENS], "output")
    for layer in (1, 2):
        cost = prior * profile.costs("output")[layer] / divisor + own[layer]
        least = min(
            sum(cost[h, list(chosen)].min() for h in range(HEADS))
            for chosen in combinations(range(HEADS), COUNTS[layer])
        )
        assert medoid_cost(cost, *(part[0].tolist() for part in found[layer])) <= least * (1 + 2e-3)


@torch.no_grad()
def test_whole_key_heads_leave_the_cache(tmp_path):
    """8 query heads on 2 key heads: with k = 3 and 2 one key head is enough."""
    model, ids = output_model("qwen2"), make_batch([9])["input_ids"]
    folder = profile_of(model, tmp_path / "plain")
    told = profile_of(model, tmp_path / "aware", about={"sensitivity": {"group_aware": True}})
    held = {}
    for name, method in {
        "plain": ChaiOutput(profile=folder),
        "aware": ChaiOutput(profile=folder, group_aware=True),
        "by the profile": ChaiOutput(profile=told),
        "corrected": ChaiOutput(profile=told, prior=2.0),
        "refused": ChaiOutput(profile=told, group_aware=False),
    }.items():
        with method(model):
            store = method.new_cache(model)
            model(ids, past_key_values=store)
        held[name] = store.nbytes / (9 * 8 * 4)  # vectors of a token
        assert store.nbytes == method.expected_cache_bytes(model, store)
    assert held["aware"] == held["by the profile"] == held["corrected"] == 2 + 1 + 1 + 3 * 2
    assert held["plain"] == held["refused"] > held["aware"]


def test_what_is_missing_is_one_line(tmp_path):
    model = output_model("llama")
    with pytest.raises(ChaiError, match="a head profile of this model is needed") as error:
        ChaiOutput()
    assert error.value.remedy == "make_output_profile"
    without = profile_of(model, tmp_path / "without", metrics=(), joint=False)
    for method in (ChaiOutput, lambda **more: ChaiOutput(prior=1.0, **more)):
        with pytest.raises(
            ProfileError, match=r"no metric 'output'; valid: attention, or a profile with profile.metrics=\[output\]"
        ):
            method(profile=without)
    folder = profile_of(model, tmp_path / "with")
    with pytest.raises(ProfileError, match="no metric 'jensen_shannon'; valid: attention, cosine, output"):
        ChaiOutput(profile=folder, metric="jensen_shannon")
    for settings in ({"metric": "cosine", "prior": 1.0}, {"tokens": 0, "prior": 1.0}):
        with pytest.raises(ValueError, match="valid: metric=output, tokens >= 1"):
            ChaiOutput(profile=folder, **settings)
    with pytest.raises(ValueError, match=r"prior is -1.0; valid: 0 or more, measured, or null"):
        ChaiOutput(profile=folder, prior=-1.0)
    with pytest.raises(ValueError, match="tokens is -1; valid: 0 or more"):
        ChaiOutput(profile=folder, tokens=-1)
    with pytest.raises(ProfileError, match="model_type llama instead of opt"):
        ChaiOutput(profile=folder).check(make_model("opt").config)
    with pytest.raises(ValueError, match="9 clusters in a layer of 8 heads"):
        ChaiOutput(profile=folder, clusters=9).check(model.config)
    about = json.loads((tmp_path / "with" / "profile.json").read_text())
    (tmp_path / "with" / "profile.json").write_text(json.dumps(about | {"sha256": "0"}))
    with pytest.raises(ProfileError, match="damaged or truncated"):
        ChaiOutput(profile=folder)


def test_benchmarks_of_other_counts_need_no_profile(tmp_path):
    folder = profile_of(output_model("llama"), tmp_path)
    assert ChaiOutput(profile=folder, tokens=0).with_num_clusters(3) == Random(clusters=3)
    assert ChaiOutput(profile=folder).with_num_clusters(3) == Chai(clusters=3, tokens=5)
    corrected = ChaiOutput(profile=folder, prior=2.0, tokens=7)
    other = corrected.with_num_clusters(3)
    assert isinstance(other, Chai) and (other.clusters, other.tokens, other.needs_outputs) == (3, 7, True)
    corrected.clustering_timer(output_model("llama"), 2)()
