"""Run folders of plausible shape, without a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy

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


def with_control(frame: pd.DataFrame, caches: tuple[str, ...] = ("eager_growing", "sdpa_growing", "sdpa_static")):
    """Rows of :func:`latency` as they are now: with further caches and the control, and quartiles of the speedups.

    The growing cache with SDPA is a twentieth faster than the best stock baseline, the control as fast as that.
    """
    keys = ["part", "phase", "length", "k"]
    rows = []
    for _, group in frame.assign(role=frame.baseline.map({True: "baseline", False: "method"})).groupby(
        keys, dropna=False, sort=False
    ):
        rows += group.to_dict("records")
        best = min(group[group.baseline].ms)
        extra = {"sdpa_growing": 0.95, "eager_growing": 1.3, "sdpa_static": 0.97, "products_static": 0.99}
        names = {name: "baseline" for name in caches if group.part.iloc[0] == "model"} | {"control": "control"}
        for name, role in names.items():
            ms = best * extra.get(name, 0.95 if group.part.iloc[0] == "model" else 1)
            rows.append(rows[-1] | {"implementation": name, "role": role, "baseline": role == "baseline", "ms": ms})
            rows[-1] |= {"ms_p25": ms * 0.97, "ms_p75": ms * 1.05, "limit": 1.0}
    found = pd.DataFrame(rows)
    place = found[found.baseline].groupby(keys, dropna=False).ms.idxmin().rename("place").reset_index()
    best = found.merge(place, on=keys).place
    found["speedup"] = found.ms[best].to_numpy() / found.ms
    found["best_baseline"] = found.implementation[best].to_numpy()
    return found.assign(speedup_p25=found.speedup * 0.98, speedup_p75=found.speedup * 1.03)


def latency(
    counts: list[int] = PARAMS_7B, heads: int = 32, baselines: tuple[str, ...] = ("eager", "sdpa"), scale: float = 1.0
) -> pd.DataFrame:
    """Of the latency experiment as earlier versions saved it: prefill grows with the length, decoding hardly does."""
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


SENTENCE = (
    "<s> ▁The ▁quick ▁brown ▁fox ▁jumps ▁over ▁$ 5 . ▁So ▁it ▁had ▁been <0x0A> ▁in ▁2019 , ▁when ▁all ▁of ▁them ▁saw "
    "▁an ▁extraordinarily ▁lazy ▁dog ▁— ▁asleep ▁by ▁its 中 ▁fire"
).split()
#: The same in an alphabet of bytes.
BYTES = (
    "</s> The Ġquick Ġbrown Ġfox Ġjumps Ġover Ġ$ 5 . ĠSo Ġit Ġhad Ġbeen Ċ Ġin Ġ2019 , Ġwhen Ġall Ġof Ġthem Ġsaw "
    "Ġan Ġextraordinarily Ġlazy Ġdog ĠâĢĶ Ġasleep Ġby Ġits ä\N{CEDILLA}Ń Ġfire"
).split()


def profile(
    layers: int, heads: int, samples: int = 2, history: int = 24, tokens: list[str] = SENTENCE, uniform: float = 0.0
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Arrays of the profile experiment and its kept samples: planted clusters, fewer of them with depth.

    Args:
        layers: how many.
        heads: of each.
        samples: kept ones; the second is shorter.
        history: tokens.
        tokens: of the first sample.
        uniform: share of heads with nearly uniform attention.
    """
    rng = np.random.default_rng(layers * heads)
    m, depth = len(tokens), np.linspace(0, 1, layers)
    kept = [{"tokens": tokens if sample == 0 else tokens[: m - 3 * sample]} for sample in range(samples)]
    clusters = np.maximum(np.rint(heads * (1 - depth) ** 2), 3).astype(np.int64)
    assignment = np.empty((layers, heads), np.int64)
    representatives = np.full((layers, clusters.max()), -1, np.int64)
    maps = np.zeros((samples, layers, heads, m), np.float32)
    correlation = np.empty((samples, layers, heads, heads), np.float32)
    sizes, k_axis = np.zeros((layers, heads, heads)), np.arange(1, heads + 1)
    for layer, k in enumerate(clusters):
        weights = 0.5 ** np.arange(k)
        rest = rng.choice(k, heads - k, p=weights / weights.sum())
        assignment[layer] = rng.permutation([*range(k), *rest])
        representatives[layer, :k] = [np.flatnonzero(assignment[layer] == cluster)[0] for cluster in range(k)]
        for sample, text in enumerate(kept):
            length = len(text["tokens"])
            logits = rng.normal(0, 1.6, (k, length))[assignment[layer]] + rng.normal(0, 0.35, (heads, length))
            logits[:, 0] += 4 * depth[layer]
            logits[rng.permutation(heads)[: int(uniform * heads * (1 - depth[layer]))]] *= 0.05
            maps[sample, layer, :, :length] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            correlation[sample, layer] = np.corrcoef(maps[sample, layer, :, :length])
        for count in k_axis:
            sizes[layer, count - 1, :count] = 1 + (heads - count) * (w := 0.55 ** np.arange(count)) / w.sum()
    error = (
        (1.2 - depth)[:, None] * heads * np.exp(-(k_axis - 1) / (0.35 * clusters[:, None] + 1)) * (1 - k_axis / heads)
    )
    n = np.arange(1, history + 1)
    entropy = -(maps[0] * np.log(np.maximum(maps[0], 1e-30))).sum(-1) / np.log(m)
    fixed = (clusters == heads)[:, None]
    arrays = {
        "clusters": clusters, "assignment": assignment, "representatives": representatives,
        "error": error, "error_sd": 0.1 * error, "error_static": 1.5 * error,
        "correlation": correlation.mean(0), "sample_correlation": correlation, "maps": maps,
        "cluster_sizes": sizes, "cluster_sizes_sd": np.sqrt(sizes) * 0.3,
        "changes": np.where(fixed, 0, (0.3 + 0.3 * rng.random((layers, 1))) * n[:-1] ** -1.3),
        "agreement": np.where(fixed, 1, 1 - np.exp(-n / (2 + 6 * rng.random((layers, 1))))),
        "entropy": entropy.astype(float), "first_token": maps[0, :, :, 0].astype(float),
        "own_token": maps[0, :, :, -1].astype(float),
    }  # fmt: skip
    return arrays, kept


