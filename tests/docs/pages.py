"""The documentation's pages, taken apart: links, anchors, fenced blocks, commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the file that the line above names (`` `conf/x.yaml`: ``)."""

    language: str
    text: str
    path: str | None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip().rpartition("\n")[2]
        named = re.fullmatch(r"`([\w./]+)`:", above)
        found.append(Block(match[1], match[2], named[1] if named else None))
    return found


def links(page: Path) -> list[str]:
    """Targets of all links and pictures outside of fenced blocks."""
    return re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What ``#...`` may name: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path, language: str | None = None) -> list[list[str]]:
    """The arguments of each ``python run.py ...`` in a page's blocks, and outside of them between backticks.

    Args:
        page: a Markdown file.
        language: of the blocks; all of them, and what is outside, if not given.
    """
    lines = [line for block in blocks(page) if language in (None, block.language) for line in block.text.splitlines()]
    if language is None:
        lines += re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text()).replace("\n", " "))
    found = []
    for line in lines:
        command = re.match(r"(?:\S*python|accelerate launch .*|torchrun .*) run\.py\b(.*)", line)
        if command:  # `<run id>` stands for twelve digits
            found.append(shlex.split(command[1].replace("<run id>", "0123456789ab"), comments=True))
    return found
