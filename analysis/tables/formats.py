"""Write a table as Markdown (aligned, readable as plain text), LaTeX (booktabs), or CSV (a line for each cell)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import pandas as pd

from analysis.stats import EQUAL_LEVEL, MARGIN
from analysis.tables.cells import Cell, Row, Table
from analysis.tables.layout import block, commands, fill, header, notes
from analysis.tables.settings import COUNTS, PROFILE, assignments

WIDTH = 110  # characters of a note's line
BULLET: dict[str, Any] = {"initial_indent": "- ", "subsequent_indent": "  ", "break_on_hyphens": False}


def markdown(table: Table) -> str:
    """Return the heading, table, notes, and the commands that fill missing cells."""
    lines = [header(table), *(line for row in table.rows for line in block(table, row))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    # Columns of words are aligned to the left, columns of numbers to the right.
    words = len(lines[0]) - len(table.spec.columns) - 1
    aligns = [str.ljust if column < words else str.rjust for column in range(len(widths))]
    rule = ["-" * width if column < words else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    padded = [[align(*pair) for align, *pair in zip(aligns, line, widths, strict=True)] for line in lines]
    drawn = [f"|{' | '.join(line)}|" for line in [padded[0], rule, *padded[1:]]]
    bullets = [textwrap.fill(note, WIDTH, **BULLET) for note in notes(table)]
    parts = [f"### {_title(table)}", "\n".join(drawn), "\n".join(bullets)]
    if missing := commands(table):
        width = max(len(name) for name, _ in missing)
        listing = "\n".join(f"    {name:<{width}}  {line}" for name, line in missing)
        parts.append(f"Missing cells are filled by:\n\n{listing}")
        if COUNTS in listing:
            parts.append(f"{COUNTS}: clusters, one number or a list ('[8,6,4,4]'); none are published for this model.")
        if PROFILE in listing:
            parts.append(f"{PROFILE}: folder of a profile of the model; experiment=profile makes one.")
    return "\n\n".join(part for part in parts if part) + "\n"


def tex(table: Table) -> str:
    """Return a ``table`` environment for a document with the package ``booktabs``."""
    heads, numbers = header(table), len(table.spec.columns) + 1
    rows = [[r" & ".join(map(_escape, line)) + r" \\" for line in block(table, row)] for row in table.rows]
    lines = [
        *(f"% {name}: {line}" for name, line in commands(table)),
        r"\begin{table}", r"\centering", rf"\caption{{{_escape(_title(table))}}}", rf"\label{{tab:{table.spec.name}}}",
        rf"\begin{{tabular}}{{{'l' * (len(heads) - numbers)}{'r' * numbers}}}", r"\toprule",
        r" & ".join(map(_escape, heads)) + r" \\", r"\midrule",
        *"\n\\addlinespace\n".join("\n".join(row) for row in rows).splitlines(),
        r"\bottomrule", r"\end{tabular}", r"\par\smallskip\footnotesize",
        *(_escape(note) for note in notes(table)),
        r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _title(table: Table) -> str:
    """Return the heading, with the model of the runs if it is not that of the paper's numbers."""
    if table.model == table.spec.model:
        return table.spec.title
    return f"{table.spec.title}; ours: {table.model}, another model"


def _escape(words: str) -> str:
    special = {"±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    special |= {"<": "$<$", "…": ", ", "†": r"$^{\dagger}$"} | {char: f"\\{char}" for char in "&%$#_{}"}
    escaped = "".join(special.get(char, char) for char in words)
    # Stars of significance become superscripts; signs of numbers become minus and plus of mathematics.
    escaped = re.sub(r"(?<=\d)(\*+)(?= =$|$)", r"$^{\1}$", escaped)
    return re.sub(r"(?<![\w.-])([-+])(?=\d)", r"$\1$", escaped)


def comma_separated(table: Table) -> str:
    """Return a line for each cell: scores in %, changes in points, ``kv_saved`` in %."""
    lines = [_fields(table, row, cell) for row in table.rows for cell in row.cells]
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def _fields(table: Table, row: Row, cell: Cell) -> dict[str, Any]:
    change, score = cell.change, cell.score
    metrics = score.run.result["metrics"] if score else {}
    settings = score.settings if score else row.settings
    inner = change.ends(EQUAL_LEVEL) if change else (None, None)
    is_missing = cell.state == "missing" and cell.task in table.spec.tasks
    return {
        "table": table.spec.name, "model": table.model, "row": row.label, "method": row.method,
        "settings": " ".join(assignments(settings)),
        "task": cell.task, "state": cell.state, "metric": score.metric if score else "",
        "kind": "score" if row.method == "mha" else "change",
        "ours": _number(cell.points), "stderr": _number(cell.stderr, 100),
        "low": _number(change.low if change else None, 100), "high": _number(change.high if change else None, 100),
        "p": _number(change.p if change else None, digits=6), "p_holm": _number(cell.p_holm, digits=6),
        "low_90": _number(inner[0], 100), "high_90": _number(inner[1], 100), "margin": f"{MARGIN:g}" if change else "",
        "p_equal": _number(change.p_equal(MARGIN / 100) if change else None, digits=6),
        "p_equal_holm": _number(cell.p_equal_holm, digits=6), "equal": ("no", "yes")[cell.is_equal] if change else "",
        "seeds": len(change.by_seed) if change else "", "sd": _number(change.sd if change else None, 100),
        "lost": f"{change.lost:g}" if change else "", "gained": f"{change.gained:g}" if change else "",
        "n": change.n if change else (score.n if score else ""),
        "acc": _number(metrics.get("acc"), 100), "acc_norm": _number(metrics.get("acc_norm"), 100),
        "paper": "" if cell.paper is None else str(cell.paper), "paper_model": table.spec.model if row.paper else "",
        "paper_source": row.paper.source if row.paper else "", "gap": _number(cell.gap), "verdict": cell.verdict or "",
        "saving": score.saving if score else "",
        "kv_saved": _number(score.saved if score else None, 100),
        "run_id": " ".join(run.run.result["run_id"] for run in cell.runs or ([score] if score else [])),
        "mha_run_id": cell.baseline.run.result["run_id"] if cell.baseline else "",
        "reason": cell.reason, "command": fill(table, row, [cell.task]) if is_missing else "",
    }  # fmt: skip


def _number(value: float | None, scale: float = 1, digits: int = 4) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "tex": tex, "csv": comma_separated}