def save_profile(
    root: Path, arrays: dict[str, np.ndarray], kept: list[dict[str, Any]], run_id: str, **fields: Any
) -> Path:
    """A finished profile on disk; ``updated``, ``model``, ``key_heads`` ... replace what is there by default."""
    updated = fields.pop("updated", 1_790_000_000)
    layers, heads = arrays["assignment"].shape
    result = {"experiment": "profile", "model": "llama7b", "method": "none", "task": "c4", "run_id": run_id}
    result |= {"heads": heads, "layers": layers, "key_heads": heads, "heads_kept": arrays["clusters"].tolist()}
    result |= {"dtype": "float16", "device": "cuda", "device_name": "NVIDIA H200", "batch_size": 1, "seed": 0}
    result |= {"versions": {"torch": "2.13.0"}, "metrics": {}, **fields}
    folder = root / "profile" / result["model"] / "none" / result["task"] / run_id
    folder.mkdir(parents=True)
    content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    (folder / "profile.safetensors").write_bytes(content)
    model = {"name": result["model"], "layers": layers, "heads": heads, "key_heads": result["key_heads"]}
    corpus = {"name": result["task"], "source": "allenai/c4", "fingerprint": "f", "samples": 1024, "tokens": 500_000}
    about = {"format": 1, "model": model, "corpus": corpus | {"longest": 2048}, "features": "causal"}
    about |= {"rule": {"name": "plateau", "threshold": 0.05}, "decide_tokens": 5, "kept": kept, "saving": 0.2}
    about |= {"versions": result["versions"], "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "profile.json").write_text(json.dumps(about))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "status.json").write_text(json.dumps({"state": "done", "updated": updated}))
    return folder
