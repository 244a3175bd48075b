"""Profiles on disk: whole or refused, and bound to their model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from chai.methods import Chai, Random
from chai.offline.head_profile import HeadProfile, ProfileError, build_profile, model_shape
from chai.offline.head_statistics import HeadStatistics, StatisticsOptions, gather
from tests.chai.kmeans_points import kmeans
from tests.models import HEADS, LAYERS, make_batch, make_model

COUNTS = [5, 3, HEADS]


@pytest.fixture
def profile() -> HeadProfile:
    model = make_model("llama")
    wanted = StatisticsOptions(LAYERS, HEADS, tokens=12, saved_samples=2, map_tokens=8, trace_tokens=6, trace_samples=2)
    statistics = HeadStatistics(wanted)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for _ in range(LAYERS):
            query, key = (2 * torch.randn(2, HEADS, 12, 8, generator=generator) for _ in range(2))
            layers.append(gather(query, key, 0.5, None, torch.tensor([12, 10]), wanted))
        statistics.add(layers, [["a"] * 12, ["b"] * 10])
    about = {"model": {"name": "little", "id": None, "fingerprint": "f", **model_shape(model.config)}, "rule": {}}
    return build_profile(statistics, COUNTS, about)


def test_a_profile_comes_back_as_it_was_saved(profile, tmp_path):
    profile.save(tmp_path)
    for path in (tmp_path, tmp_path / "profile.json", str(tmp_path / "profile.safetensors")):
        loaded = HeadProfile.load(path)
        assert loaded.num_clusters == COUNTS
        assert set(loaded.arrays) == set(profile.arrays)
        assert all(np.array_equal(loaded.arrays[name], array, equal_nan=True) for name, array in profile.arrays.items())
        assert loaded.about["saving"] == pytest.approx((1 - sum(COUNTS) / (LAYERS * HEADS)) / 2)


@pytest.mark.parametrize("k", [None, 1, 2, HEADS])
def test_static_membership_is_k_means_on_all_samples(profile, k):
    clusters = profile.clusters(1, k)
    clusters.check()
    assert clusters.k == (k or COUNTS[1])
    # Points with just these distances: an embedding of the mean distance matrix.
    distances = profile.arrays["distances"][1].astype(np.float64)
    centred = np.eye(HEADS) - 1 / HEADS
    values, vectors = np.linalg.eigh(-centred @ distances @ centred / 2)
    points = torch.from_numpy(vectors * np.sqrt(np.maximum(values, 0))).float()
    expected, _, _ = kmeans(points[None], clusters.k)
    together = clusters.assignment[0][:, None] == clusters.assignment[0]
    assert torch.equal(together, expected[0][:, None] == expected[0])


def test_static_clusters_of_every_number_are_saved(profile):
    for layer in range(LAYERS):
        for k in range(1, HEADS + 1):
            saved = profile.arrays["assignment_by_k"][layer, k - 1]
            assert saved.tolist() == profile.clusters(layer, k).assignment[0].tolist()
        chosen = profile.arrays["assignment_by_k"][layer, COUNTS[layer] - 1]
        assert chosen.tolist() == profile.arrays["assignment"][layer].tolist()


def test_a_profile_of_an_earlier_version_is_read(profile, tmp_path):
    new = ("assignment_by_k", "sample_error", "within", "between")
    assert set(new) <= set(profile.arrays)
    old = HeadProfile(profile.about, {name: array for name, array in profile.arrays.items() if name not in new})
    old.save(tmp_path)
    loaded = HeadProfile.load(tmp_path)
    assert loaded.num_clusters == COUNTS and not set(new) & set(loaded.arrays)
    assert Chai(profile=str(tmp_path)).heads_kept(make_model("llama").config) == COUNTS


@torch.no_grad()
def test_methods_take_their_counts_from_a_profile(profile, tmp_path):
    profile.save(tmp_path)
    model, batch = make_model("llama"), make_batch([12])
    for cls in (Chai, Random):
        method = cls(clusters=2, profile=str(tmp_path))
        assert method.heads_kept(model.config) == COUNTS
        with method(model):
            cache = method.new_cache(model)
            model(**batch, past_key_values=cache)
        assert [layer.keys.shape[1] for layer in cache.layers] == COUNTS
    with pytest.raises(ValueError, match="neither clusters nor a profile"):
        Chai().heads_kept(model.config)


def test_a_profile_of_another_shape_is_refused(profile, tmp_path):
    profile.save(tmp_path)
    method = Chai(profile=str(tmp_path))
    with pytest.raises(ProfileError, match="of another model, little: model_type llama instead of opt"):
        method.check(make_model("opt").config)
    with pytest.raises(ProfileError, match="key_heads 8 instead of 2"), method(make_model("qwen2")):
        pass


def damage(folder, how: str) -> None:
    tensors, about = folder / "profile.safetensors", folder / "profile.json"
    content = json.loads(about.read_text())
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-50])
    elif how == "half":
        tensors.unlink()
    elif how == "no json":
        about.write_text(about.read_text()[:40])
    elif how == "format":
        about.write_text(json.dumps(content | {"format": 99}))
    elif how == "empty":
        about.unlink()
    elif how == "contradiction":
        content["model"]["heads"] = 4
        about.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "damaged or truncated"),
        ("half", "cannot be read: No such file"),
        ("no json", "cannot be read"),
        ("format", "is not a profile of format 1"),
        ("empty", "no profile in .*has no profile.json"),
        ("contradiction", "is inconsistent"),
    ],
)
def test_a_damaged_profile_is_one_line(profile, tmp_path, how, message):
    profile.save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ProfileError, match=message) as caught:
        Chai(profile=str(tmp_path))
    assert "\n" not in str(caught.value)
