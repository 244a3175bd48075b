"""``python -m analysis.report``: results/ as one page, results/report/index.html, and as Markdown beside it.

Exit codes: 0 written, whatever is missing or left out, 1 it can't be written, 2 a mistake in the command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from analysis.command_line import Parser, complain, run, tell_left_out
from analysis.report import _figures, _page
from analysis.report._content import collect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(
        prog="python -m analysis.report", description="The reproduction report of saved results, as a page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it is written (report/ in the results folder)")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        complain(f"--results: there is no folder {options.results}")
        return 2
    content = collect(options.results)
    tell_left_out(content.problems, set())
    for part in (content.paper, content.embedded):
        _figures.tell(part.figures)
    out = options.out or options.results / "report"
    try:
        page = _page.write(content, out)
    except OSError as error:
        complain(f"can't write to {out}: {error.strerror or error}")
        return 1
    print(page)
    return 0


if __name__ == "__main__":
    run(main)
