"""Output projections fitted to clusters: against least squares, in the product, and refused where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

from chai.engine import Engine
from chai.errors import ChaiError
from chai.methods.chai_output import ChaiOutput
from chai.offline.head_profile import HeadProfile
from chai.offline.refit import FITTED, fit_outputs, save_fitted
from chai.offline.sensitivity import clustered_layer
from chai.patching.apply import capture
from chai.patching.model_info import find_blocks
from chai.patching.outputs import output_weight
from tests.chai.test_output_clusters import COUNTS, output_model, profile_of
from tests.models import HEADS, LAYERS, make_batch, relative_error

EXACT = 3
FAMILIES = ("llama", "gpt2", "gemma2", "opt")


def batches(count: int = 2):
    return [make_batch([12, 12, 12], seed=seed)["input_ids"] for seed in range(count)]


def fitted_profile(model, folder, ridge: float = 0.1) -> str:
    """A head profile with output projections fitted to its clusters."""
    path = profile_of(model, folder)
    profile = HeadProfile.load(path)
    clusters = [profile.clusters(layer, k, "output") for layer, k in enumerate(COUNTS)]
    digest = save_fitted(folder / FITTED, fit_outputs(model, batches(), clusters, EXACT, ridge))
    about = json.loads((folder / "profile.json").read_text())
    about["refit"] = {"metric": "output", "exact_tokens": EXACT, "group_aware": False, "sha256": digest}
    (folder / "profile.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_ridge_regression_towards_the_identity(family, tmp_path):
    model, ridge = output_model(family), 0.3
    profile = HeadProfile.load(profile_of(model, tmp_path))
    clusters = [profile.clusters(layer, k, "output") for layer, k in enumerate(COUNTS)]
    found = fit_outputs(model, batches(), clusters, EXACT, ridge)
    assert set(found) == {layer for layer in range(LAYERS) if COUNTS[layer] < HEADS}
    rows = {layer: ([], []) for layer in found}

    def collect(inputs):
        if inputs.layer_idx in rows:
            parts = clustered_layer(inputs, clusters[inputs.layer_idx], EXACT), inputs.stock()
            for part, kept in zip(parts, rows[inputs.layer_idx], strict=True):
                kept.append(part[:, EXACT:].flatten(2).flatten(0, 1).double())

    with capture(model, collect):
        for ids in batches():
            model(ids)
    for layer, (x, y) in ((layer, map(torch.cat, pair)) for layer, pair in rows.items()):
        # The penalty as further rows of a plain least squares problem.
        width = x.shape[1]
        root = (ridge * (x.T @ x).diagonal().mean()).sqrt() * torch.eye(width, dtype=torch.float64)
        expected = torch.linalg.lstsq(torch.cat([x, root]), torch.cat([y, root])).solution
        weight = output_weight(find_blocks(model)[layer].output).double()
        assert relative_error(found[layer].double(), weight @ expected.T) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_layers_output_is_nearer_to_the_models_own(family, tmp_path):
    """The first layer with clusters, whose inputs are the model's own: on the texts of the fit, after the warm-up."""
    model, ids = output_model(family), batches()[0]
    path = fitted_profile(model, tmp_path, ridge=1e-4)
    first = next(layer for layer in range(LAYERS) if COUNTS[layer] < HEADS)
    module = find_blocks(model)[first].output

    def outputs(context):
        seen = []
        with context, module.register_forward_hook(lambda *call: seen.append(call[2])):
            model(ids)
        return torch.cat(seen, 1)

    exact = outputs(torch.no_grad())
    plain, fitted = (outputs(ChaiOutput(profile=path, tokens=EXACT, refit=refit)(model)) for refit in (False, True))
    torch.testing.assert_close(fitted[:, :EXACT], exact[:, :EXACT], atol=1e-5, rtol=1e-4)
    errors = [float((found - exact)[:, EXACT:].norm()) for found in (plain, fitted)]
    assert errors[1] < 0.8 * errors[0]


@torch.no_grad()
def test_a_prompt_in_parts_and_padding_give_the_same(tmp_path):
    model, ids = output_model("llama"), batches()[0]
    method = ChaiOutput(profile=fitted_profile(model, tmp_path), tokens=EXACT, refit=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with method(model):
        whole = model(ids).logits
        store = method.new_cache(model)
        parts = [model(ids[:, begin:end], past_key_values=store).logits for begin, end in ((0, 2), (2, 7), (7, 12))]
        padded = torch.cat([ids.new_zeros(len(ids), 2), ids], 1)
        mask = torch.cat([ids.new_zeros(len(ids), 2), torch.ones_like(ids)], 1)
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 2:]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left, whole, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any("forward" in block.output.__dict__ for block in find_blocks(model))


@torch.no_grad()
def test_it_works_inside_the_wrapper_of_accelerate(tmp_path):
    model, ids = output_model("llama"), batches()[0]
    method = ChaiOutput(profile=fitted_profile(model, tmp_path), tokens=EXACT, refit=True)
    with method(model):
        expected = model(ids).logits
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu"), append=True)
    for block in find_blocks(model):
        add_hook_to_module(block.output, AlignDevicesHook(execution_device="cpu"))
    try:
        with method(model):
            torch.testing.assert_close(model(ids).logits, expected)
    finally:
        remove_hook_from_module(model, recurse=True)


def test_what_does_not_fit_is_one_line(tmp_path):
    model = output_model("llama")
    with pytest.raises(ValueError, match=r"refit needs a profile with fitted output projections"):
        ChaiOutput(profile=profile_of(model, tmp_path / "plain"), refit=True)
    (tmp_path / "fitted").mkdir()
    path = fitted_profile(model, tmp_path / "fitted")
    for settings, message in (
        ({"tokens": 5}, "tokens is 5; valid with refit: 3"),
        ({"tokens": EXACT, "clusters": 2}, "clusters is 2; valid with refit: null"),
        ({"tokens": EXACT, "prior": 4.0}, "prior is 4.0; valid with refit: null"),
        ({"tokens": EXACT, "group_aware": True}, "group_aware is True; valid with refit: False"),
    ):
        with pytest.raises(ValueError, match=message):
            ChaiOutput(profile=path, refit=True, **settings)
    file = tmp_path / "fitted" / FITTED
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(ChaiError, match=r"refit.safetensors is damaged or of another profile"):
        ChaiOutput(profile=path, refit=True, tokens=EXACT)
    file.unlink()
    with pytest.raises(ChaiError, match=r"cannot read .*refit.safetensors: No such file"):
        ChaiOutput(profile=path, refit=True, tokens=EXACT)


def test_the_engine_refuses_it(tmp_path):
    model = output_model("llama")
    method = ChaiOutput(profile=fitted_profile(model, tmp_path), tokens=EXACT, refit=True)
    with pytest.raises(ValueError, match=r"does not run ChaiOutput with refit=true, .*; valid: refit=false") as error:
        Engine(model, method)
    assert "\n" not in str(error.value)
