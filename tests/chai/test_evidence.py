"""The weight of the corpus against a request's first tokens, chosen on texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chai.methods.chai_output import ChaiOutput
from chai.offline.evidence import EVIDENCE_TOKENS, PRIORS, choose_prior
from chai.offline.head_profile import HeadProfile, ProfileError
from chai.patching.clustered import _Requests
from tests.chai.test_output_clusters import clusters_after, output_model, profile_of
from tests.models import make_batch

HEADS, TEXTS, LENGTH, TOKENS = 8, 40, 60, 5
GROUPS = np.array([[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3]])


def errors(topics: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the first tokens and of all of them; heads of a group, which the text's topic decides, cost nothing."""
    generator = np.random.default_rng(0)
    early, whole = [], []
    for text in range(TEXTS):
        groups = GROUPS[text % topics]
        base = (groups[:, None] != groups[None]).astype(float)
        each = base + np.abs(generator.normal(0, noise, (LENGTH, HEADS, HEADS)))
        each[:, np.arange(HEADS), np.arange(HEADS)] = 0
        early.append(each[:TOKENS].sum(0))
        whole.append(each.sum(0))
    return np.array(early), np.array(whole)


def prior_of(early: np.ndarray, whole: np.ndarray) -> float:
    lengths = np.full(TEXTS, float(LENGTH))
    return choose_prior(early, whole, lengths, whole.sum(0), TEXTS * LENGTH, 4, TOKENS)


def test_requests_with_groups_of_their_own_count_and_others_do_not():
    assert prior_of(*errors(topics=2, noise=0.3)) in PRIORS[:3]
    assert np.isinf(prior_of(*errors(topics=1, noise=2.0)))
    # The noisier the tokens are, the more the corpus counts.
    quiet, noisy = (prior_of(*errors(topics=2, noise=noise)) for noise in (0.1, 2.0))
    assert quiet <= noisy < np.inf


def test_without_texts_that_go_on_the_corpus_decides():
    early, whole = errors(topics=2, noise=0.3)
    assert np.isinf(choose_prior(early, whole, np.full(TEXTS, 5.0), whole.sum(0), 200.0, 4, TOKENS))


def test_a_method_takes_the_weight_of_each_layer_from_the_profile(tmp_path, monkeypatch):
    model, batch = output_model("llama"), make_batch([11, 14, 7])
    folder = profile_of(model, tmp_path)
    profile = HeadProfile.load(folder)
    assert all(np.isinf(profile.prior(layer, 3, TOKENS)) for layer in range(3))  # of a single text
    kept = profile.arrays["early_output"]
    assert kept.shape[1:3] == (3, len(EVIDENCE_TOKENS))
    np.testing.assert_allclose(kept[:, :, -1], profile.arrays["whole_output"], rtol=1e-4, atol=1e-6)  # shorter texts
    monkeypatch.setattr(
        HeadProfile, "prior", lambda self, layer, k, tokens: {1: np.inf, 2: 0.0}[layer] if k > 1 else 0.0
    )
    found = clusters_after(model, ChaiOutput(profile=folder, prior="measured"), batch)
    corpus, own = (clusters_after(model, ChaiOutput(profile=folder, prior=prior), batch) for prior in (None, 0.0))
    for layer, expected in ((1, corpus), (2, own)):
        assert all(map(np.array_equal, found[layer], expected[layer]))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_layers_with_different_weights_do_not_depend_on_how_the_prompt_is_cut(family, tmp_path, monkeypatch):
    """In one pass each layer is clustered by itself, else all layers together."""
    model, ids = output_model(family), make_batch([16, 16])["input_ids"]
    method = ChaiOutput(profile=profile_of(model, tmp_path, joint=True), prior="measured")
    monkeypatch.setattr(HeadProfile, "prior", lambda self, layer, k, tokens: 0.0 if layer == 2 else 4.0)
    found = []
    for one_pass in (True, False):
        monkeypatch.setattr(_Requests, "in_one_pass", lambda *_, own=one_pass: own)
        found.append(clusters_after(model, method, {"input_ids": ids}))
    for one, other in zip(*(clusters[1:] for clusters in found), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_a_number_of_tokens_that_was_not_kept_is_one_line(tmp_path):
    folder = profile_of(output_model("llama"), tmp_path)
    with pytest.raises(ProfileError, match=r"cannot weigh 7 warm-up tokens; valid: 5, 16, 32, 64") as error:
        ChaiOutput(profile=folder, prior="measured", tokens=7)
    assert "\n" not in str(error.value)
