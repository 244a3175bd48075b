"""Every link of the documentation leads somewhere, and every command in it is one that the command line takes."""

from __future__ import annotations

import re

import pytest

from experiments.config.validate import check_overrides
from experiments.sweeps.expand import expand
from tests.docs.pages import PAGES, REPOSITORY, anchors, blocks, commands, links

#: Their commands use files that the reader writes: tests/docs/test_examples.py writes them too.
EXAMPLES = [page for page in PAGES if page.name.startswith("adding_")]
COMMANDS = sorted({tuple(command) for page in PAGES if page not in EXAMPLES for command in commands(page)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page):
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert REPOSITORY in target.parents, link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    """Between backticks, but for those that the page writes, that a run makes, and names with a placeholder."""
    written = {block.path for block in blocks(page) if block.path is not None}
    for name in re.findall(
        r"`((?:chai|experiments|analysis|conf|tests|docs|examples|results/paper)/[\w./-]+)`", page.read_text()
    ):
        assert name in written or (REPOSITORY / name).exists(), name


def test_every_page_is_in_the_index():
    index = REPOSITORY / "docs" / "README.md"
    assert {page.name for page in PAGES[1:]} - {"README.md"} <= set(links(index))
    assert "docs/README.md" in links(REPOSITORY / "README.md")


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 25
    assert ("-m", "paper=micro") in COMMANDS


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_composes(command):
    """Parsed, expanded and composed as run.py does it; nothing is run. Of a table's sweeps the first is."""
    overrides = [word for word in command if not word.startswith("-")]
    flags = set(command) - set(overrides)
    assert flags <= {"-m", "--help", "--cfg"}, flags
    if "--cfg" in flags:
        overrides.remove("job")
    check_overrides(expand(overrides, multirun="-m" in flags)[0], multirun="-m" in flags)
