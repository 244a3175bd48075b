"""The library contract: methods against the slow oracle, against multi-head attention, and under generate()."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTJForCausalLM,
    StaticCache,
)

import chai.patching.clustered
from chai.cache import ClusteredCache, cache_bytes, cache_bytes_mha
from chai.cache.clustered import ClusteredLayer, ClusteringState
from chai.clustering.assignment import kmeans_clusters
from chai.methods import Chai, Mha, Random
from chai.patching.model_info import num_kv_heads
from tests.models import FAMILIES, HEADS, LAYERS, clusters_of, make_batch, make_model, relative_error
from tests.oracle import attend_one_by_one, oracle

COUNTS = [HEADS, 3, 2]  # one layer with k = H
WINDOWED = ("mistral_sliding", "gemma2", "gemma3")  # a window of fewer tokens than the samples have


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_the_oracle(family):
    """Batch 3, left padding, clusters in two layers: equal to the per-head fp64 loop over the same membership."""
    model, batch = make_model(family), make_batch([11, 14, 7])
    method = Chai(clusters=COUNTS)
    with method(model):
        cache = method.new_cache(model)
        logits = model(**batch, past_key_values=cache).logits
    found = clusters_of(cache)
    assert found[0] is None and all(item is not None for item in found[1:])
    exact = copy.deepcopy(model).double()
    with oracle(exact, found, tokens=5):
        expected = exact(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_heads_equal_multi_head_attention(family):
    """k = H: the same logits and the same generated tokens as the untouched model, batch 3 with left padding."""
    model, batch = make_model(family), make_batch([9, 12, 3])
    expected = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)
    with Chai(clusters=HEADS)(model):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_clustered_path_with_one_head_per_cluster_is_multi_head_attention(family, monkeypatch):
    """k = H through the clustered path itself (not the stock one) still gives the model's logits and tokens."""
    model, batch = make_model(family), make_batch([9, 12, 7])
    expected = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)

    def all_clustered(method, counts, config, reserve=0):
        state = ClusteringState((method, counts))
        return ClusteredCache(layers=[ClusteredLayer(state, index, num_kv_heads(config)) for index in range(LAYERS)])

    monkeypatch.setattr(chai.patching.clustered, "new_clustered_cache", all_clustered)
    with Chai(clusters=HEADS)(model):
        real = batch["attention_mask"].bool()
        assert relative_error(model(**batch).logits[real], expected[real]) < 1e-5
        assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 9, 12]], ids=["short", "mixed"])
@torch.no_grad()
def test_generate_equals_rescoring_from_scratch(family, lengths):
    """Token by token with a shrunken cache gives what one call over the whole text gives, for every row."""
    model, batch = make_model(family), make_batch(lengths)
    with Chai(clusters=COUNTS)(model):
        text = model.generate(**batch, max_new_tokens=10, do_sample=False)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
        steps = model.generate(
            **batch, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for row in range(3):
            own = text[row][mask[row].bool()][None]
            whole = model(own).logits[0, -11:-1]
            stepwise = torch.stack([logits[row] for logits in steps.logits])
            assert relative_error(stepwise, whole) < 1e-4


@torch.no_grad()
def test_result_does_not_depend_on_how_the_prompt_is_cut():
    """Chunks of any size, a short first chunk among them, give one call's logits; rows don't see each other."""
    model, batch = make_model("llama"), make_batch([16, 16])
    method = Chai(clusters=COUNTS)
    with method(model):
        whole = model(batch["input_ids"]).logits
        for sizes in ([2, 1, 13], [4, 4, 8], [5, 11], [1] * 16):
            cache, logits = method.new_cache(model), []
            for chunk in batch["input_ids"].split(sizes, 1):
                logits.append(model(chunk, past_key_values=cache).logits)
            assert relative_error(torch.cat(logits, 1), whole) < 1e-5
        alone = model(batch["input_ids"][1:]).logits
    assert relative_error(alone, whole[1:]) < 1e-5


@torch.no_grad()
def test_padding_changes_nothing_for_the_real_tokens():
    model = make_model("llama")
    long, short = make_batch([14, 8], side="left"), make_batch([14, 8], side="right")
    with Chai(clusters=COUNTS)(model):
        positions = (long["attention_mask"].cumsum(1) - 1).clamp(min=0)
        left = model(**long, position_ids=positions).logits[1, -8:]
        right = model(**short).logits[1, :8]
        alone = model(short["input_ids"][1:, :8]).logits[0]
    assert relative_error(left, alone) < 1e-5
    assert relative_error(right, alone) < 1e-5


def first_real_attention(model, batch, tokens: int = 5) -> list[torch.Tensor]:
    """For each layer ``[B, H, 25]``: the stock eager model's attention among each row's first real tokens."""
    previous = model.config._attn_implementation
    model.config._attn_implementation = "eager"  # set_attn_implementation leaves Falcon alone
    attentions = model(**batch, output_attentions=True).attentions
    model.config._attn_implementation = previous
    features = []
    for attention in attentions:
        rows = []
        for row in range(len(attention)):
            real = batch["attention_mask"][row].nonzero().squeeze(1)[:tokens]
            rows.append(attention[row][:, real][:, :, real].flatten(1))
        features.append(torch.stack(rows))
    return features


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WINDOWED])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_membership_is_that_of_the_stock_models_attention(family, side):
    """Seen from outside: the eager model's own attention among the first five real tokens gives the same clusters."""
    model, batch = make_model(family), make_batch([11, 14, 7], side=side)
    method = Chai(clusters=[4, 4, 4])
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
    # Later layers see the clustered layers below them; the first sees just what the stock model's first layer sees.
    points = first_real_attention(model, batch)[0]
    (expected,) = kmeans_clusters(points[None], [4])
    assert torch.equal(cache.clusters(0).assignment, expected.assignment)
    assert torch.equal(cache.clusters(0).representatives, expected.representatives)
    with Chai(clusters=[HEADS, HEADS, 4])(model):  # nothing clustered below the last layer
        last = DynamicCache()
        model(**batch, past_key_values=last)
    points = first_real_attention(model, batch)[2]
    (expected,) = kmeans_clusters(points[None], [4])
    assert torch.equal(ClusteredCache.of(last).clusters(2).assignment, expected.assignment)


