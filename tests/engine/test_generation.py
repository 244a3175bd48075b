"""Greedy tokens of the engine are those of transformers' generate() under the same method."""

from __future__ import annotations

import pytest
import torch

import chai
from chai.engine.engine import bucket
from chai.methods import Chai, ChaiOutput, ChaiQkv, ChaiStatic, Mha, Random, Static
from tests.chai.test_output_clusters import profile_of
from tests.chai.test_static import make_profile
from tests.engine.requests import COUNTS, FAMILIES, METHODS, expected, same_start
from tests.models import HEADS, make_batch, make_model

BATCHES = {
    "one": make_batch([14]),
    "padded": make_batch([9, 12, 7]),
    "short": make_batch([3, 1, 2]),
    "mixed": make_batch([2, 12, 6]),
    "same start": same_start([8, 12, 10], 5),
    "nearly the same start": same_start([8, 12, 10], 4),
}


def generated(model, method, batch, new_tokens=9, **options):
    mask = batch["attention_mask"]
    return chai.generate(model, batch["input_ids"], method, new_tokens, attention_mask=mask, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_transformers(family, method):
    model, method = make_model(family), METHODS[method]
    for name, batch in BATCHES.items():
        assert torch.equal(generated(model, method, batch), expected(model, method, batch)), name


@pytest.mark.parametrize("length", range(1, 8))
def test_prompts_of_a_few_tokens(length):
    """Until each row has its five warm-up tokens, the sequence so far runs once more."""
    model = make_model("qwen2")
    for batch in (make_batch([length]), make_batch([length, 9])):
        for method in (Chai(clusters=COUNTS), ChaiQkv(clusters=2)):
            assert torch.equal(generated(model, method, batch), expected(model, method, batch))


@pytest.mark.parametrize(
    ("family", "method", "batch"),
    [
        ("qwen3", "chai", make_batch([6, 7])),
        ("qwen2", "chai_qkv", make_batch([4])),
        ("llama", "random", make_batch([6])),
    ],
    ids=["qwen3", "qwen2", "llama"],
)
def test_kernels_generate_the_same_tokens(family, method, batch):
    model, method = make_model(family), METHODS[method]
    assert torch.equal(generated(model, method, batch, 2, kernels=True), expected(model, method, batch, 2))


def test_static_clusters_of_a_head_profile(tmp_path):
    model = make_model("llama")
    profile = make_profile(model, tmp_path / "profile")
    for method in (ChaiStatic(profile=profile), Static(profile=profile, clusters=2)):
        assert torch.equal(generated(model, method, BATCHES["padded"]), expected(model, method, BATCHES["padded"]))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_clusters_by_the_error_of_the_output(family, tokens, tmp_path):
    """The map of the corpus, whose first tokens run with all heads, also with whole KV heads left out."""
    model = make_model(family)
    profile = profile_of(model, tmp_path / "profile")
    for group_aware in (False, True):
        method = ChaiOutput(profile=profile, tokens=tokens, group_aware=group_aware)
        for name in ("padded", "mixed"):
            assert torch.equal(generated(model, method, BATCHES[name]), expected(model, method, BATCHES[name])), name


@pytest.mark.parametrize(
    "method",
    [
        Chai(clusters=COUNTS, metric="cosine"),
        Chai(clusters=COUNTS, metric="jensen_shannon", membership="kmedoids"),
        Chai(clusters=COUNTS, metric="sink_removed", group_aware=True),
    ],
)
def test_other_distances(method):
    model, batch = make_model("qwen2"), BATCHES["padded"]
    assert torch.equal(generated(model, method, batch), expected(model, method, batch))


@pytest.mark.parametrize(
    "method", [Chai(clusters=HEADS), Chai(clusters=1, tokens=2), Chai(clusters=COUNTS, representative="lowest")]
)
def test_other_counts_and_settings(method):
    model, batch = make_model("qwen2"), BATCHES["padded"]
    assert torch.equal(generated(model, method, batch), expected(model, method, batch))


def test_an_engine_serves_one_request_after_the_other():
    """Nothing of a longer request is left for a shorter one, with and without padding and shared clusters."""
    model = make_model("llama")
    batches = [make_batch([30, 22, 30]), make_batch([6, 6, 6]), same_start([9, 9, 9], 5), make_batch([2, 12, 6])]
    for method in (METHODS["mha"], METHODS["chai"], METHODS["random"]):
        wanted = [expected(model, method, batch) for batch in batches]
        with chai.Engine(model, method, batch_size=3, max_length=50) as engine:
            assert engine.max_length == 64
            for batch, tokens in zip(batches + batches[::-1], wanted + wanted[::-1], strict=True):
                found = engine.generate(batch["input_ids"], 9, attention_mask=batch["attention_mask"])
                assert torch.equal(found, tokens)


@pytest.mark.parametrize("method", ["mha", "chai", "chai_qkv"])
def test_prefill_and_decode_steps_give_the_logits_of_the_model(method):
    model, method, batch = make_model("llama"), METHODS[method], make_batch([9, 12, 3])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    new = torch.tensor([[5, 40, 7], [8, 9, 10], [11, 60, 13]])
    with chai.Engine(model, method, batch_size=3, max_length=20) as engine:
        found = [engine.prefill(ids, mask)] + [engine.decode_step(tokens) for tokens in new]
        greedy = engine.decode_step()
    with torch.no_grad(), method(model):
        tokens = new.t()
        tokens = torch.cat([tokens, found[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = model(torch.cat([ids, tokens], 1), attention_mask=mask, position_ids=positions).logits[:, -5:]
    for index, logits in enumerate([*found, greedy]):
        torch.testing.assert_close(logits, wanted[:, index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["mha", "chai"])
def test_a_step_that_is_timed_runs_the_same_each_time(method):
    """It is the step of the last of ``length`` tokens, and the request goes on after it."""
    model, ids = make_model("llama"), make_batch([9])["input_ids"]
    with chai.Engine(model, METHODS[method], max_length=64) as engine:
        with pytest.raises(ValueError, match="length is 9"):
            engine.prefill(ids)
            engine.repeated_step(9)
        run = engine.repeated_step(30)
        first = engine.decoder.logits.clone()
        run()
        assert torch.equal(engine.decoder.logits, first) and first.isfinite().all()
        assert engine.decoder.position.tolist() == [30]
        assert engine.decode_step().isfinite().all()
        for length in (5, 65):
            with pytest.raises(ValueError, match=f"length is {length}; valid: up to 64"):
                engine.repeated_step(length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_where_transformers_does(dtype):
    """Logits differ no more from those in fp32 than the model's own."""
    model, batch = make_model("qwen3"), make_batch([9, 12, 7])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def own():
        with torch.no_grad():
            return model(ids, attention_mask=mask, position_ids=positions).logits[:, -1].float()

    exact = own()
    model.to(dtype)
    stock = (own() - exact).norm()
    with chai.Engine(model, batch_size=3, max_length=64) as engine:
        assert (engine.prefill(ids, mask).float() - exact).norm() < 1.5 * stock
    with chai.Engine(model, max_length=64, kernels=True) as engine:
        assert (engine.prefill(ids[1:2]).float() - exact[1]).norm() < 1.5 * stock
    with chai.Engine(model, Chai(clusters=COUNTS), batch_size=3, max_length=64) as engine:
        tokens = engine.generate(ids, 40, attention_mask=mask)  # the padded length grows past 64
        assert tokens.shape == (3, 52)


def test_the_cache_holds_what_the_counts_say():
    """Keys of k heads and values of all; with grouped queries no more keys than there are, or k can read."""
    size = 64 * 8 * 4  # tokens, head_dim, bytes

    def heads(family, method):
        with chai.Engine(make_model(family), method, max_length=33) as engine:
            return engine.cache_bytes / size

    assert heads("llama", METHODS["mha"]) == 3 * 16
    assert heads("llama", METHODS["chai"]) == 16 + (3 + 8) + (2 + 8)
    assert heads("llama", METHODS["chai_qkv"]) == 16 + 6 + 4
    assert heads("qwen3", Random(clusters=3)) == 3 * (3 + 4)
    assert heads("qwen3", METHODS["group_aware"]) == 8 + (2 + 4) + (1 + 4)


def test_lengths_of_graphs():
    """Few lengths, none shorter than asked, at most 256 tokens or an eighth too long."""
    assert [bucket(length) for length in (1, 256, 257, 2048, 2049, 8192, 8193, 32768)] == [
        256, 256, 512, 2048, 2304, 8192, 9216, 32768,
    ]  # fmt: skip
    assert all(0 <= bucket(n) - n < max(257, n / 8 + 1) for n in range(1, 9000))


def test_gradients_inference_mode_and_autocast_of_the_caller_do_not_matter():
    model, batch = make_model("llama"), make_batch([12])
    wanted = expected(model, METHODS["chai"], batch)
    with torch.inference_mode():
        ids = batch["input_ids"].clone()
        found = chai.generate(model, ids, METHODS["chai"], 9)
    assert torch.equal(found, wanted) and not found.is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chai.generate(model, batch["input_ids"], METHODS["chai"], 9), wanted)
    model(found).logits.sum().backward()  # the parameters are ordinary ones
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_tokens_of_a_request_outlive_the_next_one():
    """Also of a single row, whose tokens lie in the engine's memory as they are returned."""
    model = make_model("llama")
    first, second = (make_batch([9])["input_ids"] + shift for shift in (0, 1))
    with chai.Engine(model, Mha(), max_length=64) as engine:
        tokens = engine.generate(first, 4, stop_tokens=())
        kept = tokens.clone()
        engine.generate(second, 4, stop_tokens=())
    assert torch.equal(tokens, kept) and tokens.is_contiguous()
