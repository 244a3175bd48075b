"""``python -m analysis.report``: write the report as a page, results/report/index.html, and as Markdown.

Exit codes: 0 written, also if runs are missing or left out; 1 it cannot be written; 2 usage error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis import cli
from analysis.report import page
from analysis.report.content import collect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = cli.Parser(
        prog="python -m analysis.report", description="The reproduction report of saved results, as a page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it is written (report/ in the results folder)")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        return cli.fail(f"--results: there is no folder {options.results}")
    content = collect(options.results)
    cli.report_skipped(content.problems)
    for figure in (*content.paper.figures, *content.embedded.figures):
        if figure.error:
            print(f"not drawn: {figure.name}: {figure.error}", file=sys.stderr)
    out = options.out or options.results / "report"
    try:
        print(page.write(content, out))
    except OSError as error:
        return cli.fail(f"cannot write to {out}: {error.strerror or error}", code=1)
    return 0


if __name__ == "__main__":
    cli.run(main)