@torch.no_grad()
def test_padding_between_turns_is_not_counted():
    """A conversation whose turns are padded on either side: memberships come from real tokens, wherever they stand."""
    model = make_model("llama")
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 97, (length,), generator=generator) for length in (12, 9)]
    first, second = [7, 3], [5, 6]  # real tokens of each row in either turn; row 1 has too few in the first
    for side in ("left", "right"):
        ids, mask = [], []
        for sizes, begins in ((first, [0, 0]), (second, first)):
            width = max(sizes)
            turn, real = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
            for row in range(2):
                where = slice(width - sizes[row], width) if side == "left" else slice(0, sizes[row])
                turn[row, where] = texts[row][begins[row] : begins[row] + sizes[row]]
                real[row, where] = 1
            ids.append(turn)
            mask.append(real)
        mask = torch.cat(mask, 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with Chai(clusters=COUNTS)(model):
            cache, width = DynamicCache(), ids[0].shape[1]
            model(ids[0], attention_mask=mask[:, :width], position_ids=positions[:, :width], past_key_values=cache)
            assert ClusteredCache.of(cache).clusters(1) is None
            logits = model(ids[1], attention_mask=mask, position_ids=positions[:, width:], past_key_values=cache).logits
            assert ClusteredCache.of(cache).clusters(1) is not None
            for row in range(2):
                alone = model(texts[row][None]).logits[0, first[row] :]
                assert relative_error(logits[row][mask[row, width:].bool()], alone) < 1e-5


@torch.no_grad()
def test_a_row_that_never_gets_five_tokens_stays_multi_head():
    model = make_model("llama")
    batch = make_batch([12, 3], side="right")
    expected = model(**batch).logits[1, :3]
    with Chai(clusters=COUNTS)(model):
        cache = DynamicCache()
        logits = model(**batch, past_key_values=cache).logits
    assert relative_error(logits[1, :3], expected) < 1e-6
    assert ClusteredCache.of(cache).clusters(1) is None
    assert cache_bytes(cache) == cache_bytes_mha(cache)


@torch.no_grad()
def test_a_copied_cache_goes_on_like_its_original():
    model, batch, method = make_model("llama"), make_batch([12, 12]), Chai(clusters=COUNTS)
    following = torch.tensor([[5], [6]])
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
        copied = copy.deepcopy(cache)
        expected = model(following, past_key_values=cache).logits
        assert torch.equal(model(following, past_key_values=copied).logits, expected)
    with Chai(clusters=COUNTS)(model):  # an equal method is the same method
        model(following, past_key_values=copied)


@torch.no_grad()
def test_a_sliding_windows_stock_cache_is_what_the_saving_is_counted_against():
    model, batch = make_model("mistral_sliding"), make_batch([20])
    stock = DynamicCache(config=model.config)
    model(**batch, past_key_values=stock)
    method = Chai(clusters=2)
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
    assert cache.nbytes_mha == sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)


