"""Scores of a task: which metric is shown and on which scale, and the metrics of single items."""

from __future__ import annotations

import math

import pytest
from lm_eval.api.metrics import bits_per_byte, mean, perplexity
from omegaconf import OmegaConf

from experiments.evaluation.samples import sample_rows
from experiments.evaluation.tasks import shown_metric
from experiments.runs.folder import RunError
from experiments.tables.accuracy import results_table


def fails(values):
    raise KeyError("of the task's own code")


def test_the_metric_of_an_item_is_the_aggregation_of_it_alone():
    """The perplexity of lambada's items is passed on as a log-likelihood."""
    sample = {
        "doc_id": 0, "doc_hash": "", "target": "", "filter": "none", "resps": [[(-2.5, True)]],
        "filtered_resps": [(-2.5, True)], "metrics": ["perplexity", "acc", "bits", "broken", "text"],
        "perplexity": -2.5, "acc": True, "bits": (-2.5, 5), "broken": 0.5, "text": "none",
    }  # fmt: skip
    rules = {"perplexity": perplexity, "acc": mean, "bits": bits_per_byte, "broken": fails}
    (row,) = sample_rows([sample], rules)
    assert row["perplexity"] == pytest.approx(math.exp(2.5))
    assert row["acc"] == 1.0
    assert row["bits"] == pytest.approx(2.5 / 5 / math.log(2))
    assert math.isnan(row["broken"]) and math.isnan(row["text"])


def test_a_wrong_metric_of_a_task_with_code_of_its_own_ends_in_a_note(capsys):
    task = OmegaConf.create({"name": "coded", "metric": "acc"})
    assert shown_metric(task, {"class": object}, ["exact", "f1"]) == "exact"
    assert "task 'coded' has no metric 'acc'; valid: exact, f1; shown: exact" in "".join(capsys.readouterr())
    task.metric = "f1"
    assert shown_metric(task, {"class": object}, ["exact", "f1"]) == "f1"
    assert not "".join(capsys.readouterr())
    listed = {"metric_list": [{"metric": "f1"}], "process_results": object}  # which gives another
    assert shown_metric(task, listed, ["exact"]) == "exact"
    assert "task 'coded' did not measure f1; shown: exact" in "".join(capsys.readouterr())
    with pytest.raises(RunError, match="task 'coded' has no metric that is a number"):
        shown_metric(task, {"class": object}, [])


def result(method, task, metric, score):
    savings = {"kind": "real", "kv_bytes": 1.0, "kv_bytes_mha": 2.0, "heads_kept": [2]}
    return {"model": "m", "method": method, "task": task, "metric": metric, "metrics": {metric: score},
            "stderr": {metric: score / 10}, "savings": savings, "n": 4, "seconds": 1.0}  # fmt: skip


def shown(*scores):
    """Title, and the scores and changes of tasks with MHA and another method."""
    rows = []
    for task, metric, first, second in scores:
        baseline = result("mha", task, metric, first)
        rows += [(baseline, baseline), (result("chai", task, metric, second), baseline)]
    table = results_table(rows)
    return table.title, [tuple(column.cells)[1::2] for column in table.columns[2:4]]


def test_fractions_are_shown_in_percent_and_other_scores_as_they_are():
    title, (scores, changes) = shown(
        ("piqa", "acc_norm", 0.75, 0.5), ("squad", "f1", 42.5, 0.5), ("mrpc", "f1", 0.8, 0.7),
        ("qa", "bleu_max", 20.0, 0.5), ("qa", "bleu_acc", 0.2, 0.1), ("wiki", "bits_per_byte", 0.9, 1.1),
        ("cola", "mcc", -0.1, 0.2), ("gsm", "exact_match,first", 0.5, 0.25),
    )  # fmt: skip
    assert title == "Scores of m; fractions in %"
    assert [score.split(" ")[0] for score in scores] == [
        "50.0",
        "0.500",
        "70.0",
        "0.500",
        "10.0",
        "1.100",
        "20.0",
        "25.0",
    ]
    assert changes == ("-25.0", "-42.000", "-10.0", "-19.500", "-10.0", "+0.200", "+30.0", "-25.0")
    assert scores[0] == "50.0 ± 5.0" and scores[1] == "0.500 ± 0.050"


def test_a_table_of_accuracies_alone_says_so():
    title, _ = shown(("piqa", "acc_norm", 0.75, 0.5), ("boolq", "acc", 0.5, 1.0))
    assert title == "Accuracy of m, % ± standard error"
