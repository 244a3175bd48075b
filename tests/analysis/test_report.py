"""The report: verdicts, our numbers beside the paper's, what is missing or corrupt, and a page that stands alone."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest

from analysis import figures
from analysis.report import claims, provenance, tables
from analysis.report import content as contents
from analysis.report import page as pages
from analysis.report.__main__ import main
from analysis.report.content import collect
from analysis.report.measures import MEASURES
from analysis.results.files import SkippedRun
from analysis.results.runs import Results
from analysis.stats import Interval, judge
from analysis.tables.specs import PAPER
from tests.analysis import reported, scored, synthetic

FIGURES = ["fig8", "fig11"]


class Links(HTMLParser):
    """Everything that a browser would fetch, ids, and links within the page."""

    def __init__(self):
        super().__init__()
        self.fetched, self.links, self.ids, self.downloads = [], [], [], {}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a" and "download" in attrs:
            self.downloads[attrs["download"]] = attrs["href"]
        elif tag == "a":
            self.links.append(attrs["href"])
        else:
            self.fetched += [attrs[name] for name in ("src", "href", "data", "srcset") if attrs.get(name)]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """They have tests of their own, and take the most time."""
    monkeypatch.setattr(figures, "names", list)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return reported.everything(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def content(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "names", lambda: FIGURES)
        return collect(root)


@pytest.fixture(scope="module")
def page(content, tmp_path_factory):
    """The page of everything as text, and what is in it."""
    text = pages.write(content, tmp_path_factory.mktemp("report")).read_text()
    links = Links()
    links.feed(text)
    return text, links


def built(root, tmp_path, capsys):
    """The page, the Markdown, and what was said."""
    assert main(["--results", str(root), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out" / "index.html")
    return (tmp_path / "out" / "index.html").read_text(), (tmp_path / "out" / "report.md").read_text(), said.err


def claim(content, name):
    (found,) = [one for one in content.claims if one.claim.id == name]
    return found


@pytest.mark.parametrize(
    ("ends", "bound", "verdict"),
    [
        ((18.5, 18.2, 18.8), "equals", "reproduced"),
        ((18.0, 17.0, 19.0), "equals", "undecided"),  # no difference is shown, and no equality
        ((17.0, 16.0, 18.2), "equals", "undecided"),
        ((17.0, 16.0, 17.9), "equals", "not reproduced"),
        ((18.6, 10.0, 27.0), "equals", "undecided"),  # it would agree with anything
        ((3.0, 2.0, 19.0), "at most", "reproduced"),
        ((18.0, 17.0, 20.0), "at most", "undecided"),
        ((21.0, 19.2, 22.0), "at most", "not reproduced"),
        ((18.2, 18.2, 18.2), "at least", "reproduced"),
        ((19.0, 17.0, 20.0), "reaches", "undecided"),
        ((9.0, 8.0, 18.0), "reaches", "not reproduced"),
    ],
)
def test_verdicts(ends, bound, verdict):
    assert judge(Interval(*ends), bound, 18.6, 0.5) == verdict
    assert judge(None, bound, 18.6, 0.5) == "not run yet"


def test_every_claim_of_the_paper_is_typed():
    typed = claims.read(PAPER / "claims.csv")
    assert len({one.id for one in typed}) == len(typed) >= 32
    assert {one.measure for one in typed} <= set(MEASURES)
    assert all(one.source and one.how and one.statement for one in typed)
    assert set(claims.NOT_IMPLEMENTED) <= {one.id for one in typed}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id,statement\na,b\n", "line 2 does not have the columns"),
        (",".join(claims.COLUMNS) + "\n" + "a,b,c,,magic,equals,1,x,1,s,o,n\n", "an unknown bound or measure"),
        (",".join(claims.COLUMNS) + "\n" + "a,b,c,,kv_saved,equals,one,x,1,s,o,n\n", "that is not a number"),
    ],
)
def test_a_corrupt_line_of_the_claims_is_named(tmp_path, text, reason):
    (tmp_path / "claims.csv").write_text(text)
    with pytest.raises(SkippedRun, match=reason):
        claims.read(tmp_path / "claims.csv")


@pytest.mark.parametrize(
    "reference", ["table4 CHAI-QKV", "table4 CHAI-QKV boolq", "table4 nobody piqa", "table5 cells"]
)
def test_a_number_that_refers_to_nothing_is_none(tmp_path, reference):
    line = f"a,b,c,,kv_saved,equals,{reference},x,1,s,o,n\n"
    (tmp_path / "claims.csv").write_text(",".join(claims.COLUMNS) + "\n" + line)
    with pytest.raises(SkippedRun, match="that is not a number"):
        claims.read(tmp_path / "claims.csv")


def test_numbers_of_tables_are_read_from_them():
    values = {one.id: one.value for one in claims.read(PAPER / "claims.csv")}
    assert float(values["qkv-arc"]) == pytest.approx(47.5 - 41.29)
    assert float(values["qkv-piqa"]) == pytest.approx(79.8 - 61.93)
    assert [values[f"accuracy-{name}"] for name in ("opt", "table-7b", "table-33b")] == [20, 35, 35]


def test_ours_is_what_the_runs_say(content):
    saved = claim(content, "kv-saved")
    share = 100 * (1 - (sum(synthetic.PARAMS_7B) + 1024) / 2048)
    assert saved.ours.interval == Interval.exact(pytest.approx(share)) and saved.verdict == "not reproduced"
    assert [run.result["run_id"] for run in saved.runs] == ["memoryllama7"]
    table = synthetic.latency()
    rows = table[(table.part == "model") & (table.phase == "prefill") & (table.length == 2048)].set_index(
        "implementation"
    )
    first = claim(content, "first-token").ours
    assert first.interval.value == pytest.approx(rows.speedup["chai"])
    # Quartiles of -3 % and +5 % of both, nine rounds each.
    error = 1.2533 * 0.08 / 1.349 / 3 * 2**0.5
    assert first.interval.high / first.interval.value == pytest.approx(2.718281828 ** (1.96 * error), rel=1e-6)
    assert "SDPA" in first.baseline and first.device == "NVIDIA H200, float16"


def test_a_loss_is_paired_and_the_worst_of_the_tasks(content):
    worst = claim(content, "accuracy-7b")
    assert worst.ours.interval.value == pytest.approx(2.0, abs=0.03)  # 4 of 200 answers
    assert worst.ours.interval.low < 2 < worst.ours.interval.high < 4.5
    assert worst.verdict == "reproduced" and worst.ours.certainty.startswith("exact, paired, 18,698 items")
    dejavu = claim(content, "dejavu-30")
    assert dejavu.ours.interval.value == pytest.approx(18.5, abs=0.01) and dejavu.verdict == "reproduced"


def test_a_claim_about_three_models_isnt_kept_by_one_but_is_broken_by_one(content, tmp_path):
    whole = claim(content, "accuracy")
    assert whole.verdict == "not run yet" and whole.ours is not None
    assert any("opt66b" in line for line in whole.commands) and not any("llama7b" in line for line in whole.commands)
    reported.scores(tmp_path, reported.MODEL, lost=30)
    assert claim(collect(tmp_path), "accuracy").verdict == "not reproduced"


def test_the_embedded_model_says_nothing_about_the_paper(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "names", lambda: ["fig11"])
    reported.scores(tmp_path, scored.TINY, "micro_", lost=0)
    reported.probes(tmp_path, "tiny", reported.GROUPS, 16)
    content = collect(tmp_path)
    lacking = len(claims.NOT_IMPLEMENTED)
    assert {verdict: n for verdict, n in content.counts.items() if n} == {
        "not run yet": len(content.claims) - lacking, "not implemented": lacking,
    }  # fmt: skip
    assert all(cell.state == "missing" for table in content.paper.tables for row in table.rows for cell in row.cells)
    assert not content.paper.tradeoff and not content.paper.layers
    assert [one.picture == "" for one in (*content.paper.figures, *content.embedded.figures)] == [True, False]
    assert {check.state for check in content.checks} == {"holds"}


def test_real_runs_say_nothing_about_the_embedded_model(tmp_path):
    reported.scores(tmp_path, scored.MODEL)
    content = collect(tmp_path)
    assert {check.state for check in content.checks} == {"not run yet"}
    assert content.paper.tradeoff and not content.embedded.tradeoff
    assert content.embedded.lines[0].runs == 0


def test_known_answers_that_fail_say_so(tmp_path):
    reported.scores(tmp_path, scored.TINY, "micro_", lost=40)
    reported.probes(tmp_path, "tiny", reported.GROUPS, 16)
    (config,) = tmp_path.glob("profile/*/*/*/*/config.yaml")
    config.write_text("method: {}\nmodel: {clusters: [9, 9, 9, 9]}\ntask: {}\n")
    states = [check.state for check in collect(tmp_path).checks]
    assert states[0] == "fails" and states[3] == "fails" and states[4] == "undecided"


def test_a_page_without_results(tmp_path, capsys):
    page, markdown, said = built(tmp_path, tmp_path, capsys)
    assert said == "" and page.count("not run yet") > 20 and 'id="plotly"' not in page
    assert "python run.py experiment=memory method=chai model=llama7b model.random_init=true" in page
    assert "not run yet" in markdown


def test_commands_of_missing_claims_run_something(tmp_path):
    for one in collect(tmp_path).claims:
        assert one.commands and all(line.startswith("python run.py ") for line in one.commands), one.claim.id


def test_removing_a_result_empties_its_cells_alone(root, tmp_path):
    copy = tmp_path / "results"
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "accuracy" / "llama7b" / "chai" / "piqa")
    shutil.rmtree(copy / "memory" / "llama7b")
    content = collect(copy)
    (table2,) = [table for table in content.paper.tables if table.spec.name == "table2"]
    states = {row.label: [cell.state for cell in row.cells] for row in table2.rows}
    assert states["CHAI"] == ["missing", "done", "done", "done", "done"] and set(states["MHA"]) == {"done"}
    assert claim(content, "kv-saved").verdict == "not run yet"
    assert claim(content, "accuracy-7b").verdict == "not run yet"
    assert claim(content, "accuracy-7b").commands == ("python run.py method=chai model=llama7b task=piqa",)
    assert claim(content, "first-token").ours is not None and not content.problems
    assert "not run yet" in pages.write(content, tmp_path / "out").read_text()


CORRUPT = {
    "memory/llama7b/chai/none/*/result.json": "{",
    "latency/llama7b/chai/none/*/status.json": "[]",
    "memory/tiny/chai/none/*/result.json": '{"model": "tiny", "method": "chai", "run_id": "x", "heads": "many"}',
    "latency/tiny/chai/none/*/measurements.parquet": "PAR1",
    "profile/tiny/none/c4/*/profile.safetensors": "",
    "accuracy/llama7b/chai/piqa/*/samples.parquet": "",
    "accuracy/tiny/mha/micro_boolq/*/config.yaml": "a: [",
}


def test_corrupt_results_are_named_and_left_out(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "names", lambda: FIGURES)
    copy = tmp_path / "results"
    shutil.copytree(root, copy)
    folders = set()
    for file, text in CORRUPT.items():
        (path,) = copy.glob(file)
        path.write_text(text)
        folders.add(str(path.parent))
    page, markdown, said = built(copy, tmp_path, capsys)
    lines = said.splitlines()
    assert {line.split(": ")[1] for line in lines} == folders and len(lines) == len(folders)
    assert all(line.startswith("left out: ") for line in lines)
    assert all(folder in page and folder in markdown for folder in folders)


def test_corrupt_numbers_of_the_paper_are_left_out(root, tmp_path, capsys, monkeypatch):
    for module in (contents, tables):
        monkeypatch.setattr(module, "PAPER", tmp_path)
    monkeypatch.setattr("analysis.tables.specs.PAPER", tmp_path)
    (tmp_path / "table2.csv").write_text("label,method\nMHA,mha\n")
    page, _, said = built(root, tmp_path, capsys)
    assert f"left out: {tmp_path / 'table2.csv'}: table2.csv is corrupt" in said
    assert f"left out: {tmp_path / 'claims.csv'}: no claims.csv" in said
    assert "claims cannot be read" in page


def test_a_mistake_in_one_figure_is_no_others(root, tmp_path, capsys, monkeypatch):
    def broken(results):
        raise RuntimeError("no ink")

    monkeypatch.setattr(figures, "names", lambda: FIGURES)
    monkeypatch.setattr(figures.load("fig8"), "draw", broken)
    page, _, said = built(root, tmp_path, capsys)
    assert said.count("not drawn: fig8: RuntimeError: no ink") == 2 and page.count("<figure") == 2


def test_the_page_stands_alone(content, page):
    text, links = page
    assert content.problems == {} and links.fetched and all(one.startswith("data:") for one in links.fetched)
    assert not re.search(r"@import|url\(", text)
    assert len(set(links.ids)) == len(links.ids)
    inner = [one[1:] for one in links.links if one.startswith("#")]
    assert set(inner) <= set(links.ids)
    assert [one for one in links.links if not one.startswith("#")] == ["https://arxiv.org/abs/2403.08058"]
    assert len(text) < 6_000_000


def test_downloads_are_what_is_drawn(page):
    _, links = page
    read = {
        name: pd.read_csv(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
        for name, uri in links.downloads.items()
        if uri.startswith("data:text/csv")
    }
    assert set(read) >= {"fig11.csv", "table2.csv", "micro.csv", "tradeoff-operations.csv", "layers-llama7b.csv"}
    layers = read["layers-llama7b.csv"]
    assert layers.k.tolist() == synthetic.PARAMS_7B
    assert layers.chai_bytes.sum() / layers.mha_bytes.sum() == pytest.approx((sum(synthetic.PARAMS_7B) + 1024) / 2048)
    assert set(read["tradeoff-operations.csv"].method) == {"mha", "chai", "random", "dejavu"}


@pytest.mark.parametrize("project", ["chai-attention", "chai-lab"])
def test_the_projects_version_is_read_under_its_old_name_too(project, tmp_path):
    versions = {"torch": "2.13.0", "numpy": "2.0", project: "1.2", "lm-eval": "0.4.9"}
    synthetic.save(tmp_path, "memory", synthetic.memory(), "a", versions=versions)
    (run,) = provenance.all_runs(Results(tmp_path))
    assert provenance.versions(run) == f"{project} 1.2, torch 2.13.0, lm-eval 0.4.9"


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["--results", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"error: --results: there is no folder {tmp_path / 'x'}\n"
    (tmp_path / "file").write_text("")
    assert main(["--results", str(tmp_path), "--out", str(tmp_path / "file" / "out")]) == 1
    assert "cannot write to" in capsys.readouterr().err.splitlines()[-1]
