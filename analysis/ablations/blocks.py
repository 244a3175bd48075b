"""The blocks of docs/ablations.md: one table for each question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.ablations.answers import Answers, find_answers, mean_interval, rank_correlation
from analysis.results.benchmarks import LATENCY
from analysis.results.runs import MissingRun, Results, Run
from analysis.stats.intervals import Interval

#: What a latency run of these settings shows: one decoder layer.
PART, PHASE = "layer", "decode"
#: The default of experiment.sample_tokens.
SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class Sources:
    """Where the tables come from: the runs of a model, and latency runs of any."""

    ablations: Results
    latency: Results


def question_table(question: str, base: str | None = None) -> Callable[[Sources], str]:
    """Return the function that makes the table of a question.

    ``base`` is the choice that others are compared with; ``None``: the first.
    """

    def table(sources: Sources) -> str:
        answers = _largest(sources, question)
        chosen = answers.choices[0] if base is None else base
        rows = [_row(answers, choice, chosen) for choice in answers.choices]
        return _table(["Choice", *HEAD, "Against the base"], rows) + _legend(answers, chosen)

    return table


HEAD = ("Heads", "KL from MHA, nats/token", "Perplexity / MHA", "n")


def _row(answers: Answers, choice: str, base: str) -> list[str]:
    loss = answers.mean(choice, "loss")
    ratio = Interval(math.exp(loss.value), math.exp(loss.low), math.exp(loss.high))
    against = "" if choice == base else _signed(answers.difference(choice, base, "kl"))
    values = answers.values(choice, "kl")
    heads = f"{answers.mean(choice, 'heads').value:.1f}"
    kl = answers.mean(choice, "kl")
    return [f"{choice} (base)" if choice == base else choice, heads, _text(kl), _text(ratio, 2), str(len(values)),
            against]  # fmt: skip


def counts_table(sources: Sources) -> str:
    """Return the rules that choose k by request, beside the same k everywhere with as many heads in the mean."""
    answers = _largest(sources, "counts")
    fixed = [choice for choice in answers.choices if choice.startswith("k =")]
    heads = np.array([answers.mean(choice, "heads").value for choice in fixed])
    curve = np.stack([answers.values(choice, "kl").sort_index().to_numpy() for choice in fixed])  # [k, texts]
    rows = []
    for choice in answers.choices:
        row = _row(answers, choice, choice)[:-1]
        row[0], against = choice, ""
        if choice not in fixed:
            mean = answers.mean(choice, "heads").value
            if heads.min() <= mean <= heads.max():
                same = np.array([np.interp(mean, heads, curve[:, text]) for text in range(curve.shape[1])])
                against = _signed(mean_interval(answers.values(choice, "kl").sort_index() - same))
            else:
                against = "no such k"
        rows.append([*row, against])
    legend = _legend(answers, None)
    return _table(["Choice", *HEAD, "Against fixed k with as many heads"], rows) + legend


def length_table(sources: Sources) -> str:
    """Return the divergence in each range of positions."""
    answers = find_answers(
        sources.ablations, "length", lambda run: (run.result["tokens"], run.result["n"], run.updated)
    )
    ranges = [name for name in dict.fromkeys(answers.rows.measure) if name.startswith("kl ")]
    base = answers.choices[0]
    rows = []
    for choice in answers.choices:
        means = [_text(answers.mean(choice, name)) for name in ("kl", *ranges)]
        against = "" if choice == base else _signed(answers.difference(choice, base, "kl"))
        name = f"{choice} (base)" if choice == base else choice
        rows.append([name, *means, str(len(answers.values(choice, "kl"))), against])
    head = ["KL from MHA, positions:", "all", *(name.removeprefix("kl ") for name in ranges), "n", "Against the base"]
    return _table(head, rows) + _legend(answers, base)


def stability_table(sources: Sources) -> str:
    """Return the adjusted Rand indices."""
    answers = _largest(sources, "stability")
    rows = [
        [choice, _text(answers.mean(choice, "agreement")), str(len(answers.values(choice, "agreement")))]
        for choice in answers.choices
    ]
    return _table(["Compared", "Adjusted Rand index", "n"], rows) + _legend(answers, None, all_corpora=True)


def inputs_table(sources: Sources) -> str:
    """Return the divergence of each corpus, and its rank correlation with properties of the texts."""
    answers = _largest(sources, "inputs")
    kl = answers.values("CHAI", "kl")
    by_corpus = [
        [str(corpus), _text(mean_interval(values)), str(len(values))]
        for corpus, values in kl.groupby(level="corpus", sort=False)
    ]
    rows = []
    for name, text in answers.run.result["properties"].items():
        own = answers.values("properties", name).reindex(kl.index)
        pairs = ((own, kl), (_by_corpus(own), _by_corpus(kl)))
        found = (rank_correlation(first.to_numpy(), second.to_numpy()) for first, second in pairs)
        rows.append([text, *(_text(value, 2) for value in found), str(len(kl))])
    ranked = kl.sort_values(ascending=False)
    worst = ranked.head(max(1, len(ranked) // 4))
    shares = ", ".join(f"{count} of {corpus}" for (corpus, count) in worst.groupby(level="corpus").size().items())
    return (
        _table(["Texts of", "KL from MHA, nats/token", "n"], by_corpus)
        + "\n"
        + _table(["Property of the text", "Rank correlation with KL", "Within the corpora", "n"], rows)
        + f"\nThe worst quarter of the texts: {shares}.\n"
        + _legend(answers, None, all_corpora=True)
    )


def _by_corpus(values: pd.Series) -> pd.Series:
    """Return the ranks of values within each corpus, divided by the number of its texts."""
    return values.groupby(level="corpus").rank(pct=True)


def batch_table(sources: Sources) -> str:
    """Return the speed of a decoder layer by batch size, from latency runs that differ in it alone.

    Raises:
        MissingRun: There are no two batch sizes.
    """
    runs: dict[tuple[object, ...], dict[int, Run]] = {}
    for run in sources.latency.runs(LATENCY):
        table = run.table
        if run.method == "chai" and ((table.part == PART) & (table.phase == PHASE)).any():
            key = (run.model, run.device, run.dtype, run.result.get("layers"))
            own = runs.setdefault(key, {})
            size = run.result["batch_size"]
            if size not in own or own[size].updated < run.updated:
                own[size] = run
    sizes = max(runs.values(), key=len, default={})
    if len(sizes) < 2:
        raise MissingRun(
            f"no two batch sizes among the latency runs of {sources.latency.root}; make some with: {BATCH_COMMAND}"
        )
    rows = []
    for size, run in sorted(sizes.items()):
        own = run.table[(run.table.part == PART) & (run.table.phase == PHASE)]
        last = own[own.length == own.length.max()]
        method = last[last.role == "method"].sort_values("k").iloc[0]
        best = last[last.implementation == method.best_baseline].iloc[0]
        rows.append([
            str(size), f"{best.ms:.1f}", f"{method.ms:.1f}",
            f"{method.speedup:.2f} [{method.speedup_p25:.2f}, {method.speedup_p75:.2f}]", f"{method.limit:.2f}",
            str(int(method.rounds)),
        ])  # fmt: skip
    first = next(iter(sizes.values()))
    about = f"{first.model}, {first.dtype}, one decoder layer, decode at {int(last.length.iloc[0]):,} tokens"
    head = ["Batch size", "MHA, ms", "CHAI, ms", "Speedup [quartiles]", "Theoretical limit", "Rounds"]
    return _table(head, rows) + f"\n{about}, k = {int(method.k)} of {first.result['heads']}; {first.device}.\n"


BATCH_COMMAND = (
    "python run.py -m experiment=latency method=chai model=llama7b model.random_init=true "
    "model.architecture.num_hidden_layers=1 method.clusters=8 experiment.parts='[layer]' experiment.phases='[decode]' "
    "experiment.lengths='[1024]' experiment.rows=1,4,16 model.dtype=float32 device=cpu"
)

#: Name of a block -> the function that returns its text.
BLOCKS: dict[str, Callable[[Sources], str]] = {
    "warmup": question_table("warmup", "5 tokens"),
    "metric": question_table("metric"),
    "representative": question_table("representative"),
    "membership": question_table("membership"),
    "features": question_table("features"),
    "samples": question_table("samples"),
    "domain": question_table("domain"),
    "counts": counts_table,
    "stability": stability_table,
    "layers": question_table("layers"),
    "length": length_table,
    "values": question_table("values"),
    "inputs": inputs_table,
    "quantization": question_table("quantization", "CHAI"),
    "batch": batch_table,
}


def _largest(sources: Sources, question: str) -> Answers:
    return find_answers(sources.ablations, question, lambda run: (run.result["n"], run.updated))


def _legend(answers: Answers, base: str | None, *, all_corpora: bool = False) -> str:
    """Return what was measured, below a table, between empty lines."""
    result = answers.run.result
    sources = [result["corpus"], *(result["further"].values() if all_corpora else ())]
    counted = f"positions from {result['first_scored']} on"
    text = (
        f"{answers.run.model}, {result['dtype']}, k = {result['clusters']} of {result['heads']} heads in every layer; "
        f"texts of {result['tokens']:,} tokens of {', '.join(sources)}, {counted}."
    )
    if any("static" in choice for choice in answers.choices):
        text += f" Static maps are of other texts, {result['sample_tokens']} tokens each."
    if base is not None:
        text += " The last column is the difference of the KL divergence to the base, on the same texts."
    settings = {"questions": f"'[{answers.question}]'", "texts": result["n"], "tokens": result["tokens"]}
    if result["sample_tokens"] != SAMPLE_TOKENS:
        settings["sample_tokens"] = result["sample_tokens"]
    words = [f"corpus={result['task']}", *(f"experiment.{name}={value}" for name, value in settings.items())]
    return f"\n{text} In brackets: 95 % intervals over the n texts. Settings: `{' '.join(words)}`.\n"


def _text(found: Interval, digits: int = 3) -> str:
    if math.isnan(found.value):
        return "not defined"
    if math.isnan(found.low):
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _signed(found: Interval) -> str:
    if math.isnan(found.low):
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all but its first column aligned to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows)) + "\n"
