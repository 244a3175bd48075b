"""``python -m analysis.figures fig11 fig12a``: each figure as PNG and PDF, and its data as CSV.

Exit codes: 0 drawn, 1 a figure's input is missing or its files can't be written, 2 a mistake in the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from rich.console import Console
from rich.text import Text

from analysis.command_line import Parser, complain, run, tell_left_out, unknown
from analysis.figures import _catalogue, _look
from analysis.saved import MissingRun, Results

MOST_NAMED = 8  # runs of a figure that are named one by one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="python -m analysis.figures", description="Draw figures of saved results.")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(_catalogue.names()))
    parser.add_argument("--list", action="store_true", help="name every figure, what it needs and how to make that")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are (results)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("results/figures"), help="(results/figures)")
    parser.add_argument(
        "--model", metavar="NAME", help="runs of this model only, as its folder is called (A,B: of these)"
    )
    parser.add_argument("--device", metavar="SUBSTRING", help="runs on a device with this in its name only")
    options = parser.parse_args(arguments)
    if options.list:
        show()
        return 0
    valid = _catalogue.names()
    if not options.figures:
        complain(f"no figure named; valid: {', '.join(valid)}")
        return 2
    for name in options.figures:
        if name not in valid:
            complain(unknown("figure", name, valid))
            return 2
    told: set[Path] = set()
    codes = [
        produce(name, Results(options.results, options.model, options.device), options.out, told)
        for name in dict.fromkeys(options.figures)
    ]
    return max(codes)


def produce(name: str, results: Results, out: Path, told: set[Path]) -> int:
    """Draw one figure and save it; returns its exit code.

    Args:
        name: of the figure.
        results: what it draws from.
        out: the folder for its files.
        told: folders of which was said already that they are left out; added to.
    """
    figure = _catalogue.load(name)
    try:
        with rc_context(_look.STYLE):
            drawing, data = figure.draw(results)
            out.mkdir(parents=True, exist_ok=True)
            # No dates: the same data make the same files.
            drawing.savefig(out / f"{name}.png", dpi=200)
            drawing.savefig(out / f"{name}.pdf", metadata={"CreationDate": None})
        data.to_csv(out / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    except MissingRun as error:
        complain(f"{name}: {error}; make one with: {_catalogue.command(figure, error.model or results.model)}")
        return 1
    except OSError as error:
        complain(f"{name}: can't write to {out}: {error.strerror or error}")
        return 1
    finally:
        tell_left_out(results.left_out, told)
    runs = "; ".join(map(str, results.used))
    if len(results.used) > MOST_NAMED:
        runs = f"{len(results.used)} runs in {results.root}, named in the CSV"
    print(f"{name}: {out / name}.png, .pdf, .csv from {runs}")
    return 0


def show() -> None:
    """Every figure, what it needs and the command that makes it, unwrapped so that it can be copied."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(map(len, _catalogue.names()))
    for name in _catalogue.names():
        figure = _catalogue.load(name)
        console.print(Text.assemble((f"{name:<{width}}", "bold"), f"  {figure.TITLE}"))
        command = _catalogue.command(figure, None)
        console.print(Text.assemble(" " * width, (f"  needs experiment={figure.EXPERIMENT}: ", "dim"), command))


if __name__ == "__main__":
    run(main)
