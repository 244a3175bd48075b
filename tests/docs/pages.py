"""The documentation's pages, taken apart: links, anchors, fenced blocks, commands."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
#: Pages about the paper's tables and figures, whose commands use each other's results; walked apart from the others.
TABLES = [page for page in PAGES if page.stem in ("README", "profile", "reproducing", "results", "sweeps")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Languages of blocks in which each line is a command, and of those that hold something else.
SHELL, OTHER = ("", "bash", "sh", "console"), ("text", "python", "yaml", "json")
#: First words of commands between backticks; a word alone names the program and is no command.
PROGRAMS = {
    "python", "python3", "pip", "pytest", "make", "accelerate", "torchrun", "export", "source", "cd", "bash", "sh",
    "hf", "huggingface-cli", "wandb", "sbatch", "srun", "squeue", "scancel", "scontrol", "git", "curl", "wget", "uv",
    "conda", "docker", "apt-get", "ruff", "mypy",
}  # fmt: skip


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


def commands(page: Path) -> list[str]:
    """Every command of a page, once, in its order: the lines of shell blocks, and commands between backticks.

    A block of Python that is no file and no fragment (those are indented) is a command ``python -c``.
    ``a|b`` in a word stands for one command with each; overrides that begin with ``experiment=`` for ``run.py`` with
    them. Comments are removed. An AssertionError names a block or a fence that could hide commands.
    """
    text, found = page.read_text(), []
    fences = [line for line in text.splitlines() if re.match(r"\s*(```|~~~)", line)]
    assert len(fences) == 2 * len(blocks(page)), f"{page.name}: a fence that tests/docs/pages.py cannot read"
    for block in blocks(page):
        assert block.language in SHELL + OTHER, (
            f"{page.name}: blocks of '{block.language}' are not known to be commands"
        )
        if block.language in SHELL:
            lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
            prompts = [line[2:] for line in lines if line.startswith("$ ")]  # the other lines are then their output
            found += prompts or lines
        if block.language == "python" and block.path is None and not block.text.startswith(" "):
            found.append(shlex.join(["python", "-c", block.text]))
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        words = span.split()
        if len(words) > 1 and words[0].startswith("experiment="):
            found.append("python run.py " + " ".join(words))
        elif len(words) > 1 and words[0].rpartition("/")[2] in PROGRAMS:
            found.append(" ".join(words))
    return list(dict.fromkeys(single for line in found for single in _alternatives(line)))


def split(command: str) -> list[str]:
    """Split a command into words, with ``<run id>`` as one; without its comment."""
    return [word.replace("<run_id>", "<run id>") for word in shlex.split(command.replace("<run id>", "<run_id>"), True)]


def _alternatives(line: str) -> list[str]:
    choices = [word.split("|") if re.fullmatch(r"\w+(\|\w+)+", word) else [word] for word in split(line)]
    return [shlex.join(words).replace("'<run id>'", "<run id>") for words in itertools.product(*choices) if words]
