"""SpAtten against a slow loop over tokens, against multi-head attention, and what its cache holds."""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, StaticCache
from transformers.masking_utils import eager_mask

import chai.methods.spatten
from chai.cache.buffer import ROUND
from chai.cache.cascade import CascadeCache
from chai.methods import Chai, Mha, Spatten
from chai.methods.spatten import LINEAR, schedule
from chai.patching.apply import switched_attention
from chai.patching.cascade import keep_top
from chai.patching.model_info import find_layers, logit_weights
from experiments.runs.identity import SPATTEN
from tests.models import FAMILIES, HEADS, LAYERS, make_batch, make_model

NAME = "oracle_cascade"
UNWINDOWED = [family for family in FAMILIES if family not in ("mistral_sliding", "gemma2", "gemma3")]
#: Prunes tokens, heads and values from the second layer on.
HARD = Spatten(tokens=0.4, heads=0.5, values=0.7, unpruned_tokens=0.0, unpruned_heads=0.0)
PER_ROW = replace(HARD, pruning="per_row")
BOTH = pytest.mark.parametrize("method", [HARD, PER_ROW], ids=["global", "per_row"])


def best(scores: dict[int, float], count: int, always: int | None = None) -> set[int]:
    """The largest, ties by lowest index; scores in the same step of 2^-16 of the largest are equal."""
    largest = max(max(scores.values()), 1e-30)
    rounded = {item: math.inf if item == always else round(score / largest * 2**16) for item, score in scores.items()}
    return set(sorted(scores, key=lambda item: (-rounded[item], item))[:count])


def up(value: float) -> int:
    return max(1, math.ceil(value - 1e-9))


