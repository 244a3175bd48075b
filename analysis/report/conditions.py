"""Whether a run counts for a claim about one of the paper's models; the reason if it does not.

A claim about LLaMA-7B is one about that model: all fields of its architecture (``conf/model``), the cluster counts of
its configuration or of a head profile, 16-bit numbers on both sides, and for accuracy its trained weights and the whole
data set. Runs of other models are shown, and count for no claim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.plotting.style import clusters
from analysis.results.files import SkippedRun, read_csv, read_file
from analysis.results.runs import RANDOM, Run, base_name
from analysis.results.scores import Score, read_config
from analysis.tables import specs
from analysis.tables.cells import Table
from analysis.tables.settings import defaults, text
from analysis.tables.specs import MEAN, TABLES, task_name

#: Names of the tables with the paper's numbers, and their models.
PAPER_TABLES = tuple(name for name in TABLES if name != "micro")
PAPER_MODELS = tuple(dict.fromkeys(TABLES[name].model for name in PAPER_TABLES))
HALF = ("float16", "bfloat16")  # the paper's sizes are of 16 bits; both count, the same on both sides
OTHER_WEIGHTS = 5.0  # points by which MHA's score differs at most from the paper's, if the weights are the same
LEAST_COMBINED = 0.1  # share of the heads; with fewer combined, next to nothing is clustered
MOST_NAMED = 3  # differences of an architecture that are named
#: Fields of an architecture that count something.
NOUNS = {
    "num_hidden_layers": "layers", "num_attention_heads": "heads", "num_key_value_heads": "KV heads",
    "max_position_embeddings": "positions", "vocab_size": "tokens in the vocabulary",
}  # fmt: skip
#: Fields of ``result.json`` that repeat the architecture.
REPEATED = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "key_heads": "num_key_value_heads"}
OLDER = "result.json has no architecture: made by an older version (force=true repeats the run)"
#: Settings of a method that may differ between runs that count: the counts are checked by themselves.
FREE = ("name", "clusters", "profile", "predictor")


@dataclass(frozen=True)
class PassedOver:
    """A finished run that was found for a claim and does not count."""

    run: Run
    reason: str


def of_model(run: Run, model: str) -> str:
    """Return why a run is not of one of the paper's models; empty if it is, or if ``model`` is another one."""
    if model not in PAPER_MODELS:
        return ""
    expected: dict[str, Any] = defaults(f"model/{model}")["architecture"]
    result = run.result
    # What the run repeats of the architecture, older runs too.
    repeated = {key: result[name] for name, key in REPEATED.items() if result.get(name) is not None}
    if counts := heads_kept(run):
        repeated["num_hidden_layers"] = len(counts)
    if reason := _differences(repeated, {key: value for key, value in expected.items() if key in repeated}):
        return reason
    # What was loaded, and what the configuration asked for.
    loaded = result.get("architecture")
    if not isinstance(loaded, dict):
        return OLDER
    if reason := _differences(loaded, expected):
        return reason
    try:
        asked = read_config(run.folder)["model"].get("architecture")
    except SkippedRun as skipped:
        return str(skipped)
    return _differences(asked if isinstance(asked, dict) else {}, expected)


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Return e.g. ``2 layers, the paper's model has 32``; empty if all expected fields are as found."""
    words = []
    for key, value in expected.items():
        if key not in found:
            words.append(f"no {key}")
        elif found[key] != value and key in NOUNS:
            words.append(f"{found[key]:,} {NOUNS[key]}, the paper's model has {value:,}")
        elif found[key] != value:
            words.append(f"{key} {found[key]}, the paper's model has {value}")
    more = f"; {len(words) - MOST_NAMED} more differences" if len(words) > MOST_NAMED else ""
    return "; ".join(words[:MOST_NAMED]) + more


def of_16_bits(run: Run) -> str:
    """Return why the dtype is not the paper's."""
    return "" if run.dtype in HALF else f"{run.dtype}, the paper's numbers have 16 bits ({' or '.join(HALF)})"


def on_a_gpu(run: Run) -> str:
    """Return why the device is not of the kind that the paper measured on."""
    device = str(run.result.get("device", "unknown device"))
    return "" if device.startswith("cuda") else f"measured on {device}, the paper's times are of a GPU"


def of_trained_weights(run: Run) -> str:
    """Return why the weights are not trained ones."""
    return "random weights" if run.model.endswith(RANDOM) else ""


def with_own_counts(run: Run, config: dict[str, Any] | None = None) -> str:
    """Return why CHAI did not run with the counts of the model's configuration or of a head profile, and its defaults.

    Counts set by hand would let a claim about memory and one about accuracy be met by different ones.
    """
    try:
        method = (config or read_config(run.folder))["method"]
    except SkippedRun as skipped:
        return str(skipped)
    model, counts = base_name(run.model), heads_kept(run)
    usual = defaults(f"method/{run.method}")
    for key, value in method.items():
        free = key in FREE or (isinstance(usual.get(key), str) and usual[key].startswith("${"))
        if not free and key in usual and value != usual[key]:
            return f"method.{key}={text(value)}, the method's default is {text(usual[key])}"
    published = defaults(f"model/{model}").get("clusters")
    # Counts of a head profile replace these, except in the static variant, which takes its distances from a profile.
    from_profile = method.get("profile") is not None and (run.method != "chai_static" or method.get("clusters") is None)
    if "clusters" in usual and not from_profile and published is not None and method.get("clusters") != published:
        return f"{clusters(counts)} set by hand, the model's counts are {published}"
    heads = defaults(f"model/{model}").get("architecture", {}).get("num_attention_heads")
    if heads and counts and combined(counts, heads) < LEAST_COMBINED:
        return f"{clusters(counts)}: of {heads} heads next to none are combined"
    return ""


