"""``python -m analysis.tables table2``: print a table of saved results beside the paper's numbers.

Exit codes: 0 printed, also with missing cells; 1 nothing to print; 2 usage error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis import cli
from analysis.results.runs import MissingRun, Results
from analysis.results.scores import ACCURACY, load_scores
from analysis.tables.cells import build
from analysis.tables.formats import FORMATS
from analysis.tables.real import COMMAND as REAL_COMMAND
from analysis.tables.real import NAME as REAL
from analysis.tables.real import TITLE as REAL_TITLE
from analysis.tables.real import real_table
from analysis.tables.settings import sweep
from analysis.tables.specs import EMBEDDED, REPOSITORY, TABLES, Spec, paper_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = cli.Parser(prog="python -m analysis.tables", description="Tables of saved results.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join([*TABLES, REAL]))
    parser.add_argument("--list", action="store_true", help="name every table and the command that fills it")
    parser.add_argument("--format", choices=list(FORMATS), default="md", help="(md)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are (results)")
    parser.add_argument("--model", metavar="NAME", help="whose runs, as its folder is called (the paper's model)")
    options = parser.parse_args(arguments)
    if options.list:
        for name, spec in TABLES.items():
            print(f"{name:<6}  {spec.title}\n{'':<6}  filled by: {sweep(spec, spec.model, None)}")
        print(f"{REAL:<6}  {REAL_TITLE}\n{'':<6}  filled by: {REAL_COMMAND}")
        return 0
    names = list(dict.fromkeys(options.tables))
    if mistake := cli.check_names("table", names, [*TABLES, REAL]):
        return cli.fail(mistake)
    if not options.results.is_dir():
        return cli.fail(f"--results: there is no folder {options.results}")
    if options.format == "csv" and len(names) > 1:
        return cli.fail(f"csv takes one table at a time, got {len(names)}")
    if REAL in names and (options.format != "md" or options.model is not None):
        return cli.fail(f"{REAL} has no other format than md, and one model")
    known = models(options.results)
    if options.model not in (None, *known):
        return cli.fail(cli.unknown("model", options.model, known))
    results = Results(options.results)
    codes = [
        show_real(results)
        if name == REAL
        else show(TABLES[name], options.model or TABLES[name].model, results, options.format)
        for name in names
    ]
    cli.report_skipped(results.skipped)
    return max(codes)


def show(spec: Spec, model: str, results: Results, form: str) -> int:
    """Print one table of a model; return the exit code."""
    paper = paper_rows(spec.name)
    if model == EMBEDDED:
        # Its tasks are others than the paper's: the rows are the same, the paper's numbers are left out.
        spec, paper = spec.embedded(), [replace(row, values={}) for row in paper]
    table = build(spec, model, load_scores(results.of(model)), paper)
    if not table.rows or (table.like is None and spec.other_tasks):
        message = f"{spec.name}: no finished accuracy run of model '{model}' on its tasks in {results.root}"
        return cli.fail(f"{message}; make some with: {sweep(spec, model, None)}", code=1)
    print(FORMATS[form](table), flush=True)
    return 0


def show_real(results: Results) -> int:
    """Print the table of ``make real``; return the exit code."""
    try:
        print(real_table(results).markdown(), flush=True)
    except MissingRun as error:
        return cli.fail(str(error), code=1)
    return 0


def models(root: Path) -> list[str]:
    """Return the models with a file in ``conf/`` or with results."""
    configured = {path.stem for path in (REPOSITORY / "conf" / "model").glob("*.yaml")}
    return sorted(configured | {path.name for path in (root / ACCURACY.experiment).glob("*") if path.is_dir()})


if __name__ == "__main__":
    cli.run(main)
