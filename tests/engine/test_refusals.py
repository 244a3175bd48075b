"""What the engine does not run is refused in one line that names what is valid."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import chai
from chai.engine.attention import _refuse_capture
from chai.engine.stopping import Stopping
from chai.methods import Chai, ChaiOutput, Dejavu, Spatten
from chai.methods.chai import ClusteredHeadAttention
from tests.chai.test_output_clusters import profile_of
from tests.engine.requests import METHODS
from tests.models import SHAPE, make_model

IDS = torch.tensor([[5, 6, 7]])


def refused(message, model=None, method=None, ids=IDS, **options):
    """The request fails with one line that contains the message."""
    with pytest.raises(ValueError, match=message) as error:
        chai.generate(make_model("llama") if model is None else model, ids, method, 3, **options)
    assert "\n" not in str(error.value) and "valid" in str(error.value)


class OtherAttention(Chai):
    """A method with an attention of its own."""

    def attend(self, *args):
        return ClusteredHeadAttention.attend(self, *args)


@pytest.mark.parametrize("method", [Spatten(), Dejavu(predictor="oracle"), OtherAttention(clusters=2)])
def test_methods(method):
    refused(
        f"does not run {type(method).__name__}; valid: mha, chai, chai_static, static, random, chai_qkv, chai_output",
        None,
        method,
    )


@pytest.mark.parametrize("name", ["metric", "representative", "prior"])
def test_clusters_by_the_output_of_a_request(name, tmp_path):
    """The engine's warm-up has no errors of the output: refused before the first request."""
    if name == "prior":
        method = ChaiOutput(profile=profile_of(make_model("llama"), tmp_path), prior=1.0)
    elif name == "metric":
        method = Chai(clusters=2, metric="output", membership="kmedoids")
    else:
        method = Chai(clusters=2, representative="output")
    refused(f"does not run {type(method).__name__} with clusters by the output of a request's tokens", None, method)


def test_counts_that_do_not_fit():
    for counts, message in (([1, 2], "2 counts, the model has 3 layers"), (None, "neither clusters nor a profile")):
        with pytest.raises(ValueError, match=message):
            chai.generate(make_model("llama"), IDS, Chai(clusters=counts), 3)


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma", "phi3", "qwen3_moe", "olmo2"])
def test_families(family):
    refused(f"the family '{family}'; valid: llama, mistral, qwen2, qwen3", make_model(family))


def test_a_model_without_logits():
    torch.manual_seed(0)
    refused("no logits", LlamaForSequenceClassification(LlamaConfig(**SHAPE)).eval())


def test_training_mode():
    refused(r"training mode.*valid: model.eval\(\)", make_model("llama").train())


def test_a_sliding_window_that_is_reached():
    model = make_model("mistral_sliding")
    refused("sliding window of 8 tokens.*valid: max_length up to 8", model, ids=torch.full((1, 9), 5))
    assert chai.generate(model, IDS, None, 5).shape == (1, 8)
    with chai.Engine(model, max_length=5) as engine, pytest.raises(ValueError, match="9 tokens; valid: up to 7"):
        engine.generate(torch.full((1, 9), 5), 1)


def test_rotary_frequencies_that_depend_on_the_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused(r"depend on the length \(dynamic\)", LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval())


def test_an_activation():
    refused("hidden_act 'relu'; valid: silu", LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="relu")).eval())


def test_hooked_replaced_and_quantized_weights():
    model = make_model("llama")
    refused("is hooked or replaced", cpu_offload(copy.deepcopy(model), "cpu"))
    hooked = copy.deepcopy(model)
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    refused("'model.layers.1.mlp' is hooked", hooked)

    class Adapted(nn.Linear):
        pass

    model.model.layers[2].self_attn.q_proj.__class__ = Adapted
    refused("self_attn.q_proj' is a Adapted", model)


def test_weights_of_several_dtypes_or_without_numbers():
    model = make_model("llama")
    model.lm_head.to(torch.bfloat16)
    refused("the weights are bfloat16, float32; valid: one dtype of", model)
    refused("the weights are float64; valid: one dtype of", make_model("llama").double())
    refused("the weights are on meta", LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to("meta"))


def test_a_method_that_is_applied_already():
    model = make_model("llama")
    with METHODS["chai"](model), pytest.raises(ValueError, match="applied to this model already"):
        chai.generate(model, IDS, None, 3)


def test_kernels_without_a_device_to_run_them(monkeypatch):
    monkeypatch.setattr("chai.engine.engine.available", lambda device: False)
    refused("kernels=True needs Triton and a CUDA device", kernels=True)


