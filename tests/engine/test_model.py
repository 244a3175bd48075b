"""The model works as before while an engine is open, and is as before once it is closed."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import chai
from chai.engine.weights import FusedLinear
from tests.engine.requests import METHODS, expected
from tests.models import make_batch, make_model


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_restored(model, before):
    """Parameters are bit-identical, the same objects, and each has storage of its own."""
    assert {name for name, _ in model.named_parameters()} == set(before)
    storages = set()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad and parameter.is_contiguous()
        storage = parameter.untyped_storage()
        assert storage.nbytes() == parameter.nbytes
        storages.add(storage.data_ptr())
    assert len(storages) == len(before)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_model_is_restored_and_can_be_saved(family, tmp_path):
    model, batch = make_model(family), make_batch([12, 9])
    before, objects = snapshot(model), [id(parameter) for parameter in model.parameters()]
    wanted = expected(model, METHODS["mha"], batch)
    with chai.Engine(model, METHODS["chai"], batch_size=2) as engine:
        engine.generate(batch["input_ids"], 3, attention_mask=batch["attention_mask"])
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert torch.equal(expected(model, METHODS["mha"], batch), wanted)
        assert torch.equal(expected(model, METHODS["chai"], batch)[:, :15], engine.generate(
            batch["input_ids"], 3, attention_mask=batch["attention_mask"]
        ))  # fmt: skip
    check_restored(model, before)
    assert objects == [id(parameter) for parameter in model.parameters()]
    assert torch.equal(expected(model, METHODS["mha"], batch), wanted)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in again.named_parameters())


def test_no_weight_is_stored_twice_while_an_engine_is_open():
    model, method = make_model("llama"), METHODS["chai"]
    total = sum(parameter.nbytes for parameter in model.parameters())
    with chai.Engine(model, method):
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        # Room for the rows of 3 + 3 and 2 + 2 gathered heads of 8 x 64 numbers.
        assert sum(storages.values()) == total + (6 + 4) * 8 * 64 * 4


def test_the_model_is_restored_after_exceptions(monkeypatch):
    model, before = make_model("llama"), snapshot(make_model("llama"))
    with pytest.raises(RuntimeError, match="stop"), chai.Engine(model, METHODS["chai"]):
        raise RuntimeError("stop")
    check_restored(model, before)

    def refuse(*_):
        raise MemoryError("no memory")

    for name in (
        "chai.engine.engine.WarmUp",
        "chai.engine.decoder.Layer.__init__",
        "chai.engine.layers.ClusterBuffers",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, refuse)
            with pytest.raises(MemoryError, match="no memory"):
                chai.Engine(model, METHODS["chai"])
        check_restored(model, before)
    fused, made = chai.engine.weights.FusedLinear, []

    def second(*args):
        made.append(args)
        return refuse() if len(made) == 4 else fused(*args)

    monkeypatch.setattr("chai.engine.weights.FusedLinear", second)  # of the second layer's MLP
    with pytest.raises(MemoryError, match="no memory"):
        chai.Engine(model, METHODS["chai"])
    check_restored(model, before)


@pytest.mark.parametrize("first_closed", [0, 1])
def test_two_engines_on_one_model(first_closed):
    """Of different methods, in turn; whichever is closed first, the other goes on."""
    model, batch = make_model("llama"), make_batch([12])
    before, ids = snapshot(model), batch["input_ids"]
    wanted = [expected(model, METHODS[name], batch) for name in ("mha", "chai")]
    engines = [chai.Engine(model, METHODS[name]) for name in ("mha", "chai")]
    for _ in range(2):
        assert all(torch.equal(e.generate(ids, 9), tokens) for e, tokens in zip(engines, wanted, strict=True))
    engines[first_closed].close()
    other = 1 - first_closed
    assert torch.equal(engines[other].generate(ids, 9), wanted[other])
    engines[other].close()
    check_restored(model, before)


def test_a_closed_engine_says_so():
    model = make_model("llama")
    engine = chai.Engine(model)
    engine.prefill(torch.tensor([[5, 6]]))
    again = engine.repeated_step(9)
    cache = weakref.ref(engine.decoder.layers[0].keys)
    engine.close()
    engine.close()
    assert cache() is None  # the function holds nothing but the engine
    for run in (again, partial(engine.generate, torch.tensor([[5, 6]]), 2)):
        with pytest.raises(ValueError, match="this engine is closed; valid: a new one"):
            run()


def test_closing_needs_little_memory(monkeypatch):
    """Caches and clusters are freed first, and each buffer of weights before the next one is copied."""
    engine = chai.Engine(make_model("llama"), METHODS["chai"])
    engine.prefill(torch.tensor([[5, 6, 7, 8, 9, 10]]))
    layers = engine.decoder.layers
    others = [weakref.ref(tensor) for layer in layers for tensor in (layer.keys, layer.values)]
    others += [weakref.ref(layer.clusters) for layer in layers if layer.clusters is not None]
    others.append(weakref.ref(engine._warm_up.hidden))
    count = 2 * len(layers)
    del layers
    own, restored = FusedLinear.restore, []

    def restore(fused):
        assert not any(ref() is not None for ref in others + restored)
        restored.append(weakref.ref(fused.weight))
        own(fused)

    monkeypatch.setattr(FusedLinear, "restore", restore)
    engine.close()
    assert len(restored) == count and not any(ref() is not None for ref in restored)


def test_generate_of_transformers_is_untouched():
    model, batch = make_model("llama"), make_batch([12])
    chai.generate(model, batch["input_ids"], METHODS["chai"], 3)
    assert "generate" not in model.__dict__ and model.config._attn_implementation == "sdpa"
    assert all("forward" not in module.__dict__ for module in model.modules())
