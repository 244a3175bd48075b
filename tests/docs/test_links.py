"""Every link of the documentation leads somewhere, and every file that it names is there."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, REPOSITORY, anchors, blocks, links


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
