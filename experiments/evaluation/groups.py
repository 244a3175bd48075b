"""Scores of a group of lm-eval: its definition's means over its tasks, as lm-eval computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr
from lm_eval.config.group import AggMetricConfig
from omegaconf import DictConfig

from experiments.runs.definitions import metric_key
from experiments.runs.registry import group_metrics


def group_result(task: DictConfig, results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the result of a group, with the fields of a task's result that tables show.

    Args:
        task: The configuration with the group's name.
        results: The results of all its tasks, of one method.

    Returns:
        ``None`` for a task, a tag, and a group without scores of its own.
    """
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for entry in group_metrics(task):
        if entry.get("aggregation", "mean") != "mean":  # a function of the group's own
            continue
        rule = AggMetricConfig(**entry)
        if rule.filter_list is None:
            measured = dict.fromkeys(key for result in results for key in result["metrics"])
            keys = [key for key in measured if key.partition(",")[0] == rule.metric]
        else:
            keys = [metric_key(rule.metric, label) for label in rule.filter_list]
        for key in keys:
            members = [result for result in results if key in result["metrics"]]
            if not members:
                continue
            sizes = [result["n"] for result in members]
            metrics[key] = aggregate_subtask_metrics(
                [result["metrics"][key] for result in members], sizes, rule.weight_by_size
            )
            errors = [result["stderr"].get(key) for result in members]
            if all(isinstance(error, (int, float)) for error in errors):
                stderr[key] = float(
                    pooled_sample_stderr(errors, sizes) if rule.weight_by_size else unweighted_mean_stderr(errors)
                )
    if not metrics:
        return None
    first = results[0]
    chosen = [key for key in metrics if task.metric in (None, key, key.partition(",")[0])]
    savings = {
        name: sum(result["savings"][name] * result["n"] for result in results) for name in ("kv_bytes", "kv_bytes_mha")
    }
    return {
        "model": first["model"],
        "method": first["method"],
        "task": f"{task.name} (group)",
        "metric": (chosen or list(metrics))[0],
        "metrics": metrics,
        "stderr": stderr,
        "savings": {**savings, "kind": first["savings"]["kind"], "heads_kept": first["savings"]["heads_kept"]},
        "n": sum(result["n"] for result in results),
        "seconds": sum(result["seconds"] for result in results),
    }
