"""Scoring tells a method where each row's context ends: continuations and padding have no say in what is pruned."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chai.methods import Spatten
from experiments.evaluation.lm import MethodLM
from experiments.microworld.tokenizer import build_tokenizer, vocabulary


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=24, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(shape).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(4.0)
    return made


def request(context: list[int], continuation: list[int]):
    return (("", ""), context, continuation)


def step_by_step(model, method, context, continuation) -> float:
    """The context in one call, then one token after the other."""
    cache, total = method.new_cache(model), 0.0
    logits = model(torch.tensor([context]), past_key_values=cache).logits[0, -1]
    for token in continuation:
        total += logits.log_softmax(-1)[token].item()
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@torch.no_grad()
def test_loglikelihoods_are_those_of_decoding(model, batch_size):
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 60, (count,), generator=generator).tolist()  # noqa: E731
    requests = [request(draw(context), draw(more)) for context, more in ((9, 4), (14, 1), (3, 7), (6, 2), (12, 5))]
    requests.append(request(requests[0][1], draw(3)))  # the same context again
    requests.append(request([*draw(5), 0], [0, 0, 7]))  # tokens that look like padding
    requests.append(request([5, 6, 7, 8], [9, 3]))
    method = Spatten(0.4, 0.5, 1.0, 0.0, 0.0)
    with method(model):
        lm = MethodLM(model, build_tokenizer(), method, batch_size)
        scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        for (_, context, continuation), (found, _) in zip(requests, scores, strict=True):
            assert found == pytest.approx(step_by_step(model, method, context, continuation), abs=1e-3)
        assert lm.savings()["kv_bytes"] < lm.savings()["kv_bytes_mha"]


@torch.no_grad()
def test_a_row_that_requests_share_has_the_shortest_of_their_contexts(model):
    """Different splits of the same text are scored in one row, in which no continuation may count as context."""
    method = Spatten(0.4, 0.5, 1.0, 0.0, 0.0)
    with method(model):
        lm = MethodLM(model, build_tokenizer(), method, 4)
        lm._loglikelihood_tokens([request([5, 6, 7, 8], [9]), request([5, 6], [7, 8, 9])], disable_tqdm=True)
        assert lm._context_lengths == {(5, 6, 7, 8): 2}


@torch.no_grad()
def test_a_text_that_is_cut_keeps_the_end_of_its_context(model):
    method = Spatten()
    with method(model):
        lm = MethodLM(model, build_tokenizer(), method, 4)
        lm._loglikelihood_tokens([request(list(range(3, 33)), [9, 10])], disable_tqdm=True)
        ((tokens, length),) = lm._context_lengths.items()
    assert (len(tokens), length) == (24, 23)
