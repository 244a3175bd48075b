"""generate() in all its forms gives the tokens that the slow reference gives, with nothing sliced or dropped early."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import set_seed

import chai.methods.chai
import chai.patching.clustered
import chai.patching.projections
from chai.attention import clustered_attention, reference
from chai.methods import Chai, Random
from tests.models import HEADS, make_batch, make_model

COUNTS = [HEADS, 3, 2]


slow_attention = reference.clustered_attention


@contextmanager
def slow():
    """Reference attention, whole projections and prompts cut after their first tokens instead of the fast paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chai.patching.clustered._Requests, "in_one_pass", lambda *_: False)
        patch.setattr(chai.methods.chai, "clustered_attention", slow_attention)
        patch.setattr(chai.patching.clustered, "sliced_projections", lambda *_: nullcontext())
        yield


FORMS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "chunked": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[9, 12, 7], [3, 1, 2], [2, 12, 6]], ids=["long", "short", "mixed"])
@torch.no_grad()
def test_generation_gives_the_tokens_of_the_slow_reference(family, form, lengths):
    model, batch = make_model(family), make_batch(lengths)
    options = {"max_new_tokens": 9, **FORMS[form]}

    def tokens():
        set_seed(0)
        with Chai(clusters=COUNTS)(model):
            return model.generate(**batch, **options)

    with slow():
        expected = tokens()
    assert torch.equal(tokens(), expected)
    assert expected.shape[1] > max(lengths)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "mistral_sliding", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_prompt_in_one_pass_is_the_same_as_one_that_is_cut(family):
    """Logits, what the cache holds, and how it goes on."""
    model, batch = make_model(family), make_batch([14, 14, 14])
    method, found = Chai(clusters=COUNTS), []
    for one_pass in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chai.patching.clustered._Requests, "in_one_pass", lambda *_, answer=one_pass: answer)
            with method(model):
                cache = method.new_cache(model)
                logits = model(**batch, past_key_values=cache).logits
                more = model(batch["input_ids"][:, 3:9], past_key_values=cache).logits
        layers = [cache.clusters(index) for index in range(len(COUNTS))]
        found.append((logits, more, cache.nbytes, [layer and layer.assignment for layer in layers]))
    (logits, more, size, clusters), (cut_logits, cut_more, cut_size, cut_clusters) = found
    torch.testing.assert_close(logits, cut_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(more, cut_more, rtol=1e-4, atol=1e-4)
    assert size == cut_size
    assert clusters[0] is None and cut_clusters[0] is None
    assert all(torch.equal(a, b) for a, b in zip(clusters[1:], cut_clusters[1:], strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("lengths", [[14], [14, 3, 9]], ids=["one", "padded"])
@torch.no_grad()
def test_half_precision_decodes_on_padded_lengths(family, lengths):
    """On a CPU only, where each new length would make oneDNN compile; what lies behind the last token isn't seen."""
    model, batch = make_model(family).to(torch.bfloat16), make_batch(lengths)
    method, shapes = Chai(clusters=COUNTS), set()

    def note(query, key, value, plan, scaling, mask, softcap):
        if query.shape[2] == 1:
            shapes.add(key.shape[2])
        return slow_attention(query, key, value, plan, scaling, mask, softcap)

    def scores(attend):
        with pytest.MonkeyPatch.context() as patch, method(model):
            patch.setattr(chai.methods.chai, "clustered_attention", attend)
            cache, mask = method.new_cache(model), batch["attention_mask"]
            found = [model(**batch, past_key_values=cache).logits[:, -1]]
            for token in range(70):
                for layer in cache.layers:  # no trace of what a longer sequence left there before
                    layer.value_buffer.buffer[:, :, layer.value_buffer.length :] = 1e3
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                ids = torch.full((len(lengths), 1), 3 + token)
                found.append(model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
        return torch.stack(found)

    expected = scores(note)
    assert {64, 128} <= shapes <= {64, 128, 15, 16}  # the prompt is cut into parts, which may be of one token
    torch.testing.assert_close(scores(clustered_attention), expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_scores_of_a_padded_batch_are_those_of_the_slow_reference(side):
    model, batch = make_model("llama"), make_batch([14, 3, 9], side=side)
    method = Chai(clusters=COUNTS)
    with slow(), method(model):
        expected = model(**batch).logits
    with method(model):
        actual = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_conversation_goes_on_with_its_cache():
    """Three turns and the tokens generated in between, on one cache, are one long prompt."""
    model, method = make_model("llama"), Chai(clusters=COUNTS)
    turns = [make_batch([length], seed=length)["input_ids"] for length in (3, 4, 8)]
    with method(model):
        cache, text = method.new_cache(model), torch.zeros(1, 0, dtype=torch.long)
        for turn in turns:
            text = torch.cat([text, turn], 1)
            text = model.generate(text, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert cache.get_seq_length() == text.shape[1] - 1
        logits = model(text).logits
        begin = 0
        for turn in turns:  # every generated token is the one that a single pass over the text before it gives
            begin += turn.shape[1]
            assert torch.equal(logits[0, begin - 1 : begin + 4].argmax(-1), text[0, begin : begin + 5])
            begin += 5


@torch.no_grad()
def test_assisted_generation_crops_the_cache():
    """Speculative decoding appends guesses and drops the wrong ones: the tokens stay those of greedy decoding."""
    model, assistant, batch = make_model("llama"), make_model("llama", seed=1), make_batch([9])
    with Chai(clusters=COUNTS)(model):
        expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
        actual = model.generate(**batch, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["llama", "opt", "mistral", "qwen3"])
@torch.no_grad()
def test_only_the_representatives_are_projected(family):
    """Once memberships are known, W_Q and W_K are multiplied for representatives alone; the outputs are the same."""
    model, batch = make_model(family), make_batch([12])
    done = []

    def count(hidden, linear, heads, size):
        done.append(len(heads))
        return real(hidden, linear, heads, size)

    real = chai.patching.projections.project_heads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chai.patching.projections, "project_heads", count)
        patch.setattr(chai.patching.projections, "OVERHEAD", 0)  # or these tiny matrices aren't worth it
        patch.setattr(chai.patching.clustered._Requests, "in_one_pass", lambda *_: False)  # which projects all heads
        for method in (Chai(clusters=2), Random(clusters=2, seed=1)):
            with slow(), method(model):
                expected = model(**batch).logits
            done.clear()
            with method(model):
                actual = model(**batch).logits
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            assert done and set(done) <= {1, 2} and len(done) >= 3
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("method", [Chai(clusters=2), Random(clusters=3)], ids=["own heads", "shared heads"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("overhead", [0, 3_000, 10_000_000], ids=["by row", "union", "all"])
@torch.no_grad()
def test_rows_of_a_batch_share_or_split_their_projections(overhead, family, method, monkeypatch):
    """Row by row, the union of the rows' heads, or all heads: each row comes out as it does alone."""
    monkeypatch.setattr(chai.patching.projections, "OVERHEAD", overhead)
    model = make_model(family)
    for length in (40, 12):
        batch = make_batch([length] * 3, seed=length)["input_ids"]
        with method(model):
            together = model(batch).logits
            for row in range(3):
                torch.testing.assert_close(together[row], model(batch[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_grows_in_chunks_and_can_reserve():
    model, method, token = make_model("llama"), Chai(clusters=COUNTS), torch.tensor([[5]])
    with method(model):
        cache, buffers = method.new_cache(model), set()
        model(make_batch([12])["input_ids"], past_key_values=cache)
        for _ in range(60):
            model(token, past_key_values=cache)
            buffers.add(cache.layers[1].value_buffer.buffer.data_ptr())
        assert len(buffers) <= 3  # 72 tokens in steps of 64
        held = (2 * HEADS * 3 - (HEADS - 3) - (HEADS - 2)) * 8 * 4
        assert cache.nbytes == 72 * held
        assert cache.nbytes < cache.nbytes_allocated <= 128 * held
        roomy = method.new_cache(model, reserve=100)
        model(token.expand(1, 12), past_key_values=roomy)
        first = roomy.layers[2].key_buffer.buffer.data_ptr()
        for _ in range(80):
            model(token, past_key_values=roomy)
        assert roomy.layers[2].key_buffer.buffer.data_ptr() == first
        assert roomy.nbytes == 92 * held and roomy.nbytes_allocated == 100 * held


def test_gradients_flow_through_a_clustered_model():
    model, batch = make_model("llama"), make_batch([12])
    with Chai(clusters=COUNTS)(model):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
    gradient = model.model.layers[1].self_attn.q_proj.weight.grad
    assert gradient is not None and float(gradient.abs().sum()) > 0


@torch.no_grad()
def test_outputs_of_the_parts_are_joined():
    """Hidden states and tuples of a prompt that was cut have all its tokens."""
    model, batch = make_model("llama"), make_batch([12, 9])
    with Chai(clusters=COUNTS)(model):
        whole = model(**batch, output_hidden_states=True)
        plain = model(**batch, return_dict=False)
    assert [tuple(state.shape) for state in whole.hidden_states] == [(2, 12, 64)] * 4
    torch.testing.assert_close(plain[0], whole.logits)


@torch.no_grad()
def test_a_cache_for_another_batch_is_refused():
    model, method = make_model("llama"), Chai(clusters=2)
    with method(model):
        cache = method.new_cache(model)
        model(make_batch([9, 9])["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 sequences, this call has 1"):
            model(torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask is a dict"):
            model(torch.tensor([[5]]), attention_mask={"full_attention": None})
