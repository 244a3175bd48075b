"""CHAI-QKV: one output a cluster, against the slow fp64 loop, under generate(), and in the cache's live bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chai.patching.clustered
import chai.patching.projections
from chai.attention import shared_value_attention
from chai.heads import HeadClusters, KVHeadMap, take_heads
from chai.methods import Chai, ChaiQkv
from chai.patching.model_info import layer_shape
from tests.chai.test_generation import FORMS
from tests.models import FAMILIES, HEADS, clusters_of, make_batch, make_model, relative_error
from tests.oracle import attend_one_by_one, oracle

COUNTS = [HEADS, 3, 2]  # one layer with k = H


def random_clusters(rows: int, heads: int, k: int) -> HeadClusters:
    representatives = torch.stack([torch.randperm(heads)[:k].sort().values for _ in range(rows)])
    assignment = torch.randint(k, (rows, heads))
    assignment.scatter_(1, representatives, torch.arange(k).expand(rows, -1))
    return HeadClusters(assignment, representatives)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3), key_heads=st.integers(1, 3), group=st.integers(1, 3), count=st.integers(1, 5),
    before=st.integers(0, 4), seed=st.integers(0, 99), masked=st.booleans(), stored=st.booleans(), data=st.data(),
)  # fmt: skip
def test_attention_equals_the_slow_loop(rows, key_heads, group, count, before, seed, masked, stored, data):
    """Any shape, grouped queries or not, all heads in the cache or only those that are read, a mask or none."""
    torch.manual_seed(seed)
    heads, length, size = key_heads * group, before + count, 4
    clusters = random_clusters(rows, heads, data.draw(st.integers(1, heads)))
    query = torch.randn(rows, heads, count, size, dtype=torch.float64)
    key, value = torch.randn(2, rows, key_heads, length, size, dtype=torch.float64)
    seen = torch.ones(count, length, dtype=torch.bool).tril(before).expand(rows, 1, -1, -1).clone()
    if masked and before:
        seen[0, :, :, 0] = False
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    sources = clusters.representatives.gather(1, clusters.assignment)
    expected = attend_one_by_one(query, key, value, 0.7, additive, sources, tokens=-length, shared_values=True)
    plan = (KVHeadMap.only_read if stored else KVHeadMap.all_stored)(clusters, key_heads)
    chosen = take_heads(query, clusters.representatives)
    kept = [take_heads(tensor, plan.stored) for tensor in (key, value)]
    actual = shared_value_attention(chosen, *kept, plan, 0.7, seen if masked else None)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "side"), [*((family, "left") for family in FAMILIES), ("llama", "right")])
@torch.no_grad()
def test_logits_equal_the_oracle(family, side):
    """Padded rows, whose memberships open and close at different tokens."""
    model, batch = make_model(family), make_batch([11, 14, 7], side=side)
    method = ChaiQkv(clusters=COUNTS)
    with method(model):
        cache = method.new_cache(model)
        logits = model(**batch, past_key_values=cache).logits
    exact = copy.deepcopy(model).double()
    with oracle(exact, clusters_of(cache), tokens=5, shared_values=True):
        expected = exact(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_in_one_pass_is_the_same_as_one_that_is_cut(family):
    model, batch = make_model(family), make_batch([14, 14, 14])
    method, found = ChaiQkv(clusters=COUNTS), []
    for one_pass in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chai.patching.clustered._Requests, "in_one_pass", lambda *_, answer=one_pass: answer)
            with method(model):
                cache = method.new_cache(model)
                logits = model(**batch, past_key_values=cache).logits
                more = model(batch["input_ids"][:, 3:9], past_key_values=cache).logits
        found.append((logits, more, cache.nbytes))
    assert relative_error(found[0][0], found[1][0]) < 1e-5
    assert relative_error(found[0][1], found[1][1]) < 1e-5
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@torch.no_grad()
def test_the_first_tokens_keep_their_multi_head_outputs(family):
    model, batch = make_model(family), make_batch([12])
    expected = model(**batch).logits
    with ChaiQkv(clusters=2)(model):
        actual = model(**batch).logits
    torch.testing.assert_close(actual[:, :5], expected[:, :5], rtol=1e-4, atol=1e-4)
    assert relative_error(actual[:, 5:], expected[:, 5:]) > 1e-2


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 9, 12]], ids=["short", "mixed"])
@torch.no_grad()
def test_generated_tokens_score_as_the_oracle_scores_them(family, lengths):
    """Each step's logits, from a cache that shrank on the way, are those of one fp64 pass over the row's whole text."""
    model, batch = make_model(family), make_batch(lengths)
    exact, method = copy.deepcopy(model).double(), ChaiQkv(clusters=COUNTS)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with method(model):
        cache = method.new_cache(model)
        steps = model.generate(**batch, past_key_values=cache, **options)
    found, mask = clusters_of(cache), torch.nn.functional.pad(batch["attention_mask"], (0, 8), value=1)
    for row in range(3):
        own = steps.sequences[row][mask[row].bool()][None]
        single = [None if item is None else tuple(tensor[row : row + 1] for tensor in item) for item in found]
        with oracle(exact, single, tokens=5, shared_values=True):
            whole = exact(own, use_cache=False).logits[0, -9:-1]
        stepwise = torch.stack([logits[row] for logits in steps.logits])
        assert relative_error(stepwise, whole) < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_every_form_of_generation_is_what_scoring_from_scratch_gives(form, family):
    """Beams, several sequences, chunks of a prompt: the token scores are those of the text alone."""
    model, batch = make_model(family), make_batch([9, 12, 3])
    with ChaiQkv(clusters=COUNTS)(model):
        made = model.generate(
            **batch, max_new_tokens=8, return_dict_in_generate=True, output_logits=True, output_scores=True,
            **FORMS[form],
        )  # fmt: skip
        beams = getattr(made, "beam_indices", None)
        copies = len(made.sequences) // 3
        for row, sequence in enumerate(made.sequences):
            prompt = batch["attention_mask"][row // copies]
            own = sequence[torch.nn.functional.pad(prompt, (0, 8), value=1).bool()][None]
            whole = model(own).logits[0, -9:-1]
            picked = [row] * 8 if beams is None else beams[row, :8].tolist()
            stepwise = torch.stack([logits[index] for logits, index in zip(made.logits, picked, strict=True)])
            assert relative_error(stepwise, whole) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_heads_equal_multi_head_attention(family):
    model, batch = make_model(family), make_batch([9, 12, 3])
    expected = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=10, do_sample=False)
    with ChaiQkv(clusters=HEADS)(model):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(**batch, max_new_tokens=10, do_sample=False), tokens)


@torch.no_grad()
def test_chunks_conversations_and_crops_go_on_with_the_cache():
    model, text = make_model("llama"), make_batch([16, 16])["input_ids"]
    method = ChaiQkv(clusters=COUNTS)
    with method(model):
        whole = model(text).logits
        for sizes in ([2, 1, 13], [5, 11], [1] * 16):
            cache, logits = method.new_cache(model), []
            for chunk in text.split(sizes, 1):
                logits.append(model(chunk, past_key_values=cache).logits)
                if cache.state.is_clustered or cache.get_seq_length() < 4:  # else a guess would fix the clusters
                    guess = text[:, : 3 if cache.state.is_clustered else 1]
                    model(guess, past_key_values=cache)
                    cache.crop(-guess.shape[1])
            assert relative_error(torch.cat(logits, 1), whole) < 1e-5
            assert cache.get_seq_length() == 16


@torch.no_grad()
def test_half_precision_decodes_as_single_does():
    model, method = make_model("qwen2").to(torch.bfloat16), ChaiQkv(clusters=COUNTS)
    batch = make_batch([14, 6, 9])
    exact = copy.deepcopy(model).double()
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        actual = model(torch.full((3, 1), 7), attention_mask=mask, past_key_values=cache).logits[:, -1]
    found = clusters_of(cache)
    assert found[1] is not None
    with oracle(exact, found, tokens=5, shared_values=True):
        ids = torch.cat([batch["input_ids"], torch.full((3, 1), 7)], 1)
        expected = exact(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    assert relative_error(actual, expected) < 0.1


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "qwen3"])
@torch.no_grad()
def test_values_leave_the_cache_with_their_keys(family):
    """To the byte; CHAI keeps them, and both say the same of multi-head attention."""
    model, batch = make_model(family), make_batch([20])["input_ids"]
    own, chai_own = (cls(clusters=[HEADS, 4, 2], group_aware=True) for cls in (ChaiQkv, Chai))
    caches = []
    for method in (own, chai_own):
        with method(model):
            cache = method.new_cache(model)
            model(batch, past_key_values=cache)
            model(batch[:, :1], past_key_values=cache)
        caches.append(cache)
    key_heads = 4 if family == "qwen3" else HEADS
    kept = [key_heads, 4 * key_heads // HEADS, 2 * key_heads // HEADS]
    head = 21 * 8 * 4  # tokens, size, bytes of a number
    assert caches[0].nbytes == 2 * sum(kept) * head
    assert caches[1].nbytes == (sum(kept) + 3 * key_heads) * head
    assert caches[0].nbytes_mha == caches[1].nbytes_mha == 6 * key_heads * head
    shape = layer_shape(model, shares_values=True)
    assert caches[0].nbytes == 4 * sum(shape.cache_entries(21, k) for k in (HEADS, 4, 2))
    assert own.heads_kept(model.config) == [HEADS, 4, 2]


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@torch.no_grad()
def test_only_the_values_that_are_kept_are_projected(family, monkeypatch):
    model, ids, done = make_model(family), make_batch([12])["input_ids"], []

    def count(hidden, linear, heads, size):
        done.append(names[id(linear)])
        return real(hidden, linear, heads, size)

    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    real = chai.patching.projections.project_heads
    monkeypatch.setattr(chai.patching.projections, "project_heads", count)
    monkeypatch.setattr(chai.patching.projections, "OVERHEAD", 0)  # or these tiny matrices aren't worth it
    monkeypatch.setattr(chai.patching.clustered._Requests, "in_one_pass", lambda *_: False)  # which projects all heads
    for cls, expected in ((Chai, {"q_proj", "k_proj"}), (ChaiQkv, {"q_proj", "k_proj", "v_proj"})):
        done.clear()
        with cls(clusters=2, group_aware=True)(model):
            model(ids)
        assert set(done) == expected


def test_a_grouped_query_model_is_told_what_it_saves():
    config = make_model("qwen3").config
    assert "saves 37.5 %" in Chai(clusters=2, group_aware=True).note(config)
    assert "saves 75.0 %" in ChaiQkv(clusters=2, group_aware=True).note(config)
