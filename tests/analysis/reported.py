"""A results folder with runs of real models and of the embedded one, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.analysis import scored, synthetic

#: Items of the whole data sets, and the share that multi-head attention has right.
SIZES = {"piqa": 1838, "hellaswag": 10042, "arc_challenge": 1172, "arc_easy": 2376, "boolq": 3270}
RIGHT = {"piqa": 0.8, "hellaswag": 0.75, "arc_challenge": 0.45, "arc_easy": 0.7, "boolq": 0.75}
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048, "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
MODEL = scored.MODEL | {"architecture": LLAMA_7B}
GROUPS = [8, 6, 4, 4]
RANDOM = {"clusters": "llama7b_params", "seed": 0}


def fields(method: str, share: float, kept: list[int]) -> dict[str, Any]:
    """Of an accuracy run: operations, seconds and bytes."""
    kind = {"mha": "none", "dejavu": "simulated"}.get(method, "real")
    savings = {"kind": kind, "kv_bytes": round(1000 * share), "kv_bytes_mha": 1000, "heads_kept": kept}
    flops = {"tokens": 2048, "method": round(28e12 * (0.5 + share / 2)), "mha": round(28e12)}
    return {"savings": savings, "flops": flops, "seconds": 60.0 * share}


def scores(root: Path, model: dict[str, Any], prefix: str = "", lost: int = 4, **config: Any) -> None:
    """MHA, CHAI, random and DejaVu on five tasks: the whole data sets, or 200 items of the micro tasks.

    Args:
        root: the results folder.
        model: its section of the configuration.
        prefix: of the tasks' names.
        lost: answers that CHAI loses, of 200.
        config: ``limit`` is the number of items; others as for :func:`tests.analysis.scored.save`.
    """
    kept, whole = (GROUPS, [16] * 4) if prefix else (synthetic.PARAMS_7B, [32] * 32)
    chai = scored.CHAI | ({"clusters": GROUPS} if prefix else {})
    control = RANDOM | ({"clusters": GROUPS} if prefix else {})
    for name, right in RIGHT.items():
        n = scored.N if prefix else config.get("limit") or SIZES[name]
        for method, settings, share, wrong, heads in (
            ("mha", {}, 1.0, 0, whole),
            ("chai", chai, 0.809, lost, kept),
            ("random", control, 0.809, 40, kept),
            ("dejavu", {"sparsity": 0.3, "mlp_sparsity": 0.0}, 1.0, 37, whole),
        ):
            answers = scored.outcomes(round(right * n), round(wrong * n / 200), n=n)
            more = fields(method, share, heads) | {"architecture": model["architecture"]}
            scored.save(root, method, prefix + name, answers, settings, model=model, result=more, **config)


def configured(folder: Path, method: dict[str, Any], model: dict[str, Any], task: str = "none") -> Path:
    """Give a finished run its configuration; return its folder."""
    config = {"method": method, "model": model, "task": {"name": task}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def change(folder: Path, **fields: Any) -> None:
    """Replace fields of a run's ``result.json``; ``None`` removes one."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in result.items() if value is not None}))


def probes(root: Path, model: str, counts: list[int], heads: int) -> None:
    """Memory, latency and a profile."""
    section = MODEL if model == "llama7b" else scored.TINY | {"clusters": GROUPS}
    more: dict[str, Any] = {"model": model, "heads": heads, "heads_kept": counts, "device": "cuda:0"}
    more |= {"architecture": section["architecture"]}
    method = {"name": "chai", **scored.CHAI}
    frame = synthetic.memory(counts, heads)
    exact = frame.assign(cache_bytes=frame.formula_bytes, weights_bytes=13_476_000_000)
    configured(synthetic.save(root, "memory", exact, f"memory{model[:6]}", **more), method, section)
    latency = synthetic.latency(counts, heads)
    configured(synthetic.save(root, "latency", latency, f"latency{model[:5]}", **more), method, section)
    arrays, kept = synthetic.profile(len(counts), heads)
    arrays["agreement"] = np.maximum(arrays["agreement"], 0.95)
    about: dict[str, Any] = {"model": model, "n": 1024, "architecture": section["architecture"]}
    folder = synthetic.save_profile(root, arrays, kept, f"profile{model[:5]}", **about)
    configured(folder, {"name": "none"}, section | {"clusters": arrays["clusters"].tolist()}, "c4")


def everything(root: Path) -> Path:
    """All of it; returns the folder."""
    scores(root, MODEL)
    probes(root, "llama7b", synthetic.PARAMS_7B, 32)
    scores(root, scored.TINY, "micro_", lost=1)
    probes(root, "tiny", GROUPS, 16)
    return root
