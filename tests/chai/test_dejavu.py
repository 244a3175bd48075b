"""DejaVu against a slow loop over tokens and heads, against multi-head attention, and its predictors on disk."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from chai.methods import Dejavu
from chai.methods.dejavu import num_kept, observe_layers
from chai.offline.predictor import Predictor, load_predictor, model_shape, sample_weights
from chai.patching.apply import switched_attention
from chai.patching.model_info import find_blocks, num_neurons
from tests.models import FAMILIES, HEADS, LAYERS, make_batch, make_model
from tests.oracle import attend_one_by_one

NAME = "oracle_norms"


def write(path, fill):
    fill(path)


def make_predictor(model, folder, seed=0, neurons=0, dense=(), dense_mlp=(), **record):
    """A random predictor that says it was trained for ``model``."""
    torch.manual_seed(seed)
    predictor = Predictor(model_shape(model.config), 5, neurons, 7 if neurons else 0, dense, dense_mlp)
    predictor.fingerprint.copy_(sample_weights(model))
    folder.mkdir(exist_ok=True)
    predictor.save(folder, write, **record)
    return str(folder)


def slow_logits(model, batch, keep, predictor=None, dense=()):
    """fp64, one token and one head at a time; heads scored by their norm, or by the predictor's equation."""
    exact, hidden = copy.deepcopy(model).double(), {}

    def forward(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        rows, heads = query.shape[:2]
        sources = torch.arange(heads).expand(rows, -1)
        out = attend_one_by_one(query, key, value, scaling, attention_mask, sources, 0, softcap=softcap)  # [B, H, T, D]
        for b in range(rows if module.layer_idx not in dense else 0):
            for t in range(query.shape[2]):
                if predictor is None:
                    scores = [float(sum(x * x for x in out[b, h, t])) for h in range(heads)]
                else:
                    net, x = predictor.heads[str(module.layer_idx)], hidden[module.layer_idx][b, t]
                    middle = (net.down.weight.double() @ x + net.down.bias.double()).clamp(min=0)
                    scores = (net.up.weight.double() @ middle + net.up.bias.double()).tolist()
                for h in sorted(range(heads), key=lambda h: (scores[h], -h))[
                    : heads - keep
                ]:  # of equal ones the first stays
                    out[b, h, t] = 0
        return out.transpose(1, 2).to(query.dtype).contiguous(), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, eager_mask)
    for index, block in enumerate(find_blocks(exact)):
        block.attention.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: hidden.update({index: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    with switched_attention(exact, NAME):
        return exact(**batch, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scored_by", ["oracle", "predictor"])
@torch.no_grad()
def test_logits_equal_the_slow_loop(family, scored_by, tmp_path):
    model, batch = make_model(family), make_batch([6, 9, 4])
    path = "oracle" if scored_by == "oracle" else make_predictor(model, tmp_path)
    with Dejavu(predictor=path, sparsity=0.5)(model):
        logits = model(**batch).logits
    expected = slow_logits(model, batch, HEADS // 2, None if scored_by == "oracle" else load_predictor(tmp_path))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real].double(), expected[real], rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    sparsity=st.sampled_from([0.1, 0.3, 0.5, 0.8, 0.99]),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_any_batch_equals_the_slow_loop(lengths, sparsity, side, seed):
    model, batch = make_model("qwen2", seed), make_batch(lengths, seed, side)
    method = Dejavu(predictor="oracle", sparsity=sparsity)
    (keep,) = set(method.heads_kept(model.config))
    assert keep == max(1, round(HEADS * (1 - sparsity)))
    with method(model):
        logits = model(**batch).logits
    expected = slow_logits(model, batch, keep)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real].double(), expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_nothing_masked_is_multi_head_attention(family, side):
    model, batch = make_model(family), make_batch([9, 12, 3], side=side)
    expected = model(**batch).logits
    left = make_batch([9, 12, 3])
    tokens = model.generate(**left, max_new_tokens=8, do_sample=False)
    with Dejavu(predictor="oracle", sparsity=0.0)(model):
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.generate(**left, max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@torch.no_grad()
def test_generation_equals_scoring_the_whole_text(family, tmp_path):
    """The choice is each token's own, so steps, beams' prefixes and padding change nothing."""
    model, lengths = make_model(family), [9, 12, 3]
    batch = make_batch(lengths)
    with Dejavu(predictor=make_predictor(model, tmp_path), sparsity=0.5)(model):
        steps = model.generate(
            **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for row, length in enumerate(lengths):
            whole = model(steps.sequences[row, 12 - length :][None]).logits[0, -7:-1]
            stepwise = torch.stack([logits[row] for logits in steps.logits])
            torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-4)
        together = model.generate(**batch, max_new_tokens=6, num_beams=3, do_sample=False)
        alone = model.generate(batch["input_ids"][1:2], max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("scored_by", ["oracle", "predictor"])
@torch.no_grad()
def test_neurons_of_a_relu_model(scored_by, tmp_path):
    """Neurons alone: equal to an activation function that zeroes all but the top ones, token by token."""
    model, batch = make_model("opt"), make_batch([6, 8])
    path = "oracle" if scored_by == "oracle" else make_predictor(model, tmp_path, neurons=96)
    with Dejavu(predictor=path, sparsity=0.0, mlp_sparsity=0.75)(model):
        logits = model(**batch).logits
    slow, read = copy.deepcopy(model), {}
    predictor = None if scored_by == "oracle" else load_predictor(tmp_path)

    class Few(torch.nn.Module):
        """ReLU, then one token after the other all but the top quarter of the neurons zeroed."""

        def __init__(self, index):
            super().__init__()
            self.index = index

        def forward(self, value):
            value = value.clamp(min=0)
            for place, neurons in enumerate(value):
                scores = neurons if predictor is None else predictor.neurons[str(self.index)](read[self.index][place])
                for neuron in sorted(range(96), key=lambda n: (float(scores[n]), -n))[:72]:
                    neurons[neuron] = 0
            return value

    for index, layer in enumerate(slow.model.decoder.layers):
        layer.fc1.register_forward_pre_hook(lambda _, args, index=index: read.update({index: args[0]}))
        layer.activation_fn = Few(index)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], slow(**batch).logits[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_observed_is_what_the_model_computes():
    model, batch, seen = make_model("opt"), make_batch([7, 7]), {}
    with observe_layers(model, lambda part, layer, *tensors: seen.update({(part, layer): tensors}), mlp=True):
        model(**batch)
    fed, layer = {}, model.model.decoder.layers[1]
    layer.self_attn.out_proj.register_forward_pre_hook(lambda _, args: fed.update(x=args[0]))
    layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: fed.update(hidden=args[0]))
    layer.fc1.register_forward_pre_hook(lambda _, args: fed.update(mlp=args[0]))
    layer.fc2.register_forward_pre_hook(lambda _, args: fed.update(neurons=args[0]))
    model(**batch)
    assert len(seen) == 2 * LAYERS
    hidden, norms = seen["heads", 1]
    torch.testing.assert_close(norms, fed["x"].view(14, HEADS, -1).pow(2).sum(-1).sqrt())
    assert torch.equal(hidden, fed["hidden"].view(14, 64))
    hidden, neurons = seen["neurons", 1]
    assert torch.equal(hidden, fed["mlp"].view(14, 64)) and torch.equal(neurons, fed["neurons"].view(14, 96))


@torch.no_grad()
def test_the_activity_of_a_layer_is_gone_before_the_next_is_passed_on():
    model, seen = make_model("opt"), []

    def receive(part, layer, hidden, importance):
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(importance))

    with observe_layers(model, receive, mlp=True):
        model(**make_batch([7, 7]))
    assert len(seen) == 2 * LAYERS


@pytest.mark.parametrize("scored_by", ["oracle", "predictor"])
@pytest.mark.parametrize(("setting", "dense"), [(2, {0, 1}), ([0, 2], {0, 2}), ([], set()), (None, {1})])
@torch.no_grad()
def test_dense_layers_use_all_heads(scored_by, setting, dense, tmp_path):
    """A count is one of the first layers; ``None`` leaves it to the predictor, here trained without layer 1."""
    model, batch = make_model("llama"), make_batch([6, 9, 4])
    if scored_by == "oracle" and setting is None:
        dense = set()
    path = "oracle"
    if scored_by == "predictor":
        path = make_predictor(model, tmp_path, dense=dense if setting is None else ())
    method = Dejavu(predictor=path, sparsity=0.5, dense_layers=setting)
    assert method.heads_kept(model.config) == [HEADS if layer in dense else HEADS // 2 for layer in range(LAYERS)]
    with method(model):
        logits = model(**batch).logits
    predictor = None if scored_by == "oracle" else load_predictor(tmp_path)
    expected = slow_logits(model, batch, HEADS // 2, predictor, dense)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real].double(), expected[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dense_mlp_layers_are_the_last_ones_and_use_all_neurons():
    model, batch = make_model("opt"), make_batch([6, 8])
    method = Dejavu("oracle", sparsity=0.0, mlp_sparsity=0.75, dense_mlp_layers=2)
    assert method.neurons_kept(model.config) == [24, 96, 96]
    counted = []
    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(lambda _, args: counted.append(int((args[0] != 0).sum(-1).max())))
    model(**batch)
    plain = [counted.pop(0) for _ in range(LAYERS)]
    assert min(plain) > 24
    with method(model):
        for layer in model.model.decoder.layers:  # after the hook that masks
            layer.fc2.register_forward_pre_hook(lambda _, args: counted.append(int((args[0] != 0).sum(-1).max())))
        model(**batch)
    masked = counted[1::2]  # the first hook sees the neurons before they are masked
    assert masked[0] == 24 and masked[1] > 24 and masked[2] > 24


def test_dense_layers_that_cannot_be_are_one_line(tmp_path):
    model = make_model("llama")
    for setting, message in (
        (3, "dense_layers is 3; valid for this model: a count from 0 to 2"),
        (-1, "dense_layers is -1; valid"),
        ([0, 3], r"dense_layers is \[0, 3\]; valid for this model: layers from 0 to 2"),
        ([0, 1, 2], "all layers of this model"),
    ):
        with pytest.raises(ValueError, match=message):
            Dejavu("oracle", dense_layers=setting).check(model.config)
    path = make_predictor(model, tmp_path, dense=[0, 1])
    Dejavu(path, dense_layers=2).check(model.config)
    with pytest.raises(ValueError, match=r"no network for the heads of layers \[1\]; valid: dense_layers that include"):
        Dejavu(path, dense_layers=[0]).check(model.config)


def test_recall_of_the_masked_layers_is_reported(tmp_path):
    model = make_model("opt")
    recall = {"heads": {"0.5": [None, 0.9, 0.7]}, "neurons": {"0.75": [0.6, 0.8, None]}}
    path = make_predictor(model, tmp_path, neurons=num_neurons(model.config), dense=[0], dense_mlp=[2], recall=recall)
    method = Dejavu(path, sparsity=0.5, mlp_sparsity=0.75)
    assert method.note(model.config) == (
        "dejavu masks heads: the saving is simulated; predictor recall 0.80 at 50 %; predictor MLP recall 0.70 at 75 %"
    )
    assert method.result_fields(model.config)["predictor"] == {
        "heads": {"sparsity": 0.5, "recall": 0.8, "dense_layers": [0]},
        "neurons": {"sparsity": 0.75, "recall": 0.7, "dense_layers": [2]},
    }
    only = Dejavu(path, sparsity=0.5, dense_layers=[0, 1])  # a layer that is dense here does not count
    assert only.result_fields(model.config)["predictor"]["heads"]["recall"] == 0.7
    assert "recall not measured at 30 %" in Dejavu(path, sparsity=0.3).note(model.config)
    assert Dejavu("oracle").result_fields(model.config) == {}


@torch.no_grad()
def test_a_predictor_of_an_earlier_version_is_used_as_before(tmp_path):
    """Its record has no dense layers, and the mean recall alone."""
    model = make_model("llama")
    path = make_predictor(model, tmp_path, metrics={"recall_50": 0.79})
    record = json.loads((tmp_path / "predictor.json").read_text())
    del record["dense_layers"], record["dense_mlp_layers"]
    (tmp_path / "predictor.json").write_text(json.dumps(record))
    method = Dejavu(path)
    assert method.heads_kept(model.config) == [HEADS // 2] * LAYERS
    assert method.note(model.config).endswith("predictor recall 0.79 at 50 %")
    with method(model):
        model(**make_batch([5]))


@torch.no_grad()
def test_model_is_restored_also_after_an_exception():
    model, batch = make_model("llama"), make_batch([9])
    before = model(**batch).logits
    with pytest.raises(KeyError), Dejavu(predictor="oracle")(model):
        assert not torch.equal(model(**batch).logits, before)
        raise KeyError
    assert torch.equal(model(**batch).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_predictor_fits_its_model_in_any_dtype(dtype, tmp_path):
    model = make_model("llama")
    method = Dejavu(predictor=make_predictor(model, tmp_path))
    method.check_weights(model.to(dtype))


def test_predictors_of_other_models_are_refused(tmp_path):
    model = make_model("llama")
    method = Dejavu(predictor=make_predictor(model, tmp_path))
    with pytest.raises(ValueError, match="same shape with other weights"):
        method.check_weights(make_model("llama", seed=1))
    with pytest.raises(ValueError, match="same shape with other weights"), method(make_model("llama", seed=1)):
        pass
    with pytest.raises(ValueError, match="model_type=llama, this one has opt"):
        method.check(make_model("opt").config)
    changed = json.loads((tmp_path / "predictor.json").read_text())
    (tmp_path / "predictor.json").write_text(json.dumps({**changed, "num_attention_heads": 4}))
    with pytest.raises(ValueError, match="num_attention_heads=4, this one has 8"):
        method.check(model.config)


def test_what_is_no_predictor_is_one_line(tmp_path):
    model = make_model("llama")
    for broken in ("no folder", "no json", "other json", "cut off", "other sizes"):
        folder = tmp_path / broken.replace(" ", "_")
        if broken != "no folder":
            make_predictor(model, folder)
        if broken == "no json":
            (folder / "predictor.json").write_text("{")
        elif broken == "other json":
            (folder / "predictor.json").write_text('{"hidden_size": 64}')
        elif broken == "cut off":
            whole = (folder / "predictor.safetensors").read_bytes()
            (folder / "predictor.safetensors").write_bytes(whole[: len(whole) // 2])
        elif broken == "other sizes":
            record = json.loads((folder / "predictor.json").read_text())
            (folder / "predictor.json").write_text(json.dumps({**record, "bottleneck": 6}))
        with pytest.raises(ValueError, match="predictor") as error, Dejavu(predictor=str(folder))(model):
            pass
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no predictor for this model.*oracle"):
        Dejavu(predictor=None).check(model.config)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="sparsity is 1.0; valid: 0 to below 1"):
        Dejavu(predictor="oracle", sparsity=1.0)
    with pytest.raises(ValueError, match="mlp_sparsity needs a model with ReLU.*silu"):
        Dejavu(predictor="oracle", mlp_sparsity=0.5).check(make_model("llama").config)


def test_neurons_need_a_predictor_of_neurons(tmp_path):
    model = make_model("opt")
    with pytest.raises(ValueError, match="has no neurons"):
        Dejavu(predictor=make_predictor(model, tmp_path), mlp_sparsity=0.5).check(model.config)


def test_a_model_has_as_many_blocks_as_layers():
    for family in FAMILIES:
        assert len(find_blocks(make_model(family))) == LAYERS
    assert [num_kept(16, sparsity) for sparsity in (0.0, 0.1, 0.3, 0.5, 0.99)] == [16, 14, 11, 8, 1]
