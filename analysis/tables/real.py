"""The table of ``make real``: methods on a real model, a row for each.

``real.json`` in the results folder lists the runs: a head profile, perplexities, and scores on tasks if there was data.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.results.files import SkippedRun, read_json
from analysis.results.perplexity import PairedRun, paired_runs
from analysis.results.runs import MissingRun, Results
from analysis.results.scores import Score, load_scores
from analysis.stats import compare
from analysis.tables.specs import task_name

NAME = "real"
RECORD = "real.json"
COMMAND = "make real"
TITLE = "Methods on a real model (make real)"
BASE = "mha"
WIDTH = 110  # characters of a note's line
EMPTY = "-"


@dataclass(frozen=True)
class RealTable:
    """The table's text, cell by cell; all columns but the first hold numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """Return heading, table and notes; the table is aligned, hence readable as plain text."""
        notes = "\n".join(textwrap.fill(f"- {note}", WIDTH, subsequent_indent="  ") for note in self.notes)
        return f"### {self.title}\n\n{self.markdown_table()}\n{notes}\n"

    def markdown_table(self) -> str:
        """Return the table alone."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        drawn = [
            [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs)]
            for pairs in (list(zip(line, widths, strict=True)) for line in (self.head, rule, *self.rows))
        ]
        return "".join(f"| {' | '.join(line)} |\n" for line in drawn)


def real_table(results: Results) -> RealTable:
    """Return the table of the runs that ``real.json`` lists (MissingRun: there is none, or a run is missing)."""
    folders = recorded(results.root)
    pairs = [pair for pair in paired_runs(results) if pair.run.folder in folders]
    listed = [folder for folder in folders if folder.parts[-5] == "perplexity"]
    if len(pairs) != len(listed) or not pairs:
        raise MissingRun(f"a run that {results.root / RECORD} lists is missing; make it with: {COMMAND}")
    model = pairs[0].run.model
    scores = [score for score in load_scores(results.of(model)) if score.run.folder in folders]
    corpora = list(dict.fromkeys(folder.parts[-2] for folder in listed))
    listed_tasks = dict.fromkeys(folder.parts[-2] for folder in folders if folder.parts[-5] == "accuracy")
    tasks = [task for task in listed_tasks if any(score.task == task for score in scores)]
    head = ["Method"]
    for corpus in corpora:
        head += [corpus, "nats per token", "bits/byte"]
    head += ["KV saved", "Heads", *map(task_name, tasks)]
    rows = []
    for method in dict.fromkeys(folder.parts[-3] for folder in listed):
        own = {pair.corpus: pair for pair in pairs if pair.run.method == method}
        rows.append(
            [
                method,
                *(cell for corpus in corpora for cell in perplexity_cells(own[corpus])),
                f"{100 * saved(own.values()):.1f} %",
                f"{mean_heads(own[corpora[0]]):.1f}",
                *(task_cell(scores, method, task) for task in tasks),
            ]
        )
    notes = [*about(pairs, profile_of(folders)), *([task_note(scores)] if scores else [])]
    return RealTable(f"{TITLE}: {model}", head, rows, notes)


def recorded(root: Path) -> list[Path]:
    """Return the folders of the listed runs (MissingRun: no list)."""
    try:
        return [root / name for name in read_json(root / RECORD)["runs"]]
    except (SkippedRun, KeyError, TypeError):
        raise MissingRun(f"no {RECORD} in {root} that lists the runs; make it with: {COMMAND}") from None


def perplexity_cells(pair: PairedRun) -> list[str]:
    """Return perplexity, nats per token (of MHA) or their change with its interval, and bits per byte."""
    metrics = pair.run.result["metrics"]
    nats = f"{metrics['nats_per_token']:.3f}"
    if pair.run.method != BASE:
        interval = "" if math.isnan(pair.low) else f" [{pair.low:+.3f}, {pair.high:+.3f}]"
        nats = f"{pair.change:+.3f}{interval}"
    return [f"{pair.perplexity:.2f}", nats, f"{metrics['bits_per_byte']:.3f}" if "bits_per_byte" in metrics else EMPTY]


def saved(pairs: Iterable[PairedRun]) -> float:
    """Return the share of the cache's bytes that is saved, over all corpora."""
    savings = [pair.run.result["savings"] for pair in pairs]
    return 1 - sum(one["kv_bytes"] for one in savings) / sum(one["kv_bytes_mha"] for one in savings)


def mean_heads(pair: PairedRun) -> float:
    """Return the heads whose scores are computed, mean of the layers."""
    kept = pair.run.result["savings"]["heads_kept"]
    return float(sum(kept) / len(kept))


def task_cell(scores: Sequence[Score], method: str, task: str) -> str:
    """Return the score of MHA in %, or a method's change in points with the p-value of McNemar's test."""
    found = {score.method: score for score in scores if score.task == task}
    if method not in found or BASE not in found:
        return EMPTY
    own, base = found[method], found[BASE]
    if method == BASE:
        return f"{100 * own.value:.1f}"
    change = compare(base.samples, own.samples, base.metric)
    return f"{100 * change.difference:+.1f} ({change.p:.2f})"


def profile_of(folders: Sequence[Path]) -> dict[str, object]:
    """Return ``profile.json`` of the listed head profile; empty if it cannot be read."""
    for folder in folders:
        if folder.parts[-5] == "profile":
            try:
                return read_json(folder / "profile.json")
            except SkippedRun:
                break
    return {}


def about(pairs: Sequence[PairedRun], profile: dict[str, object]) -> list[str]:
    """Return the notes on the corpora, the columns and the numbers of clusters."""
    texts = {pair.corpus: pair.run.result for pair in pairs if pair.run.method == BASE}
    sizes = "; ".join(
        f"{corpus}: {result['corpus']}, {result['n']:,} tokens of {result['documents']} texts"
        for corpus, result in texts.items()
    )
    kept = [pair.run.result["savings"]["heads_kept"] for pair in pairs if pair.run.method != BASE]
    notes = [
        f"Perplexity of {sizes}.",
        "Nats per token: of mha; of the others the change against it on the same texts, with its paired 95 % interval "
        "over texts. Perplexity is multiplied by the exponential of the change.",
    ]
    corpus, rule = profile.get("corpus"), profile.get("rule")
    if kept and all(one == kept[0] for one in kept) and isinstance(corpus, dict) and isinstance(rule, dict):
        notes.append(
            f"Heads: whose scores are computed, mean of the layers. The methods have the same numbers, {min(kept[0])} "
            f"to {max(kept[0])} in a layer: the elbow of the clustering error (rule {rule.get('name')}, tolerance "
            f"{rule.get('tolerance')}) in a head profile of {corpus.get('samples')} texts of {corpus.get('name')}, "
            "which are in neither corpus. chai clusters the heads for each window by its first five tokens, "
            "chai_static once by the profile, random (one seed) by chance."
        )
    else:
        notes.append("Heads: whose scores are computed, mean of the layers.")
    notes.append(
        "KV saved: of the cache's bytes. With grouped queries a key head stays as long as one of its queries is a "
        "representative (docs/method.md)."
    )
    return notes


def task_note(scores: Sequence[Score]) -> str:
    """Return what the columns of the tasks hold."""
    sizes = ", ".join(f"{task_name(one.task)} {one.n}" for one in scores if one.method == BASE)
    return (
        f"Tasks: score of mha in %, change of the others in points (p of McNemar's test); items: {sizes}. At these "
        "sizes only large changes are certain."
    )