MASK = torch.tensor([[1, 1, 0]])


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"padding on the right.*valid: padding on the left", {"attention_mask": MASK}),
        ("row without tokens", {"attention_mask": MASK * 0}),
        ("between tokens", {"attention_mask": MASK.roll(-1) * torch.tensor([1, 0, 1])}),
        (r"attention_mask is \(1, 2\); valid: \(1, 3\)", {"attention_mask": MASK[:, :2]}),
        ("temperature is -1", {"temperature": -1}),
        ("top_k is 0", {"temperature": 1, "top_k": 0}),
        ("top_p is 1.5", {"temperature": 1, "top_p": 1.5}),
        ("ids are 5 to 97; valid: 0 to 96", {"ids": torch.tensor([[5, 97]])}),
        ("ids are -1 to 5", {"ids": torch.tensor([[5, -1]])}),
        (r"ids are \(3,\)", {"ids": torch.tensor([5, 6, 7])}),
        (r"ids are \(1, 0\) of int64", {"ids": torch.zeros(1, 0, dtype=torch.long)}),
        ("of float32; valid: integers", {"ids": IDS.float()}),
        ("ids are of type list; valid: a tensor", {"ids": [[5, 6, 7]]}),
        ("attention_mask is of type list; valid: a tensor", {"attention_mask": [[1, 1, 1]]}),
        (r"stop_tokens are 1.5; valid: an integer", {"stop_tokens": 1.5}),
        (r"stop_tokens are \[5, 'x'\]; valid: an integer", {"stop_tokens": [5, "x"]}),
        ("stop_tokens are 5.0; valid: an integer", {"stop_tokens": torch.tensor(5.0)}),
    ],
)
def test_arguments(message, options, monkeypatch):
    """They are refused before any weight is moved."""
    monkeypatch.setattr("chai.engine.engine.Decoder", None)
    refused(message, **options)


@pytest.mark.parametrize("count", [2.5, "3", True, None])
def test_a_count_that_is_no_integer(count):
    message = f"is {count!r}; valid: an integer, 1 or more"
    with pytest.raises(ValueError, match=f"max_new_tokens {message}"):
        chai.generate(make_model("llama"), IDS, None, count)
    with pytest.raises(ValueError, match=f"batch_size {message}"):
        chai.Engine(make_model("llama"), batch_size=count)


def test_a_padding_token_outside_the_vocabulary():
    """It is an input of the next step; without stop tokens it is not read."""
    model = make_model("llama")
    for pad in (-1, 97):
        model.generation_config.pad_token_id = pad
        refused(f"the padding token is {pad} .*valid: 0 to 96", model, stop_tokens=5)
        assert chai.generate(model, IDS, None, 2, stop_tokens=()).shape == (1, 5)


@pytest.mark.parametrize("stop_tokens", [5, torch.tensor(5), torch.tensor([5, 96]), (5, 96), {5}])
def test_forms_of_stop_tokens(stop_tokens):
    assert Stopping.read(make_model("llama"), stop_tokens).tokens in ((5,), (5, 96))


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        ("tokens are float32; valid: a tensor of int64 or int32", torch.tensor([5.0])),
        ("tokens are bool; valid", torch.tensor([True])),
        ("tokens are list; valid", [5]),
        ("tokens are 97 to 97; valid: 0 to 96", torch.tensor([97])),
        ("tokens are -1 to -1; valid: 0 to 96", torch.tensor([-1], dtype=torch.int32)),
    ],
)
def test_tokens_of_a_step(message, tokens):
    """The request goes on after them."""
    with chai.Engine(make_model("llama")) as engine:
        engine.prefill(IDS)
        with pytest.raises(ValueError, match=message):
            engine.decode_step(tokens)
        assert engine.decode_step(torch.tensor([5], dtype=torch.int32)).shape == (1, 97)


@pytest.mark.parametrize("call", ["prefill", "generate", "decode_step"])
def test_a_request_that_failed_is_over(call, monkeypatch):
    """Its cache is written in part."""
    with chai.Engine(make_model("llama"), METHODS["chai"]) as engine:
        engine.prefill(torch.full((1, 9), 5))
        length, layer = engine._request.length, engine.decoder.layers[-1]

        def fail(*_):
            assert call != "decode_step" or engine._request.length == length  # not counted before it has run
            raise MemoryError("no memory")

        monkeypatch.setattr(layer.weights, "mlp_output", fail)
        with pytest.raises(MemoryError):
            getattr(engine, call)(*([] if call == "decode_step" else [torch.full((1, 9), 5)]))
        with pytest.raises(ValueError, match=r"no request has been started; valid: prefill\(\) first"):
            engine.decode_step()


def test_tasks_that_would_be_made_within_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _refuse_capture(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="chose other tasks than that of the run before"):
        _refuse_capture(torch.device("cuda"))


def test_what_does_not_fit_an_engine():
    model = make_model("llama")
    for name in ("batch_size", "max_length"):
        with pytest.raises(ValueError, match=f"{name} is 0; valid: 1 or more"):
            chai.Engine(model, **{name: 0})
    with chai.Engine(model, max_length=60) as engine:
        with pytest.raises(ValueError, match="ids have 2 rows; valid: 1, the engine's batch_size"):
            engine.generate(IDS.expand(2, -1), 3)
        with pytest.raises(ValueError, match="the prompt has 3 tokens; valid: up to 2"):
            engine.generate(IDS, 62)
        with pytest.raises(ValueError, match="max_new_tokens is 0; valid: 1 or more"):
            engine.generate(IDS, 0)
        with pytest.raises(ValueError, match=r"no request has been started; valid: prefill\(\) first"):
            engine.decode_step()
        engine.prefill(torch.full((1, 63), 5))
        with pytest.raises(ValueError, match=r"tokens are \(2,\); valid: \(1,\)"):
            engine.decode_step(torch.tensor([5, 6]))
        engine.decode_step()
        with pytest.raises(ValueError, match="the cache is full .64 tokens"):
            engine.decode_step()
        assert engine.generate(IDS, 61).shape == (1, 64)
        with pytest.raises(ValueError, match="ids have 2 rows"):
            engine.prefill(IDS.expand(2, -1))
        with pytest.raises(ValueError, match="no request has been started"):
            engine.decode_step()
