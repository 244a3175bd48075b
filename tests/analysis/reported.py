"""A results folder with runs of real models and of the embedded one, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.analysis import scored, synthetic

RIGHT = {"piqa": 160, "hellaswag": 150, "arc_challenge": 90, "arc_easy": 140, "boolq": 120}
GROUPS = [8, 6, 4, 4]
RANDOM = {"clusters": "llama7b_params", "seed": 0}


def fields(method: str, share: float, kept: list[int]) -> dict[str, Any]:
    """Of an accuracy run: operations, seconds and bytes."""
    kind = {"mha": "none", "dejavu": "simulated"}.get(method, "real")
    savings = {"kind": kind, "kv_bytes": round(1000 * share), "kv_bytes_mha": 1000, "heads_kept": kept}
    flops = {"tokens": 2048, "method": round(28e12 * (0.5 + share / 2)), "mha": round(28e12)}
    return {"savings": savings, "flops": flops, "seconds": 60.0 * share}


def scores(root: Path, model: dict[str, Any], prefix: str = "", lost: int = 4) -> None:
    """MHA, CHAI, random and DejaVu on five tasks."""
    kept, whole = (GROUPS, [16] * 4) if prefix else (synthetic.PARAMS_7B, [32] * 32)
    chai = scored.CHAI | ({"clusters": GROUPS} if prefix else {})
    control = RANDOM | ({"clusters": GROUPS} if prefix else {})
    for name, right in RIGHT.items():
        for method, settings, share, wrong, heads in (
            ("mha", {}, 1.0, 0, whole),
            ("chai", chai, 0.809, lost, kept),
            ("random", control, 0.809, 40, kept),
            ("dejavu", {"sparsity": 0.3, "mlp_sparsity": 0.0}, 1.0, 37, whole),
        ):
            answers = scored.outcomes(right, wrong)
            more = fields(method, share, heads)
            scored.save(root, method, prefix + name, answers, settings, model=model, result=more)


def probes(root: Path, model: str, counts: list[int], heads: int) -> None:
    """Memory, latency and a profile."""
    more: dict[str, Any] = {"model": model, "heads": heads, "heads_kept": counts}
    frame = synthetic.memory(counts, heads)
    exact = frame.assign(cache_bytes=frame.formula_bytes, weights_bytes=13_476_000_000)
    synthetic.save(root, "memory", exact, f"memory{model[:6]}", **more)
    synthetic.save(root, "latency", synthetic.latency(counts, heads), f"latency{model[:5]}", **more)
    arrays, kept = synthetic.profile(len(counts), heads)
    arrays["agreement"] = np.maximum(arrays["agreement"], 0.95)
    folder = synthetic.save_profile(root, arrays, kept, f"profile{model[:5]}", model=model)
    planted = arrays["clusters"].tolist()
    (folder / "config.yaml").write_text(f"method: {{name: none}}\nmodel: {{clusters: {planted}}}\ntask: {{name: c4}}\n")


def everything(root: Path) -> Path:
    """All of it; returns the folder."""
    scores(root, scored.MODEL)
    probes(root, "llama7b", synthetic.PARAMS_7B, 32)
    scores(root, scored.TINY, "micro_", lost=1)
    probes(root, "tiny", GROUPS, 16)
    return root
