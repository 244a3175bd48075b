"""Sensitivity of each layer: against the slow oracle in float64, and the model untouched afterwards."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from chai.heads import HeadClusters
from chai.methods import Chai, Static
from chai.offline import sensitivity
from chai.offline.sensitivity import measure_sensitivity, measured_counts
from chai.patching.model_info import find_layers
from tests.chai.test_static import make_profile
from tests.models import HEADS, LAYERS, make_batch, make_latent_model, make_model
from tests.oracle import oracle

FAMILIES = ("llama", "opt", "gpt2", "falcon", "mistral_sliding", "gemma2", "qwen3")
EXACT = 5
TEXTS = 2


def texts(length: int = 13) -> Tensor:
    return make_batch([length] * TEXTS, seed=3)["input_ids"]


def random_clusters(k: int, seed: int) -> HeadClusters:
    generator = torch.Generator().manual_seed(seed)
    representatives = torch.randperm(HEADS, generator=generator)[:k].sort().values
    assignment = torch.randint(k, (HEADS,), generator=generator)
    assignment[representatives] = torch.arange(k)
    return HeadClusters(assignment[None], representatives[None])


def random_maps(counts=(1, 3, HEADS)) -> list[dict[int, HeadClusters]]:
    return [{k: random_clusters(k, 10 * layer + k) for k in counts} for layer in range(LAYERS)]


def divergence(reference: Tensor, changed: Tensor) -> Tensor:
    """``KL(p || q)`` of logits ``[N, T, V]`` in float64, mean of the tokens after the exact ones."""
    log_p, log_q = (logits[:, EXACT:].double().log_softmax(-1) for logits in (reference, changed))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_the_divergence_with_one_layer_on_its_representatives(family):
    """By the oracle in fp64, one head and one token at a time; 0 for as many clusters as heads."""
    model, maps, ids = make_model(family), random_maps(), texts()
    before = model(ids).logits
    exact = copy.deepcopy(model).double()
    reference = exact(ids, use_cache=False).logits
    found = dict(measure_sensitivity(model, ids, maps, EXACT))
    assert list(found) == list(range(LAYERS))
    for layer, values in found.items():
        assert list(values) == [1, 3, HEADS] and all(value.shape == (TEXTS,) for value in values.values())
        for k in (1, 3):
            own = maps[layer][k].repeat(TEXTS, ids.device)
            memberships = [(own.assignment, own.representatives) if index == layer else None for index in range(LAYERS)]
            with oracle(exact, memberships, tokens=EXACT):
                expected = divergence(reference, exact(ids, use_cache=False).logits)
            torch.testing.assert_close(values[k].double(), expected, rtol=1e-3, atol=3e-7)
            assert (values[k] > 2e-6).all()
        assert values[HEADS].abs().max() < 1e-6
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_it_is_that_of_the_static_method_on_one_layer(tmp_path):
    """All tokens clustered, as a static map is applied."""
    model, ids = make_model("llama"), texts()
    profile = make_profile(model, tmp_path)
    reference = model(ids).logits
    for layer in range(LAYERS):
        counts = [3 if index == layer else HEADS for index in range(LAYERS)]
        method = Static(clusters=counts, profile=profile)
        maps = [{3: method._profile.clusters(index, 3)} for index in range(LAYERS)]
        with method(model):
            changed = model(ids).logits
        ((_, values),) = measure_sensitivity(model, ids, maps, 0, skip=lambda index, own=layer: index != own)
        log_p, log_q = reference.double().log_softmax(-1), changed.double().log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
        torch.testing.assert_close(values[3].double(), expected, rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_layers_that_are_skipped_change_nothing():
    model, ids, maps = make_model("llama"), texts(), random_maps((2, 5))
    every = dict(measure_sensitivity(model, ids, maps, EXACT))
    some = dict(measure_sensitivity(model, ids, maps, EXACT, skip=lambda layer: layer == 1))
    assert list(some) == [0, 2]
    assert all(torch.equal(some[layer][k], every[layer][k]) for layer in some for k in (2, 5))


@torch.no_grad()
def test_the_layers_before_the_clustered_one_are_not_computed_again(monkeypatch):
    """A measurement of layer l runs the layers from l on: L passes of all layers become about L / 2."""
    model, ids, maps, ran = make_model("llama"), texts(), random_maps((2, 5)), []
    for index, layer in enumerate(find_layers(model)):
        forward = layer.mlp.forward
        monkeypatch.setattr(
            layer.mlp, "forward", lambda x, index=index, forward=forward: ran.append(index) or forward(x)
        )
    dict(measure_sensitivity(model, ids, maps, EXACT))
    assert ran == [0, 1, 2, *[0, 1, 2] * 2, *[1, 2] * 2, *[2] * 2]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_model_is_restored_after_an_exception(family, monkeypatch):
    """Of the pass itself, and of the code that consumes the measurements."""
    model, ids = make_model(family), texts()
    before, attributes = model(ids).logits, {name: set(vars(module)) for name, module in model.named_modules()}

    def is_untouched() -> bool:
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        return torch.equal(model(ids).logits, before)

    measured = measure_sensitivity(model, ids, random_maps((2,)), EXACT)
    next(measured)
    measured.close()
    assert is_untouched()

    real, calls = sensitivity.clustered_attention, []

    def fail(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(sensitivity, "clustered_attention", fail)
    with pytest.raises(ZeroDivisionError):
        dict(measure_sensitivity(model, ids, random_maps((2,)), EXACT))
    assert len(calls) == 2 and is_untouched()
    monkeypatch.undo()
    assert len(dict(measure_sensitivity(model, ids, random_maps((2,)), EXACT))) == LAYERS


def test_what_cannot_be_measured_is_one_line():
    model, ids = make_model("llama"), texts(EXACT)
    with pytest.raises(ValueError, match="texts have 5 tokens; valid: more than the 5 with all heads"):
        next(measure_sensitivity(model, ids, random_maps(), EXACT))
    with Chai(clusters=3)(model), pytest.raises(ValueError, match="applied"):
        next(measure_sensitivity(model, texts(), random_maps(), EXACT))
    with pytest.raises(ValueError, match="deepseek"):
        next(measure_sensitivity(make_latent_model(), texts(), random_maps(), EXACT))


def test_measured_counts_are_all_or_nine():
    assert measured_counts(1) == []
    assert measured_counts(9) == list(range(1, 9)) and measured_counts(12) == list(range(1, 12))
    for heads in (13, 16, 32, 40, 71):
        counts = measured_counts(heads)
        assert 8 <= len(counts) <= 9 and counts[0] >= 1 and counts[-1] < heads
        assert all(low < high for low, high in pairwise(counts))