@torch.no_grad()
def test_cache_holds_fewer_keys_and_says_so():
    model, batch = make_model("llama"), make_batch([12, 12])
    method = Chai(clusters=COUNTS)
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
        model(batch["input_ids"][:, :1], past_key_values=cache)
    assert [layer.keys.shape[1] for layer in cache.layers] == COUNTS
    assert [layer.values.shape[1] for layer in cache.layers] == [HEADS] * LAYERS
    live = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    full = 2 * LAYERS * 2 * HEADS * 13 * 8 * 4
    assert cache.nbytes == live == full * (2 * HEADS * LAYERS - (5 + 6)) // (2 * HEADS * LAYERS)
    assert cache.nbytes_mha == full
    for layer, k in enumerate(COUNTS[1:], 1):
        clusters = cache.clusters(layer)
        clusters.check()
        assert (clusters.num_heads, clusters.k) == (HEADS, k)


@torch.no_grad()
def test_grouped_keys_are_kept_while_a_representative_reads_them():
    model, batch = make_model("mistral"), make_batch([12, 12])
    method = Random(clusters=2, seed=3)
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
    for layer in range(LAYERS):
        needed = {int(head) // 2 for head in cache.clusters(layer).representatives[0]}
        assert cache.layers[layer].keys.shape[1] == len(needed)
    assert cache.nbytes < cache.nbytes_mha


@torch.no_grad()
def test_beams_reorder_memberships():
    """Beam search over rows of different memberships: each row gives what it gives alone."""
    model, batch = make_model("llama"), make_batch([12, 12, 12])
    with Chai(clusters=COUNTS)(model):
        together = model.generate(**batch, max_new_tokens=8, num_beams=3, do_sample=False)
        for row in range(3):
            alone = model.generate(batch["input_ids"][row : row + 1], max_new_tokens=8, num_beams=3, do_sample=False)
            assert torch.equal(together[row], alone[0])


@torch.no_grad()
def test_cache_rows_are_selected_repeated_cropped_and_reset():
    model, batch = make_model("llama"), make_batch([12, 12, 12])
    method = Chai(clusters=COUNTS)
    following = torch.tensor([[5], [6], [7]])
    with method(model):
        expected = model(torch.cat([batch["input_ids"], following], 1)).logits[:, -1]

        def prefilled():
            cache = method.new_cache(model)
            model(**batch, past_key_values=cache)
            return cache

        cache = prefilled()
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert relative_error(model(following[[2, 0]], past_key_values=cache).logits[:, -1], expected[[2, 0]]) < 1e-5
        cache = prefilled()
        cache.batch_repeat_interleave(2)
        repeated = model(following.repeat_interleave(2, 0), past_key_values=cache).logits[:, -1]
        assert relative_error(repeated, expected.repeat_interleave(2, 0)) < 1e-5
        cache = prefilled()
        model(following, past_key_values=cache)
        cache.crop(-1)
        assert relative_error(model(following, past_key_values=cache).logits[:, -1], expected) < 1e-5
        cache.reset()
        assert cache.nbytes == 0 and cache.clusters(1) is None
        model(**batch, past_key_values=cache)
        assert relative_error(model(following, past_key_values=cache).logits[:, -1], expected) < 1e-5
        early = method.new_cache(model)  # cropped before the membership is known
        model(batch["input_ids"][:, :4], past_key_values=early)
        early.crop(-2)
        model(batch["input_ids"][:, 2:], past_key_values=early)
        assert relative_error(model(following, past_key_values=early).logits[:, -1], expected) < 1e-5


@torch.no_grad()
def test_model_is_restored_also_after_an_exception():
    model, batch = make_model("llama"), make_batch([12, 9])
    before = model(**batch).logits
    with pytest.raises(KeyError), Chai(clusters=2)(model):
        raise KeyError
    with Chai(clusters=2)(model):
        with pytest.raises(IndexError):
            model(torch.full((1, 8), 10_000))
        assert not torch.equal(model(**batch).logits, before)
    assert torch.equal(model(**batch).logits, before)
    assert not model._forward_hooks and not model._forward_pre_hooks
    with Mha()(model):
        assert torch.equal(model(**batch).logits, before)


@torch.no_grad()
def test_a_dynamic_cache_of_the_caller_takes_our_layers_and_is_refused_elsewhere():
    model, batch = make_model("llama"), make_batch([12])
    cache = DynamicCache()
    method = Chai(clusters=2)
    with method(model):
        output = model(**batch, past_key_values=cache)
        assert cache.layers[0].keys.shape[1] == 2
        assert type(cache) is DynamicCache and output.past_key_values is cache
        model(batch["input_ids"][:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="inside `with method"):
        model(batch["input_ids"][:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="belongs to another"), Chai(clusters=3)(model):
        model(batch["input_ids"][:, :1], past_key_values=cache)
    with method(model):
        with pytest.raises(ValueError, match="StaticCache"):
            model(**batch, past_key_values=StaticCache(config=model.config, max_cache_len=32))
        assert model.model(**batch).last_hidden_state.shape[:2] == batch["input_ids"].shape  # the decoder alone
        with pytest.raises(RuntimeError, match="outside a call of the model"):
            hidden = torch.zeros(1, 4, 64)
            places = model.model.rotary_emb(hidden, torch.arange(4)[None])
            model.model.layers[0](hidden, position_embeddings=places)


@torch.no_grad()
def test_two_caches_and_two_threads_do_not_see_each_other():
    model, method = make_model("llama"), Chai(clusters=COUNTS)
    batches = [make_batch([20, 17], seed=seed) for seed in range(4)]
    results: dict[int, torch.Tensor] = {}
    with method(model):
        expected = [model.generate(**batch, max_new_tokens=16, do_sample=False) for batch in batches]

        def work(index: int) -> None:
            results[index] = model.generate(**batches[index], max_new_tokens=16, do_sample=False)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for index in range(4):
        assert torch.equal(results[index], expected[index])


@pytest.mark.parametrize(
    ("clusters", "message"),
    [([2, 2], "2 counts, the model has 3 layers"), (9, "valid: 1 to 8"), ("llama70b", "valid: llama7b_params")],
)
def test_wrong_counts_are_refused(clusters, message):
    with pytest.raises(ValueError, match=message):
        Chai(clusters=clusters)(make_model("llama"))


def test_other_families_are_refused_by_name():
    model = GPTJForCausalLM(GPTJConfig(vocab_size=10, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    with pytest.raises(ValueError, match="'gptj' is not supported; supported: llama"), Chai(clusters=1)(model):
        pass


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (FalconConfig(alibi=True), "alibi"),
        (GPT2Config(add_cross_attention=True), "add_cross_attention"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ],
)
def test_settings_that_change_the_attention_are_refused(config, setting):
    with pytest.raises(ValueError, match=f"has {setting}=true, which is not supported; valid: false"):
        Chai(clusters=1).check(config)


def test_attention_sinks_are_refused_by_name():
    model = make_model("llama")
    with Chai(clusters=2)(model), pytest.raises(ValueError, match="does not support attention sinks"):
        model(make_batch([9])["input_ids"], s_aux=torch.zeros(HEADS))


def test_applying_twice_is_refused():
    model = make_model("llama")
    with Chai(clusters=2)(model), pytest.raises(ValueError, match="applied to this model already"):
        Chai(clusters=2)(model).__enter__()


@torch.no_grad()
def test_release_variant_runs_and_takes_the_lowest_heads():
    model, batch = make_model("llama"), make_batch([12, 12])
    method = Chai(clusters=3, membership="agglomerative", representative="lowest", features="unmasked")
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
    clusters = cache.clusters(0)
    clusters.check()
    for row in range(2):
        for c in range(3):
            members = (clusters.assignment[row] == c).nonzero()
            assert int(clusters.representatives[row, c]) == int(members.min())


def test_oracle_is_multi_head_attention_without_clusters():
    """The oracle itself, against torch's own attention."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 6, 4, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, 6, 6)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    sources = torch.arange(4).expand(2, -1)
    expected = attend_one_by_one(query, key, value, 0.5, additive, sources, tokens=0)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.5, enable_gqa=True)
    assert relative_error(stock, expected) < 1e-6


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (2, 1), (3, 2), (4, 2), (7, 4)])
@torch.no_grad()
def test_group_aware_clusters_free_whole_key_heads(k, kept):
    """With four key heads of two query heads each, k representatives read no more than k / 2 of them, in every row."""
    model, batch = make_model("mistral"), make_batch([12, 9, 14])
    method = Chai(clusters=k, group_aware=True)
    with method(model):
        cache = method.new_cache(model)
        logits = model(**batch, past_key_values=cache).logits
        model.generate(**batch, max_new_tokens=5)
    assert [layer.keys.shape[1] for layer in cache.layers] == [kept] * LAYERS
    assert cache.nbytes * 2 * 4 == cache.nbytes_mha * (4 + kept)
    for layer in range(LAYERS):
        cache.clusters(layer).check()
    exact = copy.deepcopy(model).double()
    with oracle(exact, clusters_of(cache), tokens=5):
        expected = exact(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert relative_error(logits[real], expected[real]) < 1e-5
    assert f"to {kept} of 4 KV heads are kept" in method.note(model.config)


@pytest.mark.parametrize("name", ["membership", "representative", "features"])
def test_unknown_choices_are_refused_by_the_library(name):
    """A misspelt choice names the valid ones when the method is built, not in the middle of a request."""
    with pytest.raises(ValueError, match=f"{name} is 'kmean'; valid: .+, .+"):
        Chai(**{name: "kmean"})


def test_real_prefix_covers_the_warmup():
    """A benchmark clusters real tokens: as many as the method waits for, at most the whole context."""
    assert Chai().real_prefix(100) == 5
    assert Chai(tokens=10).real_prefix(100) == 10
    assert Chai(tokens=10).real_prefix(8) == 8
    assert Mha().real_prefix(100) == 5
