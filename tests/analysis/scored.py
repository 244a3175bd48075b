"""Finished accuracy runs on disk, item by item, without a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

MODEL: dict[str, Any] = {
    "name": "llama7b", "hub_id": "huggyllama/llama-7b", "revision": "main", "path": None, "dtype": "float16",
    "device_map": None, "safetensors_only": True, "random_init": False, "clusters": "llama7b_params",
    "architecture": {"model_type": "llama"}, "fingerprint": None,
}  # fmt: skip
TINY = MODEL | {
    "name": "tiny",
    "hub_id": None,
    "path": "/data/experiments/microworld/model",
    "dtype": "auto",
    "clusters": [8, 6, 4, 4],
}
CHAI = {
    "clusters": "llama7b_params", "seed": 0, "tokens": 5, "membership": "kmeans", "representative": "nearest",
    "features": "causal", "group_aware": False,
}  # fmt: skip
#: SpAtten's settings before `pruning` was one of them.
EARLIER_SPATTEN = {"tokens": 0.5, "heads": 0.75, "values": 1.0, "unpruned_tokens": 0.15, "unpruned_heads": 0.3}
N = 200


def outcomes(right: int, lost: int = 0, gained: int = 0, n: int = N) -> list[float]:
    """Of ``n`` items: under MHA the first ``right`` are right; the method loses the first of them and gains others."""
    answers = [1.0] * right + [0.0] * (n - right)
    for item in range(lost):
        answers[item] = 0.0
    for item in range(right, right + gained):
        answers[item] = 1.0
    return answers


def save(
    root: Path,
    method: str,
    task: str,
    answers: list[float],
    settings: dict[str, Any] | None = None,
    *,
    model: dict[str, Any] = MODEL,
    state: str = "done",
    kind: str | None = None,
    saved: float = 0.0,
    salt: str = "",
    updated: float = 1_790_000_000,
    result: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run whose chosen metric has these answers; the other metric has each answer wrong.

    Args:
        root: the results folder.
        method: name of the method.
        task: name of the task.
        answers: one or zero for each item.
        settings: the method's hyper-parameters.
        model: the model's section.
        state: in ``status.json``.
        kind: of the saving.
        saved: share of the KV cache's bytes.
        salt: prefix of the items' hashes; another one stands for other data.
        updated: end of the run, seconds since 1970.
        result: fields of ``result.json`` that replace the default ones.
        config: ``limit``, ``seed``, ``batch_size``.
    """
    metric = "acc" if task.endswith("boolq") else "acc_norm"
    if method == "spatten" and settings != EARLIER_SPATTEN:
        settings = {"pruning": "global", **(settings or {})}
    whole = {
        "experiment": {"name": "accuracy"}, "method": {"name": method, **(settings or {})}, "model": model,
        "task": {"name": task, "data_dir": None, "num_fewshot": 0, "fingerprint": salt},
        "seed": 0, "limit": None, "batch_size": 16, **config,
    }  # fmt: skip
    identity = {key: value for key, value in whole.items() if key != "method"}
    kind = kind or ("none" if method == "mha" else "real")
    mean = sum(answers) / len(answers)
    fields = {
        "experiment": "accuracy", "method": method, "model": model["name"], "task": task, "metric": metric,
        "metrics": {metric: mean, ({"acc", "acc_norm"} - {metric}).pop(): 0.0},
        "stderr": {metric: (mean * (1 - mean) / (len(answers) - 1)) ** 0.5} if len(answers) > 1 else {},
        "n": len(answers),
        "savings": {"kind": kind, "kv_bytes": round(1000 * (1 - saved)), "kv_bytes_mha": 1000, "heads_kept": [32]},
        "seconds": 1.0, "seed": 0, "settings_id": digest(identity), "run_id": digest(whole),
        "device": "cpu", "dtype": "float16", "versions": {"torch": "2.13.0"}, **(result or {}),
    }  # fmt: skip
    folder = root / "accuracy" / model["name"] / method / task / digest(whole)
    folder.mkdir(parents=True)
    items = range(len(answers))
    rows = {"doc_id": list(items), "doc_hash": [f"{salt}{task}{item}" for item in items], metric: answers}
    frame = pd.DataFrame(rows)
    frame["acc" if metric == "acc_norm" else "acc_norm"] = 0.0
    frame.to_parquet(folder / "samples.parquet", index=False)
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / "result.json").write_text(json.dumps(fields))
    (folder / "status.json").write_text(json.dumps({"state": state, "updated": updated}))
    return folder


def digest(value: Any) -> str:
    """Twelve digits that name a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
