"""The reader's machine at a small size: models, tasks and texts as files, made on first use in ``machine/``."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

ROOT = Path("machine")  # in the copy of the project
#: Layers of models whose number of layers no preset of cluster counts needs.
LAYERS = {"opt66b": 12}


@functools.cache
def shape(name: str) -> dict[str, Any]:
    """Return the sizes of ``conf/model/<name>.yaml`` made small: widths and ``LAYERS``, not heads or words."""
    architecture = architecture_of(name)
    head_dim = 8 if "rope_parameters" in architecture else 4  # a quarter of it is rotated in GPT-NeoX
    hidden = head_dim * architecture["num_attention_heads"]
    widths = {"hidden_size": hidden, "head_dim": head_dim, "word_embed_proj_dim": hidden}
    widths |= {"intermediate_size": 64, "ffn_dim": 64}
    layers = {"num_hidden_layers": LAYERS[name]} if name in LAYERS else {}
    return {key: widths[key] for key in widths if key in architecture} | layers


@functools.cache
def architecture_of(name: str) -> dict[str, Any]:
    """Return the architecture of ``conf/model/<name>.yaml``, with what the file inherits."""
    from experiments.config.compose import compose_config

    return dict(compose_config([f"model={name}"]).model.architecture)


def narrow(name: str) -> list[str]:
    """Return the overrides that give a model its small widths."""
    return [f"model.architecture.{key}={value}" for key, value in shape(name).items()]


@functools.cache
def model(name: str) -> Path:
    """Return the folder of a model of the configuration: random weights, small widths."""
    from omegaconf import OmegaConf

    return save(name, OmegaConf.to_container(OmegaConf.create(architecture_of(name))) | shape(name))


@functools.cache
def own_llama() -> Path:
    """Return the folder of a LLaMA that is not in the configuration."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8}
    return save("my-llama", {"model_type": "llama", **sizes})


def save(name: str, architecture: dict[str, Any]) -> Path:
    """Write random weights of an architecture, with the tokenizer of the embedded model and its words alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from experiments.microworld.tokenizer import build_tokenizer, vocabulary

    torch.manual_seed(0)
    kind = architecture.pop("model_type")
    words = {"vocab_size": len(vocabulary()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**architecture, **words})
    AutoModelForCausalLM.from_config(config).save_pretrained(ROOT / name)
    build_tokenizer().save_pretrained(ROOT / name)
    return (ROOT / name).absolute()


@functools.cache
def tasks() -> Path:
    """Return a folder with a few items of each task, the embedded model's too, and the data that a page has written."""
    from experiments.microworld.items import write_tasks

    folder = (ROOT / "tasks").absolute()
    write_tasks(folder, count=4)
    for path in list(folder.glob("micro_*.jsonl")):
        name = path.stem.removeprefix("micro_")
        shutil.copy(path, folder / yaml.safe_load(Path("conf/task", f"{name}.yaml").read_text())["data_file"])
    sums = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(12)]
    for split, items in (("train", sums[:8]), ("test", sums[8:])):
        (folder / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for path in Path("data").glob("*.jsonl"):
        shutil.copy(path, folder)
    return folder


@functools.cache
def corpus() -> Path:
    """Return a JSONL file of texts, with the column of C4."""
    from experiments.microworld.documents import document

    texts = (document(random.Random(number), phase=1) for number in range(40))
    path = (ROOT / "c4.jsonl").absolute()
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": " ".join(part for part, _ in text)}) + "\n" for text in texts))
    return path


def reader_file(path: str) -> Path:
    """Return what stands for a path below ``/data``, which the pages use for files of the reader."""
    makers = {
        "/data/my-llama": own_llama,
        "/data/stories260K": own_llama,
        "/data/llama-7b": functools.partial(model, "llama7b"),
        "/data/tasks": tasks,
        "/data/c4.jsonl": corpus,
    }
    assert path in makers, f"{path}: tests/docs/machine.py does not make it"
    return makers[path]()
