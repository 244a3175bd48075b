"""The paper's numbers are in ``results/paper`` alone, and figures draw what is there."""

from __future__ import annotations

import ast
import csv
import re
import shutil
from pathlib import Path

import pytest

from analysis.figures import fig11, fig12a, fig12b, fig13
from analysis.figures.__main__ import main
from analysis.plotting import paper
from analysis.results.files import SkippedRun
from analysis.results.runs import Results
from analysis.tables import specs
from tests.analysis import synthetic

#: Measures of layouts that happen to be the change of a cell.
LAYOUT = {1.35}
#: Columns with the paper's numbers, of all its files.
COLUMNS = ("value", "piqa", "hellaswag", "arc_challenge", "arc_easy", "boolq", "items")


def papers_numbers():
    """Numbers of three digits and more, which occur by chance nowhere else; as written and as fractions of one."""
    found = set()
    for path in specs.PAPER.glob("*.csv"):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                texts = [line[name] for name in COLUMNS if line.get(name)]
                numbers = [abs(float(text)) for text in texts if re.fullmatch(r"-?\d+(\.\d+)?", text)]
                found |= {number for number in numbers if len(f"{number:g}".replace(".", "").strip("0")) >= 3}
    return found | {round(number / 100, 6) for number in found}


def numbers_of(source):
    """Numbers in the code, and in its words."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            yield abs(float(node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (float(text) for text in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", node.value))


def test_the_papers_numbers_are_found():
    assert {21.4, 0.214, 1.73, 18.6, 47.5, 0.475, 1838, 41.29} <= papers_numbers()
    assert list(numbers_of("CLAIM = 0.214\nwords = 'up to 1.73 times'")) == [0.214, 1.73]


@pytest.mark.parametrize("path", sorted(Path("analysis").rglob("*.py")), ids=str)
def test_each_number_of_the_paper_is_written_once(path):
    again = (papers_numbers() - LAYOUT) & set(numbers_of(path.read_text()))
    assert not again, f"{path} repeats numbers of results/paper: {sorted(again)}"


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Another paper: its numbers and conditions differ."""
    folder = tmp_path / "paper"
    shutil.copytree(specs.PAPER, folder)
    path = folder / "claims.csv"
    text = path.read_text()
    for old, new in (
        ("reaches,21.4,", "reaches,33.3,"), ("reaches,1.73,", "reaches,2.22,"), ("reaches,5,x", "reaches,7,x"),
        ("phase=decode length=2048", "phase=decode length=512"), ("cluster_skew layer=18", "cluster_skew layer=20"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    monkeypatch.setattr(specs, "PAPER", folder)
    return folder


def test_figures_draw_the_number_of_the_claim(tmp_path, other):
    root = tmp_path / "results"
    synthetic.save(root, "memory", synthetic.memory(), "m")
    synthetic.save(root, "latency", synthetic.latency(), "l")
    _, data = fig11.draw(Results(root))
    saved = data[(data.source == "paper") & (data.panel == "saved")]
    assert set(saved.value) == {33.3}
    for module, value, length in ((fig12a, 2.22, 2048), (fig12b, 7.0, 512)):
        _, data = module.draw(Results(root))
        point = data[data.source == "paper"]
        assert point.value.tolist() == [value] and point.length_tokens.tolist() == [length]
    assert (fig13.the_layer(32), fig13.the_layer(16)) == (20, 10)


def test_a_missing_claim_is_named(tmp_path, other, capsys):
    root = tmp_path / "results"
    synthetic.save(root, "memory", synthetic.memory(), "m")
    (other / "claims.csv").write_text("id,value\nx,1\n")
    with pytest.raises(SkippedRun, match=r"claims\.csv has no claim kv-saved"):
        paper.number("kv-saved")
    assert main(["fig11", "--results", str(root), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: fig11: claims.csv has no claim kv-saved (results/paper)"


@pytest.mark.parametrize(
    ("k", "heads", "reading"),
    [
        *[(k, 32, "kept") for k in (4, 8, 16, 24)], *[(k, 32, "combined") for k in (29, 25, 17, 9)],
        *[(k, 16, "kept") for k in (2, 4, 8, 12)], *[(k, 16, "combined") for k in (15, 13, 9, 5)],
        (5, 32, None), (32, 32, None),
    ],
)  # fmt: skip
def test_readings_of_the_numbers_of_heads(k, heads, reading):
    assert paper.reading("random", k, heads) == reading and paper.reading("chai", k, heads) is None
