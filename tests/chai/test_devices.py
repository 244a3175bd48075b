from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from chai.loading import ModelError, ModelSource, load_model
from chai.methods import load_method
from chai.offline.predictor import Predictor, load_predictor, model_shape, sample_weights
from chai.patching import projections
from chai.patching.devices import describe_devices, execution_device, input_device, layer_devices, loaded
from tests.conftest import REPOSITORY
from tests.models import make_batch, make_model

METHODS = {
    "mha": {},
    "random": {"clusters": [3, 8, 2]},
    "chai": {"clusters": [3, 8, 2]},
    "chai_qkv": {"clusters": [3, 8, 2]},
    "dejavu": {"predictor": "oracle"},
    "spatten": {},
}


#: For each family its decoder, the decoder's parts beside the layers (the embedding first), and its head.
PARTS = {
    "llama": ("model", ["embed_tokens", "norm", "rotary_emb"], "lm_head"),
    "opt": ("model.decoder", ["embed_tokens", "embed_positions", "final_layer_norm"], "lm_head"),
    "gpt_neox": ("gpt_neox", ["embed_in", "final_layer_norm", "rotary_emb"], "lm_head"),
}


def offload(family: str, folder, *, embedding: str = "cpu"):
    """A model with two layers on disk, whose weights are there in their forward alone."""
    decoder, parts, head = PARTS[family]
    places = {head: "cpu"} | {f"{decoder}.{part}": "cpu" for part in parts}
    places[f"{decoder}.{parts[0]}"] = embedding
    places |= {f"{decoder}.layers.{index}": place for index, place in enumerate(["cpu", "disk", "disk"])}
    return dispatch_model(make_model(family), places, main_device="cpu", offload_dir=str(folder))


def answers(model, method):
    batch = make_batch([9, 3, 12])
    with torch.no_grad(), method(model):
        cache = method.new_cache(model)
        logits = model(**batch, past_key_values=cache).logits[batch["attention_mask"].bool()]
        text = model.generate(**batch, max_new_tokens=5, num_beams=2, do_sample=False)
        plain = model(batch["input_ids"][2:]).logits  # one pass, each layer deciding as it comes
    return logits, text, plain, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in METHODS), ("opt", "chai"), ("gpt_neox", "chai")]
)
def test_offloaded_weights_give_the_same_numbers(family, name, tmp_path):
    method = load_method(name)(**METHODS[name])
    model = offload(family, tmp_path, embedding="disk")
    assert all(parameter.device.type == "meta" for parameter in model.get_decoder().layers[1].parameters())
    whole, found = answers(make_model(family), method), answers(model, method)
    assert all(torch.equal(one, other) for one, other in zip(whole[:3], found[:3], strict=True))
    assert found[3] == whole[3]
    assert all(parameter.device.type == "meta" for parameter in model.get_decoder().layers[1].parameters())


def test_projections_of_offloaded_weights_are_sliced(tmp_path, monkeypatch):
    model, seen = offload("llama", tmp_path), []
    project = projections.project_heads
    monkeypatch.setattr(projections, "OVERHEAD", 0)
    monkeypatch.setattr(
        projections,
        "project_heads",
        lambda hidden, linear, heads, size: seen.append(len(heads)) or project(hidden, linear, heads, size),
    )
    method = load_method("chai")(clusters=2)
    query = model.get_decoder().layers[1].self_attn.q_proj
    before = dict(query.__dict__)
    with torch.no_grad(), method(model):
        model.generate(**make_batch([12]), max_new_tokens=3, do_sample=False)
    assert set(seen) == {2}
    assert query.__dict__["forward"] is before["forward"] and query.__dict__["_old_forward"] == before["_old_forward"]


def test_a_predictor_knows_offloaded_weights(tmp_path):
    model = make_model("llama")
    predictor = Predictor(model_shape(model.config), 8)
    predictor.fingerprint.copy_(sample_weights(model))
    (tmp_path / "predictor").mkdir()
    predictor.save(tmp_path / "predictor", lambda path, fill: fill(path))
    divided = offload("llama", tmp_path / "weights")
    assert torch.equal(sample_weights(divided), sample_weights(model))
    load_predictor(tmp_path / "predictor").check_model(divided)
    method = load_method("dejavu")(predictor=str(tmp_path / "predictor"), sparsity=0.5)
    assert torch.equal(answers(divided, method)[0], answers(model, method)[0])


def test_where_a_divided_model_computes(tmp_path):
    model = offload("llama", tmp_path, embedding="disk")
    assert model.device.type == "meta"
    assert input_device(model) == torch.device("cpu")
    assert set(layer_devices(model)) == {torch.device("cpu")}
    assert describe_devices(model) == "cpu"
    weight = model.get_decoder().layers[1].self_attn.q_proj
    with loaded(weight):
        assert weight.weight.device.type == "cpu"
    assert weight.weight.device.type == "meta"
    assert execution_device(nn.ReLU()) == torch.device("cpu")
    assert describe_devices(make_model("opt")) == "cpu"


def test_two_devices():
    """Products of tensors on two devices fail there, so everything must be where its layer is."""
    command = [sys.executable, "-m", "tests.chai.two_devices"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_loading_by_a_device_map(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    whole = load_model(ModelSource("small", path=str(tmp_path), device="cpu"))
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    method = load_method("chai")(clusters=2)
    for given in ("auto", "balanced", "sequential", places):
        divided = load_model(ModelSource("small", path=str(tmp_path), device_map=given))
        assert torch.equal(answers(divided, method)[0], answers(whole, method)[0])
    with pytest.raises(ModelError, match=r"device 'cuda:99' is not available"):
        load_model(ModelSource("small", path=str(tmp_path), device_map={"model": 99, "lm_head": "cpu"}))
    with pytest.raises(ModelError, match="cannot load the model from folder"):
        load_model(ModelSource("small", path=str(tmp_path), device_map={"model": "disk"}))
