"""``python -m analysis.tables table2``: a table of saved results beside the paper's numbers, to standard output.

Exit codes: 0 printed, missing cells included, 1 nothing to print, 2 a mistake in the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.command_line import Parser, complain, run, tell_left_out, unknown
from analysis.saved import Results
from analysis.scores import EXPERIMENT, load_scores
from analysis.tables._cells import build
from analysis.tables._formats import FORMATS
from analysis.tables._settings import sweep
from analysis.tables._specs import REPOSITORY, TABLES, paper_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="python -m analysis.tables", description="Tables of saved results.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--list", action="store_true", help="name every table and the command that fills it")
    parser.add_argument("--format", choices=list(FORMATS), default="md", help="(md)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are (results)")
    parser.add_argument("--model", metavar="NAME", help="whose runs, as its folder is called (the paper's model)")
    options = parser.parse_args(arguments)
    if options.list:
        for name, spec in TABLES.items():
            print(f"{name:<6}  {spec.title}\n{'':<6}  filled by: {sweep(name, spec, spec.model, None)}")
        return 0
    if not options.tables:
        complain(f"no table named; valid: {', '.join(TABLES)}")
        return 2
    for name in options.tables:
        if name not in TABLES:
            complain(unknown("table", name, list(TABLES)))
            return 2
    if not options.results.is_dir():
        complain(f"--results: there is no folder {options.results}")
        return 2
    told: set[Path] = set()
    wanted = list(dict.fromkeys(options.tables))
    if options.format == "csv" and len(wanted) > 1:
        complain(f"one table at a time as csv, {len(wanted)} are named")
        return 2
    return max(show(name, options.format, options.results, options.model, told) for name in wanted)


def show(name: str, form: str, root: Path, model: str | None, told: set[Path]) -> int:
    """Print one table; returns its exit code.

    Args:
        name: of the table.
        form: how it is written.
        root: the results folder.
        model: whose runs; ``None``: the table's own.
        told: folders of which was said already that they are left out; added to.
    """
    spec = TABLES[name]
    model = model or spec.model
    known = models(root)
    if model not in known:
        complain(unknown("model", model, known))
        return 2
    results = Results(root, model)
    table = build(name, spec, model, load_scores(results), paper_rows(name))
    tell_left_out(results.left_out, told)
    if not table.rows:
        complain(
            f"{name}: no finished accuracy run of model '{model}' on its tasks in {root}; "
            f"make some with: {sweep(name, spec, model, None)}"
        )
        return 1
    print(FORMATS[form](table), flush=True)
    return 0


def models(root: Path) -> list[str]:
    """Models that a run could be of: those with a file in ``conf/`` and those with results."""
    named = {path.stem for path in (REPOSITORY / "conf" / "model").glob("*.yaml")}
    return sorted(named | {path.name for path in (root / EXPERIMENT).glob("*") if path.is_dir()})


if __name__ == "__main__":
    run(main)
