"""Tables: exact numbers, what is missing and how to get it, what is refused, and the three formats."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import pandas as pd
import pytest
import yaml

from analysis import stats
from analysis.results import scores as scores_module
from analysis.results.runs import Results
from analysis.results.scores import load_scores
from analysis.tables.__main__ import main
from analysis.tables.cells import build
from analysis.tables.settings import row_name, unusual
from analysis.tables.specs import PAPER, REPOSITORY, TABLES, TASKS, at_chance, paper_rows
from experiments.config.compose import choices, compose_config
from experiments.config.validate import check_overrides
from experiments.runs import identity
from experiments.runs.identity import settings_id
from experiments.sweeps.expand import read_table
from tests.analysis import scored

PAPERS = ("table1", "table2", "table3", "table4")
RIGHT = {"piqa": 160, "hellaswag": 150, "arc_challenge": 90, "arc_easy": 140, "boolq": 120}


def full(root, **common):
    """MHA and CHAI on all five tasks; CHAI loses ten answers and gains two of 200."""
    for task, right in RIGHT.items():
        scored.save(root, "mha", task, scored.outcomes(right), **common)
        scored.save(root, "chai", task, scored.outcomes(right, 10, 2), scored.CHAI, saved=0.191, **common)


def table(root, name="table2", model=None):
    spec = TABLES[name]
    model = model or spec.model
    return build(spec, model, load_scores(Results(root, model)), paper_rows(name))


def cells(built, label):
    (row,) = [row for row in built.rows if row.label == label]
    return {cell.task: cell for cell in row.cells}


def printed(capsys, *arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def as_csv(capsys, root, name="table2", *more):
    text = printed(capsys, name, "--format", "csv", "--results", root, *more).out
    return pd.read_csv(io.StringIO(text), keep_default_na=False, dtype=str).set_index(["row", "task"])


# The paper's numbers


@pytest.mark.parametrize(("name", "rows", "columns"), [("table1", 4, 5), ("table2", 7, 5), ("table3", 7, 5)])
def test_the_papers_tables_are_whole(name, rows, columns):
    found = paper_rows(name)
    assert len(found) == rows and found[0].method == "mha" and all(row.source for row in found)
    for row in found:
        assert len(row.values) == columns
        assert all((30 < value < 90) if row.method == "mha" else (-60 < value < 1) for value in row.values.values())


def test_single_numbers_and_checksums_of_the_papers_tables():
    """Sums of all differences, added up from the paper itself, show a slip of the keyboard."""
    sums = {name: sum((sum(r.values.values()) for r in paper_rows(name)[1:]), Decimal()) for name in PAPERS}
    assert sums == {
        "table1": Decimal("-11.55"),
        "table2": Decimal("-452.36"),
        "table3": Decimal("-415.95"),
        "table4": Decimal("-26.58"),
    }
    assert cells_of_paper("table2", "DejaVu-10%")["arc_challenge"] == Decimal("-5.78")
    assert cells_of_paper("table3", "SpAtten")["boolq"] == Decimal("-34.55")


def cells_of_paper(name, label):
    return next(row.values for row in paper_rows(name) if row.label == label)


def test_table_4_agrees_with_table_2_where_both_have_a_number():
    for method in ("mha", "chai"):
        first, second = (next(r for r in paper_rows(name) if r.method == method) for name in ("table2", "table4"))
        assert {task: first.values[task] for task in second.values} == second.values


def test_claims_that_contradict_each_other_say_so():
    claims = pd.read_csv(PAPER / "claims.csv", keep_default_na=False)
    assert claims.source.str.len().min() > 0
    for claim, values in {"accuracy_lost": {3.2, 3.7, 0.14}, "time_to_first_token": {1.73, 1.72}}.items():
        rows = claims[claims.claim == claim]
        assert set(rows.value.astype(float)) == values
        assert rows.note.str.len().min() > 0
    assert "none of the published" in claims[claims.claim == "kv_cache_saved"].note.item()


def test_the_papers_numbers_are_in_the_repository():
    for path in PAPER.glob("*.csv"):
        ignored = subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=REPOSITORY)
        assert ignored.returncode == 1, f"{path} is ignored"


# Without results


@pytest.mark.parametrize("name", PAPERS)
def test_without_results_the_papers_numbers_and_commands_are_printed(name, tmp_path, capsys):
    said = printed(capsys, name, "--results", tmp_path)
    assert said.err == ""
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 110
    for row in paper_rows(name):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"|{row.label} "))
        ours, paper = lines[place].split("|")[2:-1], lines[place + 1].split("|")[2:-1]
        assert [word.strip() for word in ours] == ["ours", *["missing"] * len(row.values), ""]
        assert [word.strip() for word in paper[:1]] == ["paper"]
        assert [Decimal(word.strip()) for word in paper[1:-1]] == list(row.values.values())


@pytest.mark.parametrize("name", PAPERS)
def test_commands_for_missing_cells_are_valid(name, tmp_path, capsys):
    """Those of methods that are there are taken as they are by the command line."""
    out = printed(capsys, name, "--results", tmp_path).out
    found = [shlex.split(line.partition("python run.py ")[2]) for line in out.splitlines() if "python run.py" in line]
    assert len(found) == len(paper_rows(name)) + 1
    checked = 0
    for words in found:
        words = [word.replace("COUNTS", "4") for word in words]
        method = dict(word.partition("=")[::2] for word in words).get("method", "")
        if method in choices("method"):
            check_overrides([word for word in words if word != "-m"], multirun="-m" in words)
            checked += 1
    assert checked >= 2
    assert words_of(found, "method=dejavu") <= {"method.sparsity=0.1", "method.sparsity=0.3", "method.sparsity=0.5"}


def words_of(found, method):
    return {word for words in found if method in words for word in words if word.startswith("method.")}


def test_without_micro_runs_one_line_says_how_to_make_some(tmp_path, capsys):
    said = printed(capsys, "micro", "--results", tmp_path, code=1)
    assert said.out == ""
    assert "no finished accuracy run of model 'tiny'" in said.err and "python run.py -m paper=micro" in said.err


# With results


def test_numbers_intervals_gaps_and_savings(tmp_path, capsys):
    full(tmp_path)
    rows = as_csv(capsys, tmp_path)
    for task, right in RIGHT.items():
        mha, chai = rows.loc["MHA", task], rows.loc["CHAI", task]
        assert float(mha.ours) == pytest.approx(right / 2)
        assert float(chai.ours) == pytest.approx(-4.0)
        paper = cells_of_paper("table2", "CHAI")[task]
        assert float(chai.gap) == pytest.approx(-4.0 - float(paper))
        assert Decimal(chai.paper) == paper and chai.paper_source == "Table 2"
        assert (int(chai.lost), int(chai.gained), int(chai.n)) == (10, 2, 200)
        assert float(chai.p) == pytest.approx(stats.mcnemar(10, 2), abs=1e-6)
        assert (float(chai.low), float(chai.high)) == (pytest.approx(-8.1, abs=0.1), pytest.approx(-0.7, abs=0.4))
        assert (chai.saving, float(chai.kv_saved), mha.saving) == ("real", pytest.approx(19.1), "none")
        assert chai.metric == ("acc" if task == "boolq" else "acc_norm")
        assert float(chai["acc_norm" if task == "boolq" else "acc"]) == 0.0  # kept, not shown
        assert chai.mha_run_id == mha.run_id != chai.run_id
    assert set(rows.loc["SpAtten"].state) == {"missing"} and set(rows.loc["SpAtten"].ours) == {""}
    lines = printed(capsys, "table2", "--results", tmp_path).out.splitlines()
    assert max(map(len, lines)) <= 110
    at = next(i for i, line in enumerate(lines) if line.startswith("|CHAI  "))
    parts = [[word.strip() for word in line.split("|")[1:-1]] for line in lines[at : at + 4]]
    # Each p is 0.039; as five comparisons, none is significant.
    assert parts[0] == ["CHAI", "ours", *["-4.0"] * 5, "real"]
    assert list(rows.loc["CHAI"].p_holm.astype(float)) == pytest.approx([5 * stats.mcnemar(10, 2)] * 5, abs=1e-5)
    assert parts[1][:2] == ["", "95 %"] and parts[1][-1] == "19.1 %"
    assert parts[2][1:] == ["paper", "-2.0", "-3.2", "-0.5", "+0.3", "+0.1", ""]
    assert parts[3][1:] == ["gap", "-2.0", "-0.8", "-3.5", "-4.3", "-4.1", ""]
    assert any("all items, 200 items a task" in line for line in lines)
    assert not any(re.match(r"    (MHA|CHAI) +python", line) for line in lines)


def test_a_cell_that_is_missing_is_filled_by_its_command(tmp_path, capsys):
    full(tmp_path, limit=200)
    for folder in (tmp_path / "accuracy/llama7b/chai").glob("boolq/*"):
        (folder / "status.json").write_text(json.dumps({"state": "failed", "error": "out of memory"}))
    said = printed(capsys, "table2", "--results", tmp_path)
    assert "left out" in said.err and "its state is failed: out of memory" in said.err
    assert "    CHAI         python run.py method=chai model=llama7b task=boolq limit=200\n" in said.out
    assert "python run.py -m paper=table2 model.profile=PROFILE limit=200\n" in said.out
    assert cells(table(tmp_path), "CHAI")["boolq"].state == "missing"
    rows = as_csv(capsys, tmp_path)
    assert rows.loc["CHAI", "boolq"].command == "python run.py method=chai model=llama7b task=boolq limit=200"
    assert rows.loc["CHAI", "piqa"].command == ""


def test_the_command_makes_a_run_of_the_same_settings(tmp_path, capsys):
    """What the table says to run has the settings_id that the table then looks for."""
    there = compose_config(["method=mha", "model=llama7b", "task=piqa", "limit=7", "seed=3", "batch_size=4"])
    config = yaml.safe_load(yaml.safe_dump(scored.MODEL))
    scored.save(tmp_path, "mha", "piqa", scored.outcomes(5, n=7), model=config, limit=7, seed=3, batch_size=4)
    rows = as_csv(capsys, tmp_path)
    words = shlex.split(rows.loc["CHAI", "piqa"].command)[2:]
    assert settings_id(compose_config(words)) == settings_id(there)


@pytest.mark.parametrize("name", ["mha", "chai"])
def test_without_mha_nothing_is_compared(name, tmp_path):
    scored.save(tmp_path, name, "piqa", scored.outcomes(100), {} if name == "mha" else scored.CHAI)
    built = table(tmp_path)
    state = {label: cells(built, label)["piqa"].state for label in ("MHA", "CHAI")}
    assert state == ({"MHA": "done", "CHAI": "missing"} if name == "mha" else {"MHA": "missing", "CHAI": "no MHA"})
    assert cells(built, "CHAI")["piqa"].points is None


def test_runs_of_other_settings_are_never_compared(tmp_path, capsys):
    full(tmp_path, limit=200)
    scored.save(tmp_path, "dejavu", "piqa", scored.outcomes(160, 50), {"sparsity": 0.1}, kind="simulated", seed=1)
    built = table(tmp_path)
    assert cells(built, "DejaVu-10%")["piqa"].state == "missing"
    assert built.others == ["1 run with limit=null"]
    assert "Not shown" in printed(capsys, "table2", "--results", tmp_path).out


def test_the_fullest_settings_are_shown_then_those_with_most_items(tmp_path):
    full(tmp_path, limit=200)
    for task in RIGHT:
        scored.save(tmp_path, "mha", task, scored.outcomes(100, n=250))
    assert table(tmp_path).like.config["limit"] == 200
    for task in RIGHT:
        scored.save(tmp_path, "chai", task, scored.outcomes(100, n=250), scored.CHAI)
    assert table(tmp_path).like.config["limit"] is None


def test_hyper_parameters_tell_rows_apart(tmp_path, capsys):
    full(tmp_path)
    for sparsity, lost in ((0.1, 8), (0.5, 60), (0.7, 90)):
        settings = {"sparsity": sparsity, "predictor": "oracle"}
        scored.save(tmp_path, "dejavu", "piqa", scored.outcomes(160, lost), settings, kind="simulated")
    for k in (16, 4, 24, 8):
        scored.save(tmp_path, "random", "piqa", scored.outcomes(160, 100 - k), {"clusters": k, "seed": 0}, saved=0.4)
    scored.save(tmp_path, "random", "piqa", scored.outcomes(160, 70), {"clusters": "llama7b_params", "seed": 0})
    other = scored.CHAI | {"membership": "agglomerative"}
    scored.save(tmp_path, "chai", "piqa", scored.outcomes(160, 20), other)
    built = table(tmp_path)
    labels = [row.label for row in built.rows]
    assert [label for label in labels if label.startswith("random")] == [
        "random", "random k=4", "random k=8", "random k=16", "random k=24"
    ]  # fmt: skip
    ours = {label: cells(built, label)["piqa"].points for label in labels if cells(built, label)["piqa"].score}
    assert ours["random k=8"] == pytest.approx(-46.0) and ours["random"] == pytest.approx(-35.0)
    dejavu = [row for row in built.rows if row.method == "dejavu"]
    found = {row.settings["sparsity"]: row for row in dejavu}
    assert set(found) == {0.1, 0.3, 0.5, 0.7}
    assert [found[s].paper is not None for s in (0.1, 0.3, 0.5, 0.7)] == [True, True, True, False]
    assert found[0.1].cells[0].points == pytest.approx(-4.0) and found[0.1].cells[0].paper == Decimal("-3.9")
    assert found[0.1].saving == "simulated"
    assert found[0.3].cells[0].state == "missing"
    out = printed(capsys, "table2", "--results", tmp_path).out
    letter = next(label for label in labels if label.startswith("CHAI ("))
    assert f"- {letter}: membership=agglomerative." in out
    missing = next(line for line in out.splitlines() if re.match(r"    random k=4 +python", line))
    chosen = "-m method=random method.clusters=4 method.seed=0,1,2,3,4 model=llama7b"
    assert f"{chosen} task=hellaswag,arc_challenge,arc_easy,boolq" in missing
    missing = next(line for line in out.splitlines() if line.startswith(f"    {letter}"))
    assert "method.membership=agglomerative" in missing and "method.tokens" not in missing


def test_table_4_has_the_papers_methods_only(tmp_path):
    full(tmp_path)
    scored.save(tmp_path, "random", "piqa", scored.outcomes(160, 50), {"clusters": 4, "seed": 0})
    assert [row.method for row in table(tmp_path, "table4").rows] == ["mha", "chai", "chai_qkv"]
    assert [cell.paper for cell in table(tmp_path, "table4").rows[2].cells] == [Decimal("-6.21"), Decimal("-17.87")]


def test_pairs_on_other_items_are_refused_with_the_reason(tmp_path, capsys):
    full(tmp_path)
    (folder,) = (tmp_path / "accuracy/llama7b/chai/piqa").iterdir()
    frame = pd.read_parquet(folder / "samples.parquet")
    frame.loc[3, "doc_hash"] = "another question"
    frame.to_parquet(folder / "samples.parquet")
    reason = "1 of 200 items differ in content (doc_hash), item 3 first"
    said = printed(capsys, "table2", "--results", tmp_path)
    assert f"- Refused: CHAI on piqa: {reason}." in said.out
    rows = as_csv(capsys, tmp_path)
    assert (rows.loc["CHAI", "piqa"].state, rows.loc["CHAI", "piqa"].reason) == ("refused", reason)
    assert rows.loc["CHAI", "piqa"].ours == "" and float(rows.loc["CHAI", "boolq"].ours) == pytest.approx(-4)


def test_runs_on_other_data_are_refused(tmp_path):
    scored.save(tmp_path, "mha", "piqa", scored.outcomes(160))
    scored.save(tmp_path, "chai", "piqa", scored.outcomes(160), scored.CHAI, salt="other")
    cell = cells(table(tmp_path), "CHAI")["piqa"]
    assert cell.state == "refused" and "settings_id" in cell.reason and cell.points is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "samples.parquet").write_bytes(b"PAR1"), "samples.parquet is corrupt"),
        (lambda folder: (folder / "samples.parquet").unlink(), "no samples.parquet"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "config.yaml is corrupt"),
        (lambda folder: (folder / "config.yaml").write_text("method: chai"), "config.yaml is corrupt"),
        (lambda folder: (folder / "config.yaml").unlink(), "no config.yaml"),
        (lambda folder: (folder / "result.json").write_text("{"), "result.json is corrupt"),
        (lambda folder: change(folder, n=199), "samples.parquet does not match the score in result.json"),
        (lambda folder: change(folder, metrics={"acc_norm": 0.9}), "samples.parquet does not match the score"),
        (lambda folder: change(folder, metrics={"acc_norm": 1.9}), "result.json is impossible: a score of 1.9"),
        (lambda folder: change(folder, metrics={"acc_norm": "x"}), "result.json has no numeric score or savings"),
        (lambda folder: change(folder, metrics=[]), "result.json is corrupt: metrics is []"),
        (lambda folder: change(folder, savings={"kind": "real"}), "result.json has no numeric score or savings"),
        (lambda folder: change(folder, metric="f1"), "samples.parquet has no f1"),
    ],
)
def test_corrupt_runs_are_named_and_left_out(damage, reason, tmp_path, capsys):
    full(tmp_path)
    (folder,) = (tmp_path / "accuracy/llama7b/chai/piqa").iterdir()
    damage(folder)
    said = printed(capsys, "table2", "--results", tmp_path)
    (line,) = said.err.splitlines()
    assert line.startswith(f"left out: {folder}: ") and reason in line
    states = {task: cell.state for task, cell in cells(table(tmp_path), "CHAI").items()}
    assert states == {task: "missing" if task == "piqa" else "done" for task in TASKS}


def change(folder, **fields):
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | fields))


def test_unfinished_runs_do_not_count(tmp_path):
    scored.save(tmp_path, "mha", "piqa", scored.outcomes(160), state="running")
    assert cells(table(tmp_path), "MHA")["piqa"].state == "missing"


# Families of comparisons, equivalence, seeds


def test_stars_are_of_p_corrected_for_all_comparisons_of_the_table(tmp_path, capsys):
    """A loss of 12 of 200 with 1 gained has p = 0.0034: two stars alone, none beside 24 comparisons without any."""
    scored.save(tmp_path, "mha", "piqa", scored.outcomes(160))
    scored.save(tmp_path, "spatten", "piqa", scored.outcomes(160, 12, 1))
    assert cells(table(tmp_path), "SpAtten")["piqa"].p_holm == pytest.approx(stats.mcnemar(12, 1))
    assert "-5.5**" in printed(capsys, "table2", "--results", tmp_path).out
    for task, right in RIGHT.items():
        if task != "piqa":
            scored.save(tmp_path, "mha", task, scored.outcomes(right))
        for k in (4, 8, 16, 24):
            scored.save(tmp_path, "static", task, scored.outcomes(right, 3, 3), {"clusters": k})
    cell = cells(table(tmp_path), "SpAtten")["piqa"]
    assert cell.p_holm == pytest.approx(21 * stats.mcnemar(12, 1))
    said = printed(capsys, "table2", "--results", tmp_path).out
    assert "-5.5**" not in said and "for the 21 comparisons" in said.replace("\n  ", " ")


def test_equality_with_mha_is_shown_only_if_the_interval_lies_within_the_margin(tmp_path, capsys):
    for n, method in ((1000, "spatten"), (60, "chai_static")):
        task = "piqa" if n == 1000 else "boolq"
        scored.save(tmp_path, "mha", task, scored.outcomes(n // 2, n=n))
        scored.save(tmp_path, method, task, scored.outcomes(n // 2, 1, 1, n=n))
    built = table(tmp_path)
    many, few = cells(built, "SpAtten")["piqa"], cells(built, "CHAI-static")["boolq"]
    assert many.is_equal and not few.is_equal  # both change by 0, without a significant difference
    assert many.points == few.points == 0 and few.p_holm == 1
    said = printed(capsys, "table2", "--results", tmp_path).out
    assert "0.0 =" in said and "equal to MHA within 2 points" in said.replace("\n  ", " ")
    rows = as_csv(capsys, tmp_path)
    assert (rows.loc["SpAtten", "piqa"].equal, rows.loc["CHAI-static", "boolq"].equal) == ("yes", "no")


@pytest.mark.parametrize("common", [False, True], ids=["method.seed", "seed"])
def test_seeds_of_a_method_are_one_row_beside_one_run_of_mha(common, tmp_path, capsys):
    """Also if the seed of the whole run was changed: the items of multi-head attention do not depend on it."""
    losses = (20, 24, 28, 32, 36)
    for task, right in RIGHT.items():
        scored.save(tmp_path, "mha", task, scored.outcomes(right))
        for seed, lost in enumerate(losses):
            settings = {"clusters": "llama7b_params", "seed": seed}
            more = {"seed": seed} if common else {}
            scored.save(tmp_path, "random", task, scored.outcomes(right, lost), settings, **more)
    built = table(tmp_path)
    (row,) = [row for row in built.rows if row.method == "random"]
    assert row.seeds == 5 and not row.too_few_seeds and not built.others
    rows = as_csv(capsys, tmp_path)
    one = rows.loc["random", "piqa"]
    assert (float(one.ours), one.seeds, float(one.lost)) == (-14.0, "5", 28.0)
    assert float(one.sd) == pytest.approx(pd.Series(losses).std() / 2, abs=1e-4)
    assert len(one.run_id.split()) == 5
    said = printed(capsys, "table2", "--results", tmp_path).out
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in said.splitlines() if line[:1] == "|"]
    at = next(i for i, line in enumerate(lines) if line[0] == "random")
    assert lines[at + 2][1:4] == ["sd of 5", "3.2", "3.2"]
    assert "†" not in said


def test_few_seeds_are_marked_and_the_command_makes_the_others(tmp_path, capsys):
    scored.save(tmp_path, "mha", "micro_piqa", scored.outcomes(160), model=scored.TINY)
    for seed in (0, 1):
        settings = {"clusters": [8, 6, 4, 4], "seed": seed}
        scored.save(tmp_path, "random", "micro_piqa", scored.outcomes(160, 40 + seed), settings, model=scored.TINY)
    for seed in (0, 1):
        settings = {"sparsity": 0.1, "predictor": trained(tmp_path / f"p{seed}", seed)}
        scored.save(tmp_path, "dejavu", "micro_piqa", scored.outcomes(160, 9 + seed), settings, model=scored.TINY)
    scored.save(tmp_path, "spatten", "micro_piqa", scored.outcomes(160, 9), model=scored.TINY)
    said = printed(capsys, "micro", "--results", tmp_path).out
    labels = [line.split("|")[1].strip() for line in said.splitlines() if line[:1] == "|"]
    assert [label for label in labels if label.endswith("†")] == ["random †", "DejaVu (a) †"]
    assert "fewer than 5 seeds" in said
    assert "-m method=random method.seed=0,1,2,3,4 model=tiny task=" in said


def trained(folder, seed, steps=200):
    folder.mkdir()
    (folder / "predictor.json").write_text(json.dumps({"seed": seed, "recipe": {"steps": steps}}))
    return str(folder)


def test_predictors_of_another_recipe_are_another_row(tmp_path):
    """Trainings that differ in their seed alone are one row, whichever folder they are in."""
    scored.save(tmp_path, "mha", "piqa", scored.outcomes(160))
    for name, seed, steps in (("a", 0, 200), ("b", 1, 200), ("c", 0, 900)):
        settings = {"sparsity": 0.1, "predictor": trained(tmp_path / name, seed, steps)}
        scored.save(tmp_path, "dejavu", "piqa", scored.outcomes(160, 20 + seed), settings)
    found = sorted(row.seeds for row in table(tmp_path).rows if row.method == "dejavu" and row.scores)
    assert found == [1, 2]


def test_a_seed_on_which_prompts_depend_is_a_condition(tmp_path):
    """With examples in the prompt, runs of another seed answer other questions."""
    full(tmp_path)
    for folder in (tmp_path / "accuracy/llama7b").glob("*/*/*"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["task"]["num_fewshot"], config["seed"] = 2, 0 if config["method"]["name"] == "mha" else 1
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for score in load_scores(Results(tmp_path)):
        assert score.seed_matters and score.conditions["seed"] == (score.method != "mha")


def test_keys_that_do_not_make_runs_differ_are_those_of_run_ids():
    """Of the sections that an accuracy run has; the analysis imports nothing of the experiments."""
    ours = {key for key in identity.MACHINE_ONLY if key.partition(".")[0] not in ("experiment", "corpus")}
    assert set(scores_module.MACHINE_ONLY) == ours


def test_other_counts_than_chais_are_noted(tmp_path, capsys):
    full(tmp_path)
    kept = {"savings": {"kind": "real", "kv_bytes": 800, "kv_bytes_mha": 1000, "heads_kept": [30]}}
    for task, right in RIGHT.items():
        scored.save(tmp_path, "chai_static", task, scored.outcomes(right, 12), {}, result=kept)
    words = "CHAI-static has other numbers of clusters than CHAI (30 of the layers' heads in all, CHAI 32)"
    assert words in printed(capsys, "table2", "--results", tmp_path).out.replace("\n  ", " ")
    for task, right in RIGHT.items():
        profiled = scored.CHAI | {"profile": "/data/profile"}
        scored.save(tmp_path, "chai", task, scored.outcomes(right, 9), profiled, result=kept)
    assert "other numbers" not in printed(capsys, "table2", "--results", tmp_path).out


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "figure1"])
def test_chai_and_chai_static_run_with_the_same_counts(name):
    """Both take them from the same head profile."""
    runs = [
        dict(override.split("=", 1) for override in line)
        for line in read_table(REPOSITORY / "conf" / "paper" / f"{name}.yaml", ["model.profile=/data/p"])
    ]
    profiles = {}
    for run in runs:
        for method in run["method"].split(","):
            words = [f"method={method}", f"model={run['model']}", "model.profile=/data/p"]
            words += [f"method.profile={run['method.profile']}"] if "method.profile" in run else []
            if method in ("chai", "chai_static"):
                profiles[method] = compose_config(words).method.profile
    assert profiles == {"chai": "/data/p", "chai_static": "/data/p"}


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "figure1", "micro"])
def test_methods_with_chance_in_them_run_with_five_seeds(name):
    for line in read_table(REPOSITORY / "conf" / "paper" / f"{name}.yaml", []):
        run = dict(override.split("=", 1) for override in line)
        if "random" in run["method"].split(","):
            assert run["method"] == "random" and run["method.seed"] == "0,1,2,3,4"


# Chance


def test_the_papers_own_scores_at_chance_are_named(tmp_path, capsys):
    assert at_chance(paper_rows("table2")) == {
        "DejaVu-30%": {"boolq": Decimal("55.8")},
        "DejaVu-50%": {"hellaswag": Decimal("25.4"), "arc_easy": Decimal("26.5"), "boolq": Decimal("54.4")},
        "SpAtten": {"piqa": Decimal("38.4"), "boolq": Decimal("48.9")},
    }
    assert at_chance(paper_rows("table3"))["SpAtten"] == {"piqa": Decimal("50.2"), "boolq": Decimal("48.55")}
    assert at_chance(paper_rows("table1")) == {"DejaVu-50%": {"boolq": Decimal("61.4")}}
    said = printed(capsys, "table2", "--results", tmp_path).out.replace("\n  ", " ")
    assert "not above chance are its scores of DejaVu-30% BoolQ 55.8" in said
    assert "SpAtten PIQA 38.4, BoolQ 48.9. Chance: PIQA 50 (guess)" in said
    assert "BoolQ 62.2 (most frequent answer)" in said


# The embedded model


def test_a_table_of_the_paper_can_be_made_of_the_embedded_model(tmp_path, capsys):
    """Its tasks are its own, so the paper's numbers are left out; the commands run the table's sweeps on them."""
    micro(tmp_path)
    rows = as_csv(capsys, tmp_path, "table2", "--model", "tiny")
    assert set(rows.paper) == {""} and set(rows.verdict) == {""}
    assert float(rows.loc["CHAI", "micro_piqa"].ours) == -1 and float(rows.loc["CHAI", "mean"].ours) == -1
    said = printed(capsys, "table2", "--model", "tiny", "--results", tmp_path).out
    assert "python run.py -m paper=table2 model=tiny task=micro" in said and "Paper" not in said.partition("\n")[2]
    empty = printed(capsys, "table3", "--model", "tiny", "--results", tmp_path / "accuracy", code=1)
    assert empty.out == "" and "paper=table3 model=tiny task=micro" in empty.err


def test_a_star_on_a_mean_is_of_a_test_of_the_mean(tmp_path, capsys):
    """All items together gain as many as they lose, but the tasks differ in size: the mean of the tasks falls."""
    for task, n, lost, gained in (("micro_piqa", 200, 20, 0), ("micro_boolq", 2000, 0, 20)):
        scored.save(tmp_path, "mha", task, scored.outcomes(n // 2, n=n), model=scored.TINY)
        scored.save(tmp_path, "spatten", task, scored.outcomes(n // 2, lost, gained, n=n), model=scored.TINY)
    spec = replace(TABLES["micro"], tasks=("micro_piqa", "micro_boolq"))
    built = build(spec, "tiny", load_scores(Results(tmp_path, "tiny")), [])
    mean = cells(built, "SpAtten")["mean"]
    assert stats.mcnemar(20, 20) == 1 and mean.p_holm < 0.001 and mean.points == pytest.approx(-4.5)


def micro(root):
    settings = scored.CHAI | {"clusters": [8, 6, 4, 4]}
    for task, right in RIGHT.items():
        scored.save(root, "mha", f"micro_{task}", scored.outcomes(right), model=scored.TINY)
        chai = scored.outcomes(right, 4, 2)
        scored.save(root, "chai", f"micro_{task}", chai, settings, model=scored.TINY, saved=0.328)


def test_micro_has_every_method_found_and_the_mean(tmp_path, capsys):
    micro(tmp_path)
    few = {"clusters": 4, "seed": 0}
    scored.save(tmp_path, "random", "micro_piqa", scored.outcomes(160, 60), few, model=scored.TINY)
    rows = as_csv(capsys, tmp_path, "micro")
    assert list(dict.fromkeys(rows.index.get_level_values(0))) == ["MHA", "CHAI", "random k=4"]
    assert float(rows.loc["MHA", "mean"].ours) == pytest.approx(sum(RIGHT.values()) / 10)
    assert float(rows.loc["CHAI", "mean"].ours) == pytest.approx(-1.0)
    mean, one = rows.loc["CHAI", "mean"], rows.loc["CHAI", "micro_piqa"]
    narrow, wide = float(mean.high) - float(mean.low), float(one.high) - float(one.low)
    assert narrow == pytest.approx(wide / 5**0.5, rel=0.12)
    assert (int(mean.lost), int(mean.gained)) == (20, 10)
    assert rows.loc["random k=4", "mean"].state == "missing" and set(rows.paper) == {""}
    lines = printed(capsys, "micro", "--results", tmp_path).out.splitlines()
    assert max(len(line) for line in lines if line.startswith("|")) <= 110
    command = "-m method=random method.clusters=4 method.seed=0,1,2,3,4 model=tiny task=micro_hellaswag,micro_arc_ch"
    assert any(command in line for line in lines)


def test_a_single_item_has_no_standard_error(tmp_path, capsys):
    for task in RIGHT:
        scored.save(tmp_path, "mha", f"micro_{task}", [1.0], model=scored.TINY, limit=1)
    lines = printed(capsys, "micro", "--results", tmp_path).out.splitlines()
    row = next(line for line in lines if line.startswith("|MHA"))
    assert [word.strip() for word in row.split("|")[2:-1]] == [*["100.0"] * 6, "none"]


@pytest.mark.parametrize("path", [None, "/elsewhere/model"])
def test_commands_name_local_files_unless_they_are_the_usual_ones(path, tmp_path, capsys):
    model = scored.TINY | ({"path": path} if path else {})
    scored.save(tmp_path, "mha", "micro_piqa", scored.outcomes(160), model=model)
    out = printed(capsys, "micro", "--results", tmp_path).out
    assert ("model=tiny model.path=/elsewhere/model task=" in out) == bool(path)
    assert ("model=tiny task=" in out) != bool(path)


def test_the_interval_has_a_width_where_no_answer_flips(tmp_path, capsys):
    """It is z^2 / (n + z^2) to either side: 1.9 points with 200 items."""
    scored.save(tmp_path, "mha", "micro_piqa", scored.outcomes(200), model=scored.TINY)
    scored.save(tmp_path, "spatten", "micro_piqa", scored.outcomes(200), model=scored.TINY)
    assert "-1.9…+1.9" in printed(capsys, "micro", "--results", tmp_path).out


def test_another_model_is_named_beside_the_papers_numbers(tmp_path, capsys):
    local = scored.MODEL | {"name": "stories", "path": "/data/stories", "clusters": None}
    scored.save(tmp_path, "mha", "piqa", scored.outcomes(100), model=local)
    out = printed(capsys, "table2", "--results", tmp_path, "--model", "stories").out
    assert "ours: stories, another model" in out
    assert "method=chai method.profile=PROFILE model.path=/data/stories task=paper" in out


# Formats and the command line


@pytest.mark.parametrize("name", [*PAPERS, "micro"])
def test_latex_is_balanced(name, tmp_path, capsys):
    full(tmp_path)
    micro(tmp_path)
    out = printed(capsys, name, "--format", "tex", "--results", tmp_path).out
    code = [line for line in out.splitlines() if not line.startswith("%")]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", out).group(1)
    lines = [line for line in code if line.endswith(r"\\")]
    assert len(lines) >= 4
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    assert re.findall(r"\\begin\{(\w+)\}", out) == re.findall(r"\\end\{(\w+)\}", out)[::-1]
    for line in code:
        bare = line.replace(r"\$", "")
        assert bare.count("$") % 2 == 0 and bare.count("{") == bare.count("}")
        assert not re.search(r"(?<!\\)[%#_]", line)
    assert [word for word in (r"\toprule", r"\midrule", r"\bottomrule") if word in code] == [
        r"\toprule", r"\midrule", r"\bottomrule",
    ]  # fmt: skip
    assert (name != "table2") or out.count(" & ".join(["$-$4.0"] * 5)) == 1


@pytest.mark.parametrize("name", [*PAPERS, "micro"])
def test_csv_has_a_line_for_each_cell(name, tmp_path, capsys):
    micro(tmp_path)
    rows = as_csv(capsys, tmp_path, name)
    columns = len(TABLES[name].tasks) + TABLES[name].mean
    assert len(rows) == columns * (len(paper_rows(name)) or 2)
    assert rows.index.is_unique
    assert ((rows.state == "missing") == (rows.command != "")).all()


def test_markdown_rows_have_the_same_width(tmp_path, capsys):
    full(tmp_path)
    lines = [line for line in printed(capsys, "table2", "--results", tmp_path).out.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel2"], "unknown table 'tabel2' (did you mean 'table2'?); valid: table1, table2, table3, table4, micro"),
        ([], "no table named; valid: table1"),
        (["table1", "table2", "--format", "csv"], "csv takes one table at a time, got 2"),
        (["table2", "--model", "lama7b"], "unknown model 'lama7b' (did you mean 'llama7b'?); valid: falcon_7b"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(arguments, message, tmp_path, capsys):
    said = printed(capsys, *arguments, "--results", tmp_path, code=2)
    assert said.out == "" and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["table1", "--format", "html"], "'html' (choose from"), (["table1", "--modle", "x"], "--modle")],
)
def test_wrong_options_are_one_line_too(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert f"there is no folder {tmp_path / 'x'}" in printed(capsys, "table1", "--results", tmp_path / "x", code=2).err


def test_the_list_names_every_table_and_the_sweep_that_fills_it(capsys):
    out = printed(capsys, "--list").out
    for name in TABLES:
        assert re.search(rf"^{name} +\S", out, re.M) and f"-m paper={name}" in out


@pytest.mark.parametrize("name", list(TABLES))
def test_the_sweep_of_a_table_runs_its_rows_on_its_model_and_tasks(name, monkeypatch):
    """Each row of the paper is among the runs; methods that do not exist yet are taken for granted."""
    needed = {row.method for row in paper_rows(name)} | {"mha", "chai"}
    monkeypatch.setattr("experiments.sweeps.expand.choices", lambda _: [*needed, "chai_static", "chai_qkv", "dejavu",
                                                                   "spatten", "static", "random"])  # fmt: skip
    found = read_table(REPOSITORY / "conf" / "paper" / f"{name}.yaml", [])
    runs = [dict(override.split("=", 1) for override in line) for line in found]
    assert {run["model"] for run in runs} == {TABLES[name].model}
    tasks = TABLES[name].whole or ",".join(TABLES[name].tasks)
    assert {run["task"] for run in runs} == {tasks}
    assert needed <= {method for run in runs for method in run["method"].split(",")}
    wanted = {str(row.settings["sparsity"]) for row in paper_rows(name) if row.settings}
    given = {value for run in runs for value in run.get("method.sparsity", "").split(",") if value}
    assert wanted <= given


def test_runs_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "analysis.tables", "table4", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CHAI-QKV" in done.stdout and done.stderr == ""


def test_spatten_of_earlier_versions_pruned_per_row(tmp_path):
    """It is told apart from today's default, and its operations, those of another algorithm, are not used."""
    operations = {"flops": {"tokens": 2048, "method": 1, "mha": 2}}
    earlier = scored.EARLIER_SPATTEN
    scored.save(tmp_path, "spatten", "micro_piqa", scored.outcomes(150), earlier, result=operations)
    scored.save(tmp_path, "spatten", "micro_piqa", scored.outcomes(160), result=operations)
    old, new = sorted(load_scores(Results(tmp_path)), key=lambda score: score.value)
    assert old.settings == {"pruning": "per_row", **earlier} and new.settings == {"pruning": "global"}
    assert "flops" not in old.run.result and new.run.result["flops"] == operations["flops"]
    assert row_name("spatten", unusual(old)).startswith("SpAtten pruning=per_row heads=0.75 tokens=0.5")
    assert row_name("spatten", unusual(new)) == "SpAtten"