def combined(counts: Sequence[int], heads: int) -> float:
    """Return the share of all heads that clustering removes."""
    return 1 - sum(counts) / (len(counts) * heads)


def heads_kept(run: Run) -> list[int]:
    """Return the clusters of each layer that a run recorded; empty if it did not."""
    counts = run.result.get("heads_kept") or (run.result.get("savings") or {}).get("heads_kept")
    return counts if isinstance(counts, list) and all(type(k) is int and k > 0 for k in counts) else []


def data_sizes() -> dict[str, int]:
    """Return the items of each task's whole data set (SkippedRun: ``tasks.csv`` is missing or corrupt)."""
    return read_file(
        specs.PAPER / "tasks.csv", lambda path: {line["task"]: int(line["items"]) for line in read_csv(path)}
    )


def of_score(score: Score, sizes: dict[str, int]) -> str:
    """Return why an accuracy run does not count; empty for models that the paper has no claim about."""
    run, model = score.run, base_name(score.run.model)
    if model not in PAPER_MODELS or score.task not in sizes:
        return ""
    if reason := of_trained_weights(run) or of_model(run, model):
        return reason
    whole, limit = sizes[score.task], score.config.get("limit")
    if limit is not None and score.n < whole:
        return f"first {score.n:,} items only, of {whole:,} ({task_name(score.task)}, limit={limit})"
    if score.n != whole or limit is not None:
        return f"{score.n:,} items, {task_name(score.task)} has {whole:,}"
    if shots := score.config["task"].get("num_fewshot"):
        return f"{shots} examples in the prompt, the paper's tasks have none"
    if reason := of_16_bits(run):
        return reason
    if score.method == "mha":
        return _of_baseline(score, model)
    return with_own_counts(run, score.config) if score.method in ("chai", "chai_static", "chai_qkv") else ""


def _of_baseline(score: Score, model: str) -> str:
    heads = defaults(f"model/{model}")["architecture"]["num_attention_heads"]
    if any(k != heads for k in heads_kept(score.run)):
        return f"{clusters(heads_kept(score.run))}, MHA has {heads} heads"
    paper = next(
        (row.values[score.task] for name in PAPER_TABLES if TABLES[name].model == model
         for row in specs.paper_rows(name) if row.method == "mha" and score.task in row.values), None,
    )  # fmt: skip
    ours, where = 100 * score.value, task_name(score.task)
    if paper is not None and abs(ours - float(paper)) > OTHER_WEIGHTS:
        return f"MHA scores {ours:.1f} % on {where}, the paper's model {paper} %: other weights or other data"
    return ""


def split(scores: Sequence[Score]) -> tuple[list[Score], list[PassedOver]]:
    """Divide accuracy runs into those that count, and those that do not, with the reason.

    Raises:
        SkippedRun: the paper's numbers are missing or corrupt.
    """
    sizes = data_sizes()
    counted, passed = [], []
    for score in scores:
        if reason := of_score(score, sizes):
            passed.append(PassedOver(score.run, reason))
        else:
            counted.append(score)
    return counted, passed


def not_compared(table: Table, scores: Iterable[Score]) -> list[PassedOver]:
    """Return the runs of a filled table's model that its cells do not compare, with the reason."""
    passed = []
    like = table.like
    for score in scores:
        if like is None or score.run.model != table.model or score.task not in table.spec.tasks:
            continue
        if score.conditions_id != like.conditions_id:
            passed.append(PassedOver(score.run, _other_conditions(score, like)))
    for row in table.rows:
        for cell in row.cells:
            if cell.task != MEAN and cell.score and cell.state in ("refused", "no MHA"):
                reason = cell.reason or "no MHA run under the same conditions"
                passed.append(PassedOver(cell.score.run, reason))
            elif cell.score and cell.baseline and cell.score.run.dtype != cell.baseline.run.dtype:
                passed.append(PassedOver(cell.score.run, _other_dtype(cell.score, cell.baseline)))
    return passed


def _other_conditions(score: Score, like: Score) -> str:
    if score.run.dtype != like.run.dtype:
        return _other_dtype(score, like)
    ours, theirs = score.conditions, like.conditions
    names = [key for key in ours if ours[key] != theirs.get(key)]
    return "other conditions than the compared runs: " + ", ".join(f"{key}={text(ours[key])}" for key in names)


def _other_dtype(score: Score, like: Score) -> str:
    return f"{score.run.dtype}, the runs to compare it with are of {like.run.dtype}"
