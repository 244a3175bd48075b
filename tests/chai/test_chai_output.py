"""CHAI by the error of the output: the map of the profile, its correction by a request, refusals."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from chai.clustering.medoids import medoid_clusters
from chai.errors import ChaiError
from chai.heads import HeadClusters
from chai.methods import Chai, ChaiOutput, Random
from chai.offline.head_profile import HeadProfile, ProfileError, build_profile, model_shape, static_maps
from chai.offline.head_statistics import HeadStatistics, StatisticsOptions
from chai.patching.outputs import HeadOutputs
from experiments.offline.profile_heads import look
from tests.chai.test_output_clusters import (
    COUNTS,
    TOKENS,
    clusters_after,
    medoid_cost,
    output_model,
    profile_of,
    reference_costs,
)
from tests.chai.test_static import TEXTS
from tests.models import HEADS, LAYERS, make_batch, make_model, relative_error


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
