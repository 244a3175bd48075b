"""Results of lm-eval as they are saved: metrics by name and filter, and a row for each item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.metrics import mean

from experiments.runs.definitions import metric_key

Aggregation = dict[str, Callable[[list[Any]], Any]]


def split_metrics(results: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of a task and their standard errors, by :func:`experiments.runs.definitions.metric_key`."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for full, value in results.items():
        name, comma, label = full.partition(",")  # "acc_norm,none": the filter's name is behind the comma
        if not comma or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue  # "N/A" is a standard error that is not defined
        if name.endswith("_stderr"):
            stderr[metric_key(name.removesuffix("_stderr"), label)] = value
        else:
            metrics[metric_key(name, label)] = value
    return metrics, stderr


def sample_rows(
    samples: Sequence[dict[str, Any]], aggregation: Aggregation, columns: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return a row for each item: enough to pair it with another method's, and to score it again.

    lm-eval has a sample for each filter of an item; its metrics become columns of the one row. The metric of an item is
    the task's aggregation of that item alone, as the perplexity of one document. ``columns`` are copied from the item.
    """
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(
            sample["doc_id"], _describe(sample) | {column: sample["doc"][column] for column in columns}
        )
        label = sample["filter"]
        if row.get("responses") is not None:
            row[metric_key("filtered", label)] = [str(response) for response in _flat(sample["filtered_resps"])]
        for name in sample["metrics"]:
            row[metric_key(name, label)] = _item_metric(sample[name], aggregation.get(name))
    return [rows[doc_id] for doc_id in sorted(rows)]


def _describe(sample: dict[str, Any]) -> dict[str, Any]:
    """Return what all filters of an item share: what it is, and what the model said."""
    row: dict[str, Any] = {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "target": str(sample["target"]),
    }
    responses = [response for repeats in sample["resps"] for response in repeats]
    pairs = [response for response in responses if isinstance(response, tuple)]
    nats = [response for response in responses if isinstance(response, float)]  # of a whole text
    texts = [response for response in responses if isinstance(response, str)]
    if pairs or nats:
        row["loglikelihoods"] = [float(value) for value, _ in pairs] or nats
    if pairs:
        row["greedy"] = [bool(greedy) for _, greedy in pairs]
    if texts:
        row["responses"] = texts
    return row


def _flat(values: Sequence[Any]) -> list[Any]:
    """Return values, and those of lists among them."""
    return [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]


def _item_metric(value: Any, aggregate: Callable[[list[Any]], Any] | None) -> float:
    """Return a number for an item; NaN where the aggregation is not defined for a single one."""
    try:
        return float(value if aggregate in (None, mean) else aggregate([value]))
    except Exception:  # the code of a task may raise anything, and the task is already scored
        return float("nan")
