"""Loss in nats per token against the heads that a method computes, a panel for each corpus."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plotting import page
from analysis.plotting.style import label, look
from analysis.results.perplexity import PERPLEXITY, PairedRun, paired_runs
from analysis.results.runs import Results

TITLE = "Nats per token against the heads computed"
QUERY = PERPLEXITY
NOTES = (
    "Change against multi-head attention on the same windows; bars: paired 95 % interval over documents (over "
    "windows, if the corpus is one document). Heads computed: mean of the layers. Perplexity is multiplied by the "
    "exponential of the change."
)


def draw(results: Results) -> tuple[Figure, pd.DataFrame]:
    """Draw one point for each run, of the model with the most runs."""
    pairs = paired_runs(results)
    models = [pair.run.model for pair in pairs]
    model = max(models, key=models.count)
    pairs = [pair for pair in pairs if pair.run.model == model]
    corpora = sorted({pair.corpus for pair in pairs})
    figure = page.new(f"{TITLE}: {label(model)}", 3.6)
    grid = figure.subplots(1, len(corpora), squeeze=False)
    for axes, corpus in zip(grid.flat, corpora, strict=True):
        draw_corpus(axes, corpus, [pair for pair in pairs if pair.corpus == corpus])
    grid.flat[0].set_ylabel("change of nats per token")
    handles = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid.flat[0].legend(handles.values(), handles.keys())
    newest = max((pair.run for pair in pairs), key=lambda run: run.updated)
    page.footer(figure, [*page.wrap(NOTES), page.provenance(newest, f"newest of {len(pairs)} runs")])
    return figure, plot_data(pairs)


def draw_corpus(axes: Axes, corpus: str, pairs: list[PairedRun]) -> None:
    """Draw the runs of one corpus; multi-head attention is the line at 0."""
    base = next((pair for pair in pairs if pair.run.method == "mha"), None)
    axes.axhline(0, color=look("mha")["color"], linewidth=1, label=label("mha"))
    for method in sorted({pair.run.method for pair in pairs} - {"mha"}):
        runs = sorted((pair for pair in pairs if pair.run.method == method), key=lambda pair: pair.heads)
        spread = [[pair.change - pair.low for pair in runs], [pair.high - pair.change for pair in runs]]
        axes.errorbar(
            [100 * pair.heads for pair in runs], [pair.change for pair in runs], yerr=spread,
            linestyle="-" if len(runs) > 1 else "none", linewidth=0.8, capsize=2, label=label(method), **look(method),
        )  # fmt: skip
    title = f"{corpus}, MHA: perplexity {base.perplexity:.2f}" if base else corpus
    axes.set(xlabel="heads computed (%)", title=title)


def plot_data(pairs: list[PairedRun]) -> pd.DataFrame:
    """Return a row for each run."""
    return pd.DataFrame(
        {
            "run": str(pair.run.folder), "model": pair.run.model, "method": pair.run.method, "corpus": pair.corpus,
            "perplexity": pair.perplexity, "change": pair.change, "low": pair.low, "high": pair.high,
            "heads_share": pair.heads, "kv_saved": pair.saved, "tokens": pair.run.result["n"],
        }
        for pair in pairs
    )  # fmt: skip
