"""Run folders of plausible shape, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

LENGTHS = (128, 256, 512, 1024, 2048)
PARAMS_7B = [32] * 18 + [4] * 14


def save(root: Path, experiment: str, frame: pd.DataFrame, run_id: str, **fields: Any) -> Path:
    """A finished run on disk; ``updated``, ``model``, ``method`` ... replace what is there by default."""
    updated = fields.pop("updated", 1_790_000_000)
    result = {"experiment": experiment, "model": "llama7b", "method": "chai", "run_id": run_id, "heads": 32}
    result |= {"heads_kept": PARAMS_7B, "dtype": "float16", "device_name": "NVIDIA H200", "batch_size": 1}
    result |= {"versions": {"torch": "2.13.0"}, **fields}
    folder = root / experiment / result["model"] / result["method"] / "none" / run_id
    folder.mkdir(parents=True)
    frame.to_parquet(folder / "measurements.parquet", index=False)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "status.json").write_text(json.dumps({"state": "done", "updated": updated}))
    return folder


def memory(counts: list[int] = PARAMS_7B, heads: int = 32, size: int = 128, itemsize: int = 2) -> pd.DataFrame:
    """Of the memory experiment; the live bytes are a little off the formula, so that the two can be told apart."""
    rows = []
    for length in LENGTHS:
        for method, kept in (("mha", [heads] * len(counts)), ("chai", counts)):
            formula = length * size * itemsize * sum(k + heads for k in kept)
            live = formula + (4096 if method == "chai" else 0)
            rows.append({"method": method, "length": length, "cache_bytes": live, "formula_bytes": formula})
    return pd.DataFrame(rows).assign(allocated_bytes=lambda f: f.cache_bytes, weights_bytes=1, peak_bytes=None, steps=8)


def latency(
    counts: list[int] = PARAMS_7B, heads: int = 32, baselines: tuple[str, ...] = ("eager", "sdpa"), scale: float = 1.0
) -> pd.DataFrame:
    """Of the latency experiment: prefill grows with the length, decoding hardly does."""
    rows = []
    mean = sum(counts) / len(counts)
    for phase in ("prefill", "decode"):
        for length in LENGTHS:
            x = length / 2048
            attention = (60 * x * x if phase == "prefill" else 2.4 * x) * scale
            linear = (230 * x + 8 if phase == "prefill" else 14) * scale
            for part, k in [("model", None), *(("attention", k) for k in sorted(set(counts)))]:
                share = (heads + (mean if k is None else k)) / (2 * heads)
                rest = linear if part == "model" else 0.0
                slower = {"eager": 3.1 if phase == "prefill" else 1.2, "sdpa": 1.0, "xformers": 1.04}
                times = {name: rest + attention * slower[name] + 0.02 for name in baselines}
                times["chai"] = rest * (0.94 + 0.04 / x / 16) + attention * share * 1.15 + 0.02
                best = min(baselines, key=times.__getitem__)
                limit = (rest + attention + 0.01) / (rest * 0.93 + attention * share + 0.01)
                for name, ms in times.items():
                    rows.append(
                        {"part": part, "phase": phase, "length": length, "k": k, "implementation": name}
                        | {"baseline": name != "chai", "ms": ms, "ms_p25": ms * 0.97, "ms_p75": ms * 1.05, "rounds": 9}
                        | {
                            "speedup": times[best] / ms,
                            "best_baseline": best,
                            "limit": limit if name == "chai" else 1.0,
                        }
                    )
    return pd.DataFrame(rows).astype({"k": "Int64"})
