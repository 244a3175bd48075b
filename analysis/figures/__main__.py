"""``python -m analysis.figures fig11 fig12a``: write each figure as PNG and PDF, and its data as CSV.

Exit codes: 0 drawn; 1 a figure's input is missing or its files cannot be written; 2 usage error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path

from matplotlib import rc_context
from rich.console import Console
from rich.text import Text

from analysis import cli, figures
from analysis.plotting.style import STYLE
from analysis.results.files import SkippedRun
from analysis.results.profiles import ClustersError
from analysis.results.runs import MissingRun, Results

MOST_NAMED = 8  # runs of a figure that are named one by one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    valid = figures.names()
    parser = cli.Parser(prog="python -m analysis.figures", description="Draw figures of saved results.")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(valid))
    parser.add_argument("--list", action="store_true", help="name every figure, what it needs and how to make that")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are (results)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("results/figures"), help="(results/figures)")
    parser.add_argument(
        "--model", metavar="NAME", help="runs of this model only, as its folder is called (A,B: of these)"
    )
    parser.add_argument(
        "--clusters", type=int, metavar="K", help="with K static clusters in every layer (fig2, fig6, fig7, fig13)"
    )
    parser.add_argument("--device", metavar="SUBSTRING", help="runs on a device with this in its name only")
    options = parser.parse_args(arguments)
    if options.list:
        show_list()
        return 0
    if mistake := cli.check_names("figure", options.figures, valid):
        return cli.fail(mistake)
    if options.clusters is not None and (fixed := [name for name in options.figures if not takes_clusters(name)]):
        return cli.fail(f"{fixed[0]} takes no --clusters; valid: {', '.join(filter(takes_clusters, valid))}")
    results = Results(options.results, options.model, options.device)
    codes = [
        produce(name, replace(results, used=[]), options.out, options.clusters)
        for name in dict.fromkeys(options.figures)
    ]
    cli.report_skipped(results.skipped)
    return max(codes)


def takes_clusters(name: str) -> bool:
    """Return whether a figure can show any number of clusters."""
    return "clusters" in signature(figures.load(name).draw).parameters


def produce(name: str, results: Results, out: Path, clusters: int | None = None) -> int:
    """Draw one figure, with the chosen numbers of clusters or another one, and save it; return the exit code."""
    module = figures.load(name)
    given = {} if clusters is None else {"clusters": clusters}
    name += "" if clusters is None else f"_k{clusters}"
    try:
        with rc_context(STYLE):
            figure, data = module.draw(results, **given)
            out.mkdir(parents=True, exist_ok=True)
            # No dates: the same data make the same files.
            figure.savefig(out / f"{name}.png", dpi=200)
            figure.savefig(out / f"{name}.pdf", metadata={"CreationDate": None})
        data.to_csv(out / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    except ClustersError as error:
        return cli.fail(f"{name}: --clusters {error}")
    except MissingRun as error:
        command = module.QUERY.command_for(error.model or results.model)
        return cli.fail(f"{name}: {error}; make one with: {command}", code=1)
    except SkippedRun as reason:
        return cli.fail(f"{name}: {reason} (results/paper)", code=1)
    except OSError as error:
        return cli.fail(f"{name}: cannot write to {out}: {error.strerror or error}", code=1)
    runs = "; ".join(map(str, results.used))
    if len(results.used) > MOST_NAMED:
        runs = f"{len(results.used)} runs in {results.root}, named in the CSV"
    print(f"{name}: {out / name}.png, .pdf, .csv from {runs}")
    return 0


def show_list() -> None:
    """Print every figure, the experiment it needs and the command that makes it, in lines that can be copied."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(map(len, figures.names()))
    for name in figures.names():
        module = figures.load(name)
        needs = f"  needs experiment={module.QUERY.experiment}: "
        console.print(Text.assemble((f"{name:<{width}}", "bold"), f"  {module.TITLE}"))
        console.print(Text.assemble(" " * width, (needs, "dim"), module.QUERY.command_for(None)))


if __name__ == "__main__":
    cli.run(main)
