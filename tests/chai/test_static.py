"""Memberships from a profile: against the slow loop, for every row alike, and refused where they don't fit."""

from __future__ import annotations

import copy
import json
from itertools import combinations

import numpy as np
import pytest
import torch

from chai.methods import ChaiStatic, Random, Static
from chai.offline.head_profile import ProfileError, build_profile, model_shape
from chai.offline.head_statistics import HeadStatistics, StatisticsOptions
from experiments.offline.profile_heads import look
from tests.models import HEADS, LAYERS, make_batch, make_model
from tests.oracle import oracle

COUNTS = [HEADS, 3, 2]
TEXTS = [[3, 9, 11, 40, 7, 52, 31, 8], [60, 5, 5, 71, 16, 33, 90, 12], [18, 27, 44, 6, 81, 3, 29, 55]]


def make_profile(model, folder):
    """A profile of ``model`` on three texts, with these counts."""
    wanted = StatisticsOptions(
        layers=LAYERS,
        heads=HEADS,
        features="causal",
        tokens=8,
        saved_samples=1,
        map_tokens=4,
        trace_tokens=6,
        trace_samples=1,
    )
    statistics = HeadStatistics(wanted)
    statistics.add(look(model, TEXTS, wanted), [list(map(str, text)) for text in TEXTS])
    about = {"model": {"name": "small", "id": None, "fingerprint": None, **model_shape(model.config)}}
    folder.mkdir(exist_ok=True)
    build_profile(statistics, COUNTS, about).save(folder)
    return str(folder)


def all_partitions(items: list[int], k: int):
    """Every way to put the items into k groups."""
    if k == 1:
        yield [items]
    elif items:
        head, rest = items[0], items[1:]
        for size in range(len(rest) + 1):
            for others in combinations(rest, size):
                left = [item for item in rest if item not in others]
                if len(left) >= k - 1:
                    yield from ([[head, *others], *groups] for groups in all_partitions(left, k - 1))


def slow_features(model) -> list[np.ndarray]:
    """For each layer the heads' attention on all texts side by side, from the stock eager model, in fp64."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = exact(torch.tensor(TEXTS), output_attentions=True).attentions
    return [layer.transpose(0, 1).flatten(1).numpy() for layer in attentions]


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_the_membership_is_the_best_partition_of_the_activations(family, tmp_path):
    """k-means by trying every partition: none has a smaller error; representatives are nearest their mean."""
    model = make_model(family)
    method = Static(clusters=3, profile=make_profile(model, tmp_path))
    query = torch.zeros(LAYERS, 2, HEADS, 0, 1)
    found = method.cluster_heads(range(LAYERS), [3] * LAYERS, query, query, 1.0)
    for features, clusters in zip(slow_features(model), found, strict=True):

        def error(groups, points=features) -> float:
            return sum(((points[group] - points[group].mean(0)) ** 2).sum() for group in groups)

        clusters.check()
        assert torch.equal(clusters.assignment[0], clusters.assignment[1])
        groups = [(clusters.assignment[0] == label).nonzero()[:, 0].tolist() for label in range(3)]
        assert error(groups) <= 1.05 * min(error(groups) for groups in all_partitions(list(range(HEADS)), 3))
        for group, head in zip(groups, clusters.representatives[0].tolist(), strict=True):
            distances = ((features[group] - features[group].mean(0)) ** 2).sum(1)
            assert distances[group.index(head)] <= distances.min() * (1 + 1e-3)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@torch.no_grad()
def test_logits_and_generated_tokens_equal_the_oracle(family, tmp_path):
    """Left padding; the membership holds from the first token on and is the same for all rows."""
    model, batch = make_model(family), make_batch([11, 14, 2])
    folder = make_profile(model, tmp_path)
    exact = copy.deepcopy(model).double()
    for method in (ChaiStatic(profile=folder), Static(clusters=2, profile=folder)):
        with method(model):
            cache = method.new_cache(model)
            steps = model.generate(
                **batch, past_key_values=cache, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
        kept, found = method.heads_kept(model.config), []
        for layer, k in enumerate(kept):
            clusters = cache.clusters(layer)
            assert (clusters is None) == (k == HEADS)
            found.append(None if clusters is None else (clusters.assignment, clusters.representatives))
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
        for row in range(3):
            own = steps.sequences[row][mask[row].bool()][None]
            single = [None if item is None else tuple(tensor[row : row + 1] for tensor in item) for item in found]
            with oracle(exact, single, tokens=0):
                expected = exact(own, use_cache=False).logits[0, -7:-1]
            actual = torch.stack([logits[row] for logits in steps.logits]).double()
            assert float((actual - expected).norm() / expected.norm()) < 1e-4


@torch.no_grad()
def test_counts_are_the_profiles_or_ones_own(tmp_path):
    model = make_model("llama")
    folder = make_profile(model, tmp_path)
    assert ChaiStatic(profile=folder).heads_kept(model.config) == COUNTS
    assert Static(clusters=None, profile=folder).heads_kept(model.config) == COUNTS
    assert Static(profile=folder).heads_kept(model.config) == [4] * LAYERS
    assert Static(clusters=[8, 2, 1], profile=folder).heads_kept(model.config) == [8, 2, 1]
    with pytest.raises(ValueError, match="9 clusters in a layer of 8 heads"):
        Static(clusters=9, profile=folder).check(model.config)
    assert Static(profile=folder).with_num_clusters(3) == Random(clusters=3)
    for method, held in ((ChaiStatic(profile=folder), 8 + 3 + 2), (Static(clusters=2, profile=folder), 6)):
        with method(model):
            cache = method.new_cache(model)
            model(make_batch([9])["input_ids"], past_key_values=cache)
        assert cache.nbytes == 9 * 8 * 4 * (held + 3 * HEADS)
        assert cache.nbytes_mha == 9 * 8 * 4 * 6 * HEADS


def test_chai_static_is_static_with_the_profiles_counts(tmp_path):
    model = make_model("llama")
    folder = make_profile(model, tmp_path)
    query = torch.zeros(LAYERS, 1, HEADS, 0, 1)
    methods = (ChaiStatic(profile=folder), Static(clusters=COUNTS, profile=folder))
    for one, other in zip(
        *(own.cluster_heads(range(LAYERS), COUNTS, query, query, 1.0) for own in methods), strict=True
    ):
        assert torch.equal(one.assignment, other.assignment)
        assert torch.equal(one.representatives, other.representatives)


@pytest.mark.parametrize("cls", [Static, ChaiStatic])
def test_a_profile_is_needed_and_must_fit(cls, tmp_path):
    with pytest.raises(ValueError, match="a head profile of this model is needed"):
        cls()
    with pytest.raises(ProfileError, match="no profile in"):
        cls(profile=str(tmp_path / "nowhere"))
    folder = make_profile(make_model("llama"), tmp_path)
    with pytest.raises(ProfileError, match="model_type llama instead of opt"):
        cls(profile=folder).check(make_model("opt").config)
    about = json.loads((tmp_path / "profile.json").read_text())
    (tmp_path / "profile.json").write_text(json.dumps(about | {"sha256": "0"}))
    with pytest.raises(ProfileError, match="damaged or truncated"):
        cls(profile=folder)
