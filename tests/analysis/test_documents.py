"""Numbers in the documentation: written from results, checked against them."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis import documents
from analysis.results.runs import Results
from analysis.tables.specs import MICRO_TASKS
from tests.analysis.scored import CHAI, TINY, outcomes, save

PLANTED = [8, 6, 4, 4]
PAGE = "Before.\n\n<!-- demo table: begin -->\nold\n<!-- demo table: end -->\n\nAfter.\n"


def fill(root, tasks=MICRO_TASKS):
    for task in tasks:
        save(root, "mha", task, outcomes(160), model=TINY)
        save(root, "chai", task, outcomes(160, lost=1), CHAI | {"clusters": PLANTED}, model=TINY, saved=0.328)
        save(root, "chai", task, outcomes(160, lost=40), CHAI | {"clusters": 2}, model=TINY)
        save(root, "chai_static", task, outcomes(160, lost=100), {"profile": "p"}, model=TINY)
        for seed in range(5):
            settings = {"clusters": PLANTED, "seed": seed}
            save(root, "random", task, outcomes(160, lost=50 + 10 * seed), settings, model=TINY)
    return root


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def flipped(items):
    """Samples of 200 items of MHA and of a method that gains ``items`` of them, or loses them if negative."""
    before, after = [
        outcomes(100, lost=max(-items, 0) * is_method, gained=max(items, 0) * is_method) for is_method in (0, 1)
    ]
    rows = {"doc_id": range(200), "doc_hash": [str(item) for item in range(200)]}
    return [pd.DataFrame(rows | {"acc": answers}) for answers in (before, after)]


def call(results, page, *options):
    return documents.main(["--results", str(results), *options, str(page)])


def test_a_block_is_written_and_then_up_to_date(tmp_path, page, capsys):
    results = fill(tmp_path / "results")
    assert call(results, page, "--check") == 1
    assert page.read_text() == PAGE
    assert f"error: {page}: numbers differ from {results}" in capsys.readouterr().err
    assert call(results, page) == 0
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- demo table: begin -->\n| Task")
    assert text.endswith("<!-- demo table: end -->\n\nAfter.\n") and "old" not in text
    assert call(results, page, "--check") == 0
    page.write_text(text.replace("80.0", "81.0", 1))
    assert call(results, page, "--check") == 1


def test_the_demo_table_is_of_the_planted_counts_and_the_first_seed(tmp_path):
    lines = documents.demo_table(Results(fill(tmp_path))).splitlines()
    assert len(lines) == 2 + 3 * len(MICRO_TASKS)
    assert lines[2].split(" | ")[1:3] == ["mha", "80.0 ± 2.8"]
    assert lines[3].split(" | ")[1:6] == ["chai", "79.5 ± 2.9", "-0.5", "1.00", "32.8 % real"]
    assert lines[4].split(" | ")[1:5] == ["random", "55.0 ± 3.5", "-25.0", "<0.001"]


def test_methods_by_task_and_random_by_seed(tmp_path):
    rows = documents.embedded_methods(Results(fill(tmp_path))).splitlines()[2:]
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:] for row in rows}
    assert cells["MHA"][0] == "80.0" and len(cells["MHA"]) == 6
    assert cells["CHAI"][0] == "-0.5 (1.00)"
    assert cells["CHAI, 2 clusters"][0] == "-20.0 (<0.001)"
    # Losses of 50, 60, ..., 90 of 200 items: their mean, and their standard deviation.
    assert cells["random, 5 seeds"][0] == "-35.0 ± 7.9 (<0.001)"


def test_seeds_that_differ_in_sign_are_no_loss():
    """Each seed alone is far from multi-head attention; their mean is not (t = -0.34, 4 degrees of freedom)."""
    sizes = [-90, -30, 10, 30, 40]
    seeds = [documents.compare(*pair, "acc") for pair in map(flipped, sizes)]
    assert [seed.p < 0.05 for seed in seeds] == [True, True, True, True, True]
    assert documents.spread(seeds) == "-4.0 ± 26.6 (0.75)"


def test_a_run_of_part_of_the_items_or_of_other_data_does_not_count(tmp_path, page, capsys):
    results = fill(tmp_path / "results", MICRO_TASKS[1:])
    settings = CHAI | {"clusters": PLANTED}
    save(results, "mha", MICRO_TASKS[0], outcomes(50, n=60), model=TINY, limit=60)
    assert call(results, page) == 1
    assert f"no complete run of mha on {MICRO_TASKS[0]}; make it with: python run.py" in capsys.readouterr().err
    save(results, "mha", MICRO_TASKS[0], outcomes(160), model=TINY)
    save(results, "chai", MICRO_TASKS[0], outcomes(160), settings, model=TINY, salt="other")
    assert call(results, page) == 1
    assert f"no complete run of chai on {MICRO_TASKS[0]}, clusters=[8, 6, 4, 4]" in capsys.readouterr().err
    assert page.read_text() == PAGE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAGE.replace("demo", "dmeo"), "unknown block 'dmeo table' (did you mean 'demo table'?)"),
        (PAGE.replace("<!-- demo table: end -->", ""), "a block has no end"),
    ],
)
def test_mistakes_in_a_page_take_one_line(tmp_path, page, capsys, text, message):
    page.write_text(text)
    (tmp_path / "results").mkdir()
    assert call(tmp_path / "results", page) == 1
    assert message in capsys.readouterr().err
    assert page.read_text() == text


def test_missing_pages_and_results_are_usage_errors(tmp_path, page, capsys):
    assert call(tmp_path / "nowhere", page) == 2
    assert call(tmp_path, tmp_path / "none.md") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_every_block_of_the_documentation_is_known():
    found = [match["name"] for page in documents.PAGES for match in documents.BLOCK.finditer(page.read_text())]
    assert sorted(found) == sorted(documents.BLOCKS)