class Loop:
    """One sequence, told one layer after the other, in fp64 and plain Python; it counts its products."""

    def __init__(self, real: list[int], context: int, rule) -> None:
        self.real, self.rule = real, rule
        self.context, self.last = real[:context], real[context - 1]
        self.counts: list[Counter[str]] = []  # of each layer, over the context's tokens

    def attend(self, out, i, seen, has, query, key, value, scaling, softcap):
        """Write the outputs of token ``i``; return the attention it gives, and the magnitude of each of its heads."""
        group, columns = HEADS // len(key), sorted(seen)
        votes, sizes = dict.fromkeys(self.real, 0.0), dict.fromkeys(range(HEADS), 0.0)
        out[:, i] = 0
        for h in has:
            scores = torch.stack([scaling * torch.dot(query[h, i], key[h // group, j]) for j in columns])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = dict(zip(columns, torch.softmax(scores, 0).tolist(), strict=True))
            read = best(weights, up(self.rule.values * len(columns)))
            for j in read:
                out[h, i] += weights[j] * value[h // group, j]
            for j in columns:
                votes[j] += weights[j]
            sizes[h] = float(out[h, i].abs().sum())
            if i <= self.last:
                self.counts[-1].update(query=1, score=len(columns), value=len(read), output=1)
        return votes, sizes


class GlobalLoop(Loop):
    """The published algorithm (Algorithm 1): a token that is pruned has no row, so its output is NaN from there on."""

    def __init__(self, real: list[int], context: int, rule) -> None:
        super().__init__(real, context, rule)
        self.tokens, self.heads = set(self.context), set(range(HEADS))
        self.s_t, self.s_h = dict.fromkeys(self.context, 0.0), dict.fromkeys(range(HEADS), 0.0)

    def layer(self, index, query, key, value, scaling, softcap=None):
        """``[H, T, D]`` each (keys and values by group) to the outputs ``[H, T, D]``."""
        out = torch.full((*query.shape[:2], value.shape[2]), torch.nan, dtype=torch.float64)
        if index:  # Algorithm 1 ends each layer with the choice for the next
            kept = up(self.rule.tokens[index] * len(self.context))
            self.tokens = best({j: self.s_t[j] for j in self.tokens}, kept, always=self.last)
            self.heads = best({h: self.s_h[h] for h in self.heads}, self.rule.heads[index])
        self.counts.append(Counter(row=len(self.tokens), key=len(self.tokens) * len(self.heads)))
        for i in self.real:
            if i > self.last or i in self.tokens:
                seen = {j for j in self.real if j <= i and (j > self.last or j in self.tokens)}
                votes, sizes = self.attend(out, i, seen, self.heads, query, key, value, scaling, softcap)
                for j in self.context if i <= self.last else ():
                    self.s_t[j] += votes[j]
                for h in range(HEADS) if i <= self.last else ():
                    self.s_h[h] += sizes[h]
        return out


class PerRowLoop(Loop):
    """A choice for each token of the context."""

    def __init__(self, real: list[int], context: int, rule) -> None:
        super().__init__(real, context, rule)
        self.seen = {i: {j for j in real if j <= i} for i in self.context}
        self.has = {i: set(range(HEADS)) for i in self.context}
        self.given = {i: dict.fromkeys(real, 0.0) for i in self.context}  # S[i][j]
        self.size = {i: dict.fromkeys(range(HEADS), 0.0) for i in self.context}  # G[i][h]

    def layer(self, index, query, key, value, scaling, softcap=None):
        """``[H, T, D]`` each (keys and values by group) to the outputs ``[H, T, D]``."""
        out = torch.zeros(*query.shape[:2], value.shape[2], dtype=torch.float64)
        share, heads = self.rule.tokens[index], self.rule.heads[index]
        for i in self.context:
            if share < 1:
                count = up(share * len([j for j in self.real if j <= i]))
                self.seen[i] = best({j: self.given[i][j] for j in self.seen[i]}, count, always=i)
            if heads < HEADS:
                self.has[i] = best({h: self.size[i][h] for h in self.has[i]}, heads)
        self.counts.append(Counter(row=len(self.context), key=len(self.context) * HEADS))
        last, votes, sizes = self.last, {}, {}
        for i in self.real:
            later = {j for j in self.real if last < j <= i}
            seen, has = (self.seen[i], self.has[i]) if i <= last else (self.seen[last] | later, self.has[last])
            votes[i], sizes[i] = self.attend(out, i, seen, has, query, key, value, scaling, softcap)
        for i in self.context:
            for before in [other for other in self.context if other <= i]:
                for j in self.real:
                    self.given[i][j] += votes[before][j]
                for h in range(HEADS):
                    self.size[i][h] += sizes[before][h]
        return out


def slow(model, batch, contexts, method):
    """Return the logits, and the loop over each row."""
    exact, kind = copy.deepcopy(model).double(), GlobalLoop if method.pruning == "global" else PerRowLoop
    rows = [
        kind(mask.nonzero()[:, 0].tolist(), context, method.rule(model.config))
        for mask, context in zip(batch["attention_mask"], contexts, strict=True)
    ]

    def forward(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        out = torch.stack(
            [row.layer(module.layer_idx, query[b], key[b], value[b], scaling, softcap) for b, row in enumerate(rows)]
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, eager_mask)
    with switched_attention(exact, NAME):
        return exact(**batch, use_cache=False).logits, rows


def check_against_loop(model, lengths, contexts, method, side, seed=0):
    batch = make_batch(lengths, seed, side)
    with method(model):
        cache = method.new_cache(model)
        cache.contexts = torch.tensor(contexts)
        logits = model(**batch, past_key_values=cache).logits
    expected, rows = slow(model, batch, contexts, method)
    # Of a context under global pruning, the tokens that the last layer keeps have logits.
    has_logits = batch["attention_mask"].bool() & ~expected.isnan().any(-1)
    for own, row in zip(has_logits, rows, strict=True):
        assert own[[i for i in row.real if i >= row.last]].all()
        assert method.pruning == "global" or own[row.real].all()
    torch.testing.assert_close(logits[has_logits].double(), expected[has_logits], rtol=2e-4, atol=2e-4)


@BOTH
@pytest.mark.parametrize("family", UNWINDOWED)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_the_slow_loop(family, side, method):
    check_against_loop(make_model(family), [9, 11, 5], [6, 11, 2], method, side)


@settings(max_examples=24, deadline=None)
@example(  # heads that tie
    rows=[(2, 2)], shares=(0.1, 0.1, 0.6), unpruned=0.0, family="qwen2", side="left", seed=1, pruning="per_row"
)
@given(
    rows=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3),
    shares=st.tuples(*[st.sampled_from([0.1, 0.35, 0.6, 1.0])] * 3),
    unpruned=st.sampled_from([0.0, 0.5]),
    family=st.sampled_from(["llama", "qwen2"]),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
    pruning=st.sampled_from(["global", "per_row"]),
)
@torch.no_grad()
def test_any_batch_equals_the_slow_loop(rows, shares, unpruned, family, side, seed, pruning):
    tokens, heads, values = shares
    if shares == (1.0, 1.0, 1.0):
        values = 0.5
    method = Spatten(tokens, heads, values, unpruned, unpruned, pruning)
    lengths = [context + more for context, more in rows]
    check_against_loop(make_model(family, seed), lengths, [context for context, _ in rows], method, side, seed)


@BOTH
@torch.no_grad()
def test_importance_decides_and_not_the_order(method):
    """Early tokens are seen by more tokens; only sharp attention makes late ones the most important of a context."""
    model = make_model("llama", 6)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(40)
    check_against_loop(model, [16, 13], [16, 12], method, "left", 6)
    with method(model):
        cache = method.new_cache(model)
        model(**make_batch([16], 6), past_key_values=cache)
    kept = sorted(cache.layers[2].positions[0].tolist())
    assert kept[-1] == 15 and kept[:-1] != list(range(len(kept) - 1))


def test_candidates_of_the_largest_scores():
    scores, left = torch.tensor([[1.0, 5.0, 3.0, 0.5, 5.0]]), torch.tensor([[True, True, True, True, False]])
    assert keep_top(scores, left, torch.tensor([2])).tolist() == [[False, True, True, False, False]]
    always = torch.tensor([[False, False, False, True, True]])  # a candidate, and one that is none
    assert keep_top(scores, left, torch.tensor([2]), always).tolist() == [[False, True, False, True, False]]


@BOTH
@pytest.mark.parametrize("context", [1, 7, 12])
@torch.no_grad()
def test_operations_are_the_products_of_the_slow_loop(method, context):
    """Rows of queries, keys, values, outputs and MLP, and pairs of tokens in every head, each counted as it runs."""
    model, batch = make_model("llama"), make_batch([context])
    _, (row,) = slow(model, batch, [context], method)
    hidden, size, neurons = model.config.hidden_size, 8, model.config.intermediate_size
    products = 0
    for count in row.counts:
        products += (count["query"] + 2 * count["key"] + count["output"]) * hidden * size  # W_Q, W_K and W_V, W_O
        products += count["row"] * 3 * hidden * neurons + (count["score"] + count["value"]) * size
    assert method.prompt_flops(model, context) == 2 * products + 2 * logit_weights(model)


@pytest.mark.parametrize("family", UNWINDOWED)
@torch.no_grad()
def test_rows_of_pruned_tokens_are_read_by_nobody(family):
    """Noise in the hidden states of tokens after their pruning changes neither logits nor cache."""
    model, batch = make_model(family), make_batch([15, 12])
    contexts, layers = torch.tensor([12, 9]), find_layers(model)

    def outcome():
        cache = HARD.new_cache(model)
        cache.contexts = contexts
        return model(**batch, past_key_values=cache).logits, cache

    def add_noise(kept):
        def hook(module, arguments, keywords):
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            noise = torch.where(kept[..., None], 0.0, 100 * torch.randn_like(hidden))
            if arguments:
                return (hidden + noise, *arguments[1:]), keywords
            return arguments, {**keywords, "hidden_states": hidden + noise}

        return hook

    with HARD(model), ExitStack() as stack:
        logits, cache = outcome()
        kept = []
        for layer in cache.layers[1:]:
            own = torch.zeros(2, 15, dtype=torch.bool)
            own.scatter_(1, layer.positions, layer.valid)
            own[:, cache.state.split :] = True
            kept.append(own)
        assert [int(own[0].sum()) for own in kept] == [9 + 3, 5 + 3]  # of 12 tokens, and 3 after the context
        for layer, own in zip(layers[1:], kept, strict=True):
            handle = layer.register_forward_pre_hook(add_noise(own), with_kwargs=True)
            stack.callback(handle.remove)
        noisy, other = outcome()
    # Not to the bit: experts are given other tokens beside those.
    torch.testing.assert_close(noisy[kept[1]], logits[kept[1]])
    assert not torch.allclose(noisy, logits, atol=0.1)
    for layer, same in zip(cache.layers[1:], other.layers[1:], strict=True):
        valid = layer.valid[:, None, :, None]
        assert torch.equal(layer.positions, same.positions)
        torch.testing.assert_close(*(each.keys[:, :, : valid.shape[2]] * valid for each in (layer, same)))


@pytest.mark.parametrize("family", UNWINDOWED)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_nothing_pruned_is_multi_head_attention(family, side, monkeypatch):
    """Keeping everything is the model itself; and through the pruned path it gives the same, too."""
    model, batch = make_model(family), make_batch([9, 12, 3], side=side)
    expected, left = model(**batch).logits, make_batch([9, 12, 3])
    tokens = model.generate(**left, max_new_tokens=8, do_sample=False)
    everything = Spatten(tokens=1.0, heads=1.0, values=1.0)
    with everything(model):
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.generate(**left, max_new_tokens=8, do_sample=False), tokens)
    monkeypatch.setattr(chai.methods.spatten.Spatten, "_prunes_nothing", lambda *_: False)
    real = batch["attention_mask"].bool()
    with everything(model):
        torch.testing.assert_close(model(**batch).logits[real], expected[real], rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(**left, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("family", UNWINDOWED)
@pytest.mark.parametrize("lengths", [[9, 12, 3], [1, 2, 1]], ids=["long", "short"])
@BOTH
@torch.no_grad()
def test_generation_equals_scoring_the_whole_text(family, lengths, method):
    """Decoding on what the cache has kept gives what one call gives that is told where the prompt ends."""
    model, batch, widest = make_model(family), make_batch(lengths), max(lengths)
    with method(model):
        steps = model.generate(
            **batch, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for row, length in enumerate(lengths):
            cache = method.new_cache(model)
            cache.contexts = torch.tensor([length])
            own = steps.sequences[row, widest - length :][None]
            whole = model(own, past_key_values=cache).logits[0, -9:-1]
            stepwise = torch.stack([logits[row] for logits in steps.logits])
            torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@torch.no_grad()
def test_appended_tokens_change_no_earlier_logits(family, method):
    """Neither what is appended to a context as continuation, nor as padding; per row, nor as more of the context."""
    model, batch = make_model(family), make_batch([14])
    ids = batch["input_ids"]

    def logits(tokens, context=None, **more):
        cache = method.new_cache(model)
        cache.contexts = None if context is None else torch.tensor([context])
        return model(tokens, past_key_values=cache, **more).logits[0]

    with method(model):
        short = logits(ids[:, :8], 6)
        for tail in (ids[:, 8:], ids[:, 8:].flip(1), torch.zeros(1, 5, dtype=torch.long)):
            torch.testing.assert_close(logits(torch.cat([ids[:, :8], tail], 1), 6)[:8], short, rtol=1e-5, atol=1e-5)
        for length in (1, 5, 9) if method is PER_ROW else ():
            torch.testing.assert_close(logits(ids)[:length], logits(ids[:, :length]), rtol=1e-5, atol=1e-5)
        # The padding of lm-eval, which comes without a mask, in a batch with a longer row.
        both = torch.cat([torch.nn.functional.pad(ids[:, :8], (0, 6)), ids.flip(1)])
        cache = method.new_cache(model)
        cache.contexts = torch.tensor([6, 9])
        found = model(both, past_key_values=cache).logits[0, :8]
        torch.testing.assert_close(found, short, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(ids[:, :8], 3)[3:], short[3:], atol=1e-3)  # where it ends does matter


@torch.no_grad()
def test_per_row_the_context_may_come_in_parts():
    model, batch = make_model("llama"), make_batch([16, 16])
    with PER_ROW(model):
        whole = PER_ROW.new_cache(model)
        whole.contexts = torch.tensor([9, 12])
        expected = model(batch["input_ids"], past_key_values=whole).logits
        for sizes in ([4, 4, 8], [1] * 16, [9, 3, 4], [11, 5]):
            cache, found = PER_ROW.new_cache(model), []
            cache.contexts = torch.tensor([9, 12])
            for part in batch["input_ids"].split(sizes, 1):
                found.append(model(part, past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
            assert cache.nbytes == whole.nbytes
        options = {"max_new_tokens": 5, "do_sample": False}
        prompt = model.generate(**batch, **options)
        cache = PER_ROW.new_cache(model)
        cache.contexts = torch.tensor([16, 16])
        assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=5, past_key_values=cache), prompt)


@torch.no_grad()
def test_global_pruning_refuses_a_context_in_parts():
    model, batch = make_model("llama"), make_batch([16, 16])
    message = "this call has 9 of the 12 tokens of a context, but global pruning needs the importance from all of them"
    with HARD(model):
        cache = HARD.new_cache(model)
        cache.contexts = torch.tensor([9, 12])
        with pytest.raises(ValueError, match=message):
            model(batch["input_ids"][:, :9], past_key_values=cache)
        whole = HARD.new_cache(model)
        whole.contexts = torch.tensor([9, 12])
        expected = model(batch["input_ids"], past_key_values=whole).logits
        assert torch.equal(model(batch["input_ids"], past_key_values=cache).logits, expected)  # nothing was begun
        for sizes in ([12, 4], [13, 1, 2]):  # the rest in any parts
            cache, found = HARD.new_cache(model), []
            cache.contexts = torch.tensor([9, 12])
            for part in batch["input_ids"].split(sizes, 1):
                found.append(model(part, past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
        cache = HARD.new_cache(model)
        cache.contexts = torch.tensor([16, 16])
        with pytest.raises(ValueError, match="this call has 5 of the 16 tokens"):
            model.generate(**batch, max_new_tokens=3, prefill_chunk_size=5, past_key_values=cache)


@BOTH
@torch.no_grad()
def test_pruned_tokens_and_heads_leave_the_cache(method):
    model, batch = make_model("llama"), make_batch([20, 20])
    method = Spatten(0.5, 0.5, 1.0, 0.0, 0.0, method.pruning)
    with method(model):
        cache = DynamicCache()  # becomes ours
        model(**batch, past_key_values=cache)
        for _ in range(3):
            model(batch["input_ids"][:, :1], past_key_values=cache)
    shapes = [(2, HEADS, 23, 8), (2, 6, 15 + 3, 8), (2, 4, 10 + 3, 8)]
    assert [tuple(layer.keys.shape) for layer in cache.layers] == shapes
    assert [tuple(layer.values.shape) for layer in cache.layers] == shapes
    assert method.heads_kept(model.config) == [8, 6, 4]
    assert cache.get_seq_length() == 23
    cache = CascadeCache.of(cache)
    assert cache.nbytes == sum(2 * 4 * math.prod(shape) for shape in shapes)
    assert cache.nbytes_mha == LAYERS * 2 * 4 * 2 * HEADS * 23 * 8
    assert cache.nbytes_allocated == sum(2 * 4 * rows * heads * ROUND * size for rows, heads, _, size in shapes)


@BOTH
@torch.no_grad()
def test_what_layers_keep_is_nested(method):
    """Cascade: what a layer lacks no later layer has."""
    model, batch = make_model("llama"), make_batch([20, 15], side="right")
    with method(model):
        cache = method.new_cache(model)
        model(**batch, past_key_values=cache)
    first, second = cache.layers[1], cache.layers[2]
    for row in range(2):
        tokens = [set(layer.positions[row][layer.valid[row]].tolist()) for layer in (first, second)]
        heads = [set(layer.remaining.query_heads[row].tolist()) for layer in (first, second)]
        assert tokens[1] < tokens[0]
        assert heads[1] < heads[0]
        assert max(tokens[1]) == [19, 14][row]  # the last token of the context is kept


@torch.no_grad()
def test_rows_are_selected_repeated_reordered_cropped_and_reset():
    model, batch = make_model("qwen2"), make_batch([12, 7, 12])
    following = torch.tensor([[5], [6], [7]])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    with HARD(model):

        def prefilled(cache=None):
            cache = HARD.new_cache(model) if cache is None else cache
            model(**batch, position_ids=positions, past_key_values=cache)
            return cache

        def step(cache, rows):
            places = batch["attention_mask"].sum(1)[rows][:, None]
            return model(following[rows], attention_mask=mask[rows], position_ids=places, past_key_values=cache).logits[
                :, -1
            ]

        expected = step(prefilled(), [0, 1, 2])
        cache = prefilled()
        cache.batch_select_indices(torch.tensor([2, 1]))
        torch.testing.assert_close(step(cache, [2, 1]), expected[[2, 1]], rtol=1e-4, atol=1e-4)
        cache = prefilled()
        cache.batch_repeat_interleave(2)
        torch.testing.assert_close(step(cache, [0, 0, 1, 1, 2, 2]), expected[[0, 0, 1, 1, 2, 2]], rtol=1e-4, atol=1e-4)
        cache = prefilled()
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        torch.testing.assert_close(step(cache, [1, 0, 1]), expected[[1, 0, 1]], rtol=1e-4, atol=1e-4)
        cache = prefilled()
        step(cache, [0, 1, 2])
        cache.crop(-1)
        torch.testing.assert_close(step(cache, [0, 1, 2]), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="cannot remove 2 tokens: what is kept of the context depends on them"):
            cache.crop(-2)
        with pytest.raises(ValueError, match="as a negative number, not 2"):
            cache.crop(2)
        cache = prefilled()
        split, padded = cache.state.split, mask.clone()
        padded[0, -1] = 0
        model(following, attention_mask=padded, past_key_values=cache)
        cache.crop(-1)
        step(cache, [0, 1, 2])
        assert cache.state.split == split  # the context is over, also if padding after it is removed
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
        torch.testing.assert_close(step(prefilled(cache), [0, 1, 2]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beams_and_assisted_generation():
    model, batch = make_model("llama"), make_batch([12, 12, 12])
    options = {"max_new_tokens": 8, "do_sample": False}
    with HARD(model):
        together = model.generate(**batch, **options, num_beams=3)
        for row in range(3):
            alone = model.generate(batch["input_ids"][row : row + 1], **options, num_beams=3)
            assert torch.equal(together[row], alone[0])
        prompt = batch["input_ids"][:1]
        plain, cache = model.generate(prompt, **options), HARD.new_cache(model)
        cache.contexts = torch.tensor([12])
        assisted = model.generate(prompt, **options, prompt_lookup_num_tokens=3, past_key_values=cache)
        assert torch.equal(assisted, plain)


@torch.no_grad()
def test_model_is_restored_and_caches_are_refused_elsewhere():
    model, batch = make_model("llama"), make_batch([12])
    before = model(**batch).logits
    with pytest.raises(KeyError), HARD(model):
        raise KeyError
    assert torch.equal(model(**batch).logits, before)
    cache = HARD.new_cache(model)
    with HARD(model):
        assert not torch.equal(model(**batch, past_key_values=cache).logits, before)
        with pytest.raises(ValueError, match="StaticCache"):
            model(**batch, past_key_values=StaticCache(config=model.config, max_cache_len=32))
        with pytest.raises(ValueError, match="a method is applied to this model already"):
            Spatten()(model).__enter__()
    with Mha()(model):
        assert torch.equal(model(**batch).logits, before)
        with pytest.raises(RuntimeError, match="inside `with method"):
            model(batch["input_ids"][:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="belongs to another"), Spatten(tokens=0.3)(model):
        model(batch["input_ids"][:, :1], past_key_values=cache)
    with Chai(clusters=2)(model), pytest.raises(ValueError, match="CascadeCache"):
        model(batch["input_ids"][:, :1], past_key_values=cache)


@torch.no_grad()
def test_contexts_that_do_not_fit_are_refused():
    model, batch = make_model("llama"), make_batch([12, 12])
    for contexts, message in (([3], "this call has 2 sequences"), ([3, 0], "a context has 0 tokens; valid: 1 or more")):
        cache = HARD.new_cache(model)
        cache.contexts = torch.tensor(contexts)
        with HARD(model), pytest.raises(ValueError, match=message):
            model(**batch, past_key_values=cache)


def test_shares_are_those_of_the_authors_release():
    """Of 1,024 tokens, heads of 16, and values: the workload's columns, whose numbers are rounded down."""
    shape = LlamaConfig(num_hidden_layers=24, num_attention_heads=16)
    rule = Spatten().rule(shape)
    tokens = [1024] * 2 + [921] + [819] * 2 + [614] * 6 + [307] * 13
    assert [int(share * 1024 + 1e-6) for share in rule.tokens] == tokens
    assert list(rule.heads) == [16] * 16 + [13] * 6 + [10] * 2
    assert {int(rule.values * count) for count in tokens} == {307, 276, 245, 184, 92}
    assert rule.pruning == "global" and Spatten(preset="authors").rule(shape) == rule
    # Other depths have the shares of the same relative depth; numbers replace the shares one by one.
    shape.num_hidden_layers = 4
    assert Spatten().rule(shape).tokens == (1.0, 0.6, 0.3, 0.3) and Spatten().rule(shape).heads == (16, 16, 16, 13)
    mixed = Spatten(tokens=0.4, unpruned_tokens=0.0).rule(shape)
    assert mixed.tokens == pytest.approx((1.0, 0.8, 0.6, 0.4)) and mixed.heads == (16, 16, 16, 13)
    assert (mixed.values, Spatten(values=0.8).rule(shape).values) == (0.3, 0.8)


def test_per_row_has_the_numbers_of_earlier_versions():
    shape, old = LlamaConfig(num_hidden_layers=8, num_attention_heads=16), Spatten(**LINEAR, pruning="per_row")
    assert LINEAR == SPATTEN
    assert Spatten(pruning="per_row").rule(shape) == old.rule(shape)
    assert old.rule(shape).tokens == schedule(8, 0.15, 0.5)
    assert replace(old.rule(shape), pruning="global") == Spatten(preset="linear").rule(shape)


def test_schedule_falls_linearly_after_the_first_layers():
    assert schedule(4, 0.15, 0.4) == pytest.approx((1.0, 0.8, 0.6, 0.4))
    assert schedule(10, 0.3, 0.3) == pytest.approx((1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3))
    assert schedule(3, 1.0, 0.5) == schedule(1, 0.0, 0.5) * 3 == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 0.0}, "tokens is 0.0; valid: above 0, up to 1"),
        ({"heads": 1.5}, "heads is 1.5; valid: above 0, up to 1"),
        ({"unpruned_heads": -0.1, "heads": 0.5}, "unpruned_heads is -0.1; valid: 0 to 1"),
        ({"unpruned_heads": 0.1}, "unpruned_heads has no effect on the authors' shares; valid: set heads, too, or"),
        ({"pruning": "local"}, "pruning is local; valid: global, per_row"),
        ({"preset": "paper"}, "preset is paper; valid: authors, linear, null"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Spatten(**values)


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match="does not support sliding windows; this model's is 8 tokens"):
        Spatten().check(make_model("mistral_sliding").config)
