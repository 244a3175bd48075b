"""``python -m analysis.ablations``: write the tables of docs/ablations.md from saved results.

A table stands between comments that name it, a key of :data:`analysis.ablations.blocks.BLOCKS`::

    <!-- ablations:warmup -->
    (rewritten from the results)
    <!-- end -->

Exit codes: 0 the page is up to date, or was written; 1 it differs (``--check``), or results are missing; 2 usage error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from analysis import cli
from analysis.ablations.blocks import BLOCKS, Sources
from analysis.results.runs import MissingRun, Results
from analysis.tables.specs import REPOSITORY

PAGE = REPOSITORY / "docs" / "ablations.md"
#: Results that are part of the repository.
PUBLISHED = REPOSITORY / "results" / "published"
BEGIN = re.compile(r"^<!-- ablations:(\S+) -->$", re.MULTILINE)
BLOCK = re.compile(r"(^<!-- ablations:(?P<name>\S+) -->\n)(?P<text>(?:(?!<!-- ).*\n)*?)(<!-- end -->$)", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = cli.Parser(prog="python -m analysis.ablations", description="Tables of docs/ablations.md.")
    parser.add_argument("page", nargs="?", type=Path, default=PAGE, metavar="PAGE", help="(docs/ablations.md)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with code 1 if a table differs")
    parser.add_argument("--print", action="store_true", help="print the tables instead, those that have results")
    parser.add_argument("--results", type=Path, default=PUBLISHED, metavar="DIR", help="(results/published)")
    parser.add_argument("--model", default="smollm2_135m", metavar="NAME", help="whose runs (smollm2_135m)")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        return cli.fail(f"--results: there is no folder {options.results}")
    sources = Sources(Results(options.results, model=options.model), Results(options.results))
    if options.print:
        return show(sources)
    if not options.page.is_file():
        return cli.fail(f"there is no page {options.page}")
    before = options.page.read_text()
    try:
        after = rewrite(before, sources)
    except (MissingRun, ValueError) as error:
        return cli.fail(f"{options.page}: {error}", code=1)
    cli.report_skipped(sources.ablations.skipped | sources.latency.skipped)
    if after == before:
        return 0
    if options.check:
        return cli.fail(
            f"{options.page}: numbers differ from {options.results}; write them with: {parser.prog}", code=1
        )
    options.page.write_text(after)
    print(f"written: {options.page}")
    return 0


def show(sources: Sources) -> int:
    """Print every table that there are results for; return the exit code."""
    printed = 0
    for name, table in BLOCKS.items():
        try:
            text = table(sources)
        except MissingRun:
            continue
        print(f"{name}\n\n{text}")
        printed += 1
    cli.report_skipped(sources.ablations.skipped | sources.latency.skipped)
    return 0 if printed else cli.fail(f"no results of experiment=ablations in {sources.ablations.root}", code=1)


def rewrite(text: str, sources: Sources) -> str:
    """Return a page with its tables rewritten.

    Raises:
        MissingRun: A table's results are missing.
        ValueError: A table's name is unknown, or it has no end.
    """
    begun = BEGIN.findall(text)
    for name in begun:
        if name not in BLOCKS:
            raise ValueError(cli.unknown("table", name, list(BLOCKS)))
    if begun != [match["name"] for match in BLOCK.finditer(text)]:
        raise ValueError("a table has no end: <!-- end -->")
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match['name']](sources)}{match[4]}", text)


if __name__ == "__main__":
    cli.run(main)
