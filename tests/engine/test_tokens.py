"""Stop tokens, sampling, and tokens that are handed on while the next ones are computed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import chai
from chai.engine.sampling import Sampling, next_tokens
from chai.methods import Random
from tests.engine.requests import METHODS, expected
from tests.models import VOCABULARY, make_batch, make_model

# Stop tokens.


@pytest.mark.parametrize("method", ["mha", "chai"])
def test_rows_end_with_a_stop_token(method):
    """Rows that have ended are filled with the padding token; the generation ends with the last row."""
    model, method, batch = make_model("llama"), METHODS[method], make_batch([9, 12, 7])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    free = chai.generate(model, ids, method, 12, attention_mask=mask)
    stops = [int(free[0, 14]), int(free[1, 13]), int(free[2, 17])]
    for chosen in (stops[:1], stops):
        wanted = expected(model, method, batch, 12, eos_token_id=chosen)
        found = chai.generate(model, ids, method, 12, attention_mask=mask, stop_tokens=chosen)
        assert torch.equal(found, wanted)
    assert found.shape[1] < free.shape[1] and (found == 0).any()
    assert torch.equal(chai.generate(model, ids, method, 12, attention_mask=mask, stop_tokens=()), free)


def test_stop_and_padding_tokens_are_those_of_the_generation_configuration():
    model, ids = make_model("llama"), make_batch([9, 9])["input_ids"]
    free = chai.generate(model, ids, None, 12)
    model.generation_config.eos_token_id = [int(free[0, 11]), 96]
    model.generation_config.pad_token_id = 42
    wanted = expected(model, METHODS["mha"], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 12)
    assert torch.equal(chai.generate(model, ids, None, 12), wanted)
    assert 42 in wanted[0]
    assert torch.equal(chai.generate(model, ids, None, 12, stop_tokens=()), free)
    stopped = chai.generate(model, ids[:1], None, 12, stop_tokens=int(free[0, 9]))
    assert stopped.shape[1] == 10


# Streaming.


def test_tokens_are_handed_on_in_order():
    model, batch, seen = make_model("llama"), make_batch([9, 9]), []
    ids = batch["input_ids"]
    found = chai.generate(model, ids, METHODS["chai"], 8, on_token=seen.append)
    assert len(seen) == 8 and all(tokens.shape == (2,) and tokens.device.type == "cpu" for tokens in seen)
    assert torch.equal(torch.stack(seen, 1), found[:, 9:])
    stop = int(found[0, 12])
    seen.clear()
    stopped = chai.generate(model, ids[:1], METHODS["chai"], 8, on_token=seen.append, stop_tokens=stop)
    assert torch.equal(torch.stack(seen, 1), stopped[:, 9:])


def test_an_exception_of_the_callback_ends_the_generation():
    """It reaches the caller, and the engine serves the next request."""
    model, ids, seen = make_model("llama"), make_batch([9])["input_ids"], []

    def refuse(tokens):
        seen.append(tokens)
        if len(seen) == 3:
            raise RuntimeError("enough")

    with chai.Engine(model, METHODS["chai"]) as engine:
        with pytest.raises(RuntimeError, match="enough"):
            engine.generate(ids, 8, on_token=refuse)
        assert len(seen) == 3
        with pytest.raises(ValueError, match="no request has been started"):
            engine.decode_step()
        again = engine.generate(ids, 8)
    assert torch.equal(again, chai.generate(model, ids, METHODS["chai"], 8))


def test_a_callback_may_not_call_the_engine():
    """Nor may another thread, while a request runs."""
    model, ids = make_model("llama"), make_batch([9])["input_ids"]
    with chai.Engine(model) as engine:
        calls = [partial(engine.generate, ids, 2), partial(engine.prefill, ids), engine.decode_step, engine.close]
        for call in calls:
            with pytest.raises(ValueError, match="this engine runs a request.*valid: calls after its end"):
                engine.generate(ids, 2, on_token=lambda tokens, call=call: call())
            with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="this engine runs a request"):
                engine.generate(ids, 2, on_token=lambda tokens, call=call: pool.submit(call).result())
        assert engine.generate(ids, 2).shape == (1, 11)


class LateReader:
    """Hands tokens on one step later, as on a CUDA device, where the next step has been launched by then."""

    lag = 1

    def __init__(self, sequence):
        self.sequence, self.marked, self.behind = sequence, [], []

    def mark(self, place):
        self.marked.append(place)

    def read(self, place):
        self.behind.append(len(self.marked) - self.marked.index(place) - 1)
        return self.sequence[place].clone()


@pytest.mark.parametrize("stops", [False, True])
def test_a_step_that_is_launched_too_much_changes_nothing(monkeypatch, stops):
    model, ids, readers = make_model("llama"), make_batch([9, 9])["input_ids"], []
    free = chai.generate(model, ids, None, 8)
    chosen = free[:, 12].tolist() if stops else ()
    wanted = chai.generate(model, ids, None, 8, stop_tokens=chosen)

    def late(sequence, stream):
        readers.append(LateReader(sequence))
        return readers[-1]

    monkeypatch.setattr("chai.engine.engine.TokenReader", late)
    seen = []
    found = chai.generate(model, ids, None, 8, stop_tokens=chosen, on_token=seen.append)
    assert torch.equal(found, wanted) and torch.equal(torch.stack(seen, 1), wanted[:, 9:])
    steps, (reader,) = found.shape[1] - 9, readers
    assert len(reader.marked) == (steps + 1 if stops else steps)
    assert reader.behind == ([1] * steps if stops else [1] * (steps - 1) + [0])


# Sampling.


def frequencies(logits, sampling, count=20_000):
    generator = torch.Generator().manual_seed(3)
    tokens = next_tokens(logits.expand(count, -1), sampling, generator)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


LOGITS = torch.tensor([[1.0, -0.5, 2.0, 0.3, -3.0, 1.9]])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(2.0, top_k=3),
        Sampling(1.0, top_p=0.7),
        Sampling(1.3, top_k=4, top_p=0.8),
        Sampling(0.5, top_k=100, top_p=1.0),
    ],
)
def test_samples_have_the_distribution_of_transformers(sampling):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    wanted = warpers(None, LOGITS.clone()).softmax(-1)[0]
    found = frequencies(LOGITS, sampling)
    assert (found[wanted == 0] == 0).all()
    assert (found - wanted).abs().max() < 4 * 0.5 / 20_000**0.5


def test_the_most_probable_token_alone_is_greedy():
    tiny = (Sampling(1e-6), Sampling(1e-45), Sampling(1e-4))  # logits that are divided by 1e-45 are infinite
    for sampling in (Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.01), *tiny):
        assert frequencies(LOGITS, sampling, 50)[2] == 1


def test_sampling_is_reproducible():
    model, ids = make_model("llama"), make_batch([9, 9])["input_ids"]
    with chai.Engine(model, METHODS["chai"], batch_size=2, max_length=64) as engine:
        first, again, other = (engine.generate(ids, 12, temperature=3.0, seed=seed) for seed in (1, 1, 2))
        greedy = engine.generate(ids, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, greedy)
    assert torch.equal(first, chai.generate(model, ids, METHODS["chai"], 12, temperature=3.0, seed=1))
    rows = chai.generate(model, ids[:1].expand(2, -1), Random(clusters=2), 12, temperature=3.0)
    assert not torch.equal(rows[0], rows[1])  # equal prompts, samples of their own


def test_samples_follow_the_logits_of_the_model():
    """The first token of many equal rows, against the softmax of the model's logits."""
    model, rows = make_model("llama"), 400
    ids = make_batch([6])["input_ids"].expand(rows, -1)
    tokens = chai.generate(model, ids, None, 1, temperature=1.0)[:, -1]
    with torch.no_grad():
        wanted = model(ids[:1]).logits[0, -1].softmax(-1)
    found = torch.bincount(tokens, minlength=VOCABULARY) / rows
    likely = wanted > 0.03
    assert likely.any() and (found - wanted)[likely].abs().max() < 4 * 0.5 / rows**0.5
