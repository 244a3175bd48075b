"""``paper=NAME``: which sweeps it stands for, what is refused, and that one failing sweep hides no other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from experiments import cli
from experiments.config.compose import choices
from experiments.config.schema import CONF, REPOSITORY, ConfigError
from experiments.config.validate import check_overrides
from experiments.sweeps import expand as paper
from experiments.sweeps.expand import expand, read_table

FILES = sorted((CONF / "paper").glob("*.yaml"))


@pytest.fixture
def table(tmp_path):
    """A table of methods that are there."""

    def write(*lines, model="tiny", task="micro"):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({"model": model, "task": task, "sweeps": list(lines)}))
        return path

    return write


def lines_of(content):
    """All sweeps of a file, of every reading."""
    return [*content["sweeps"], *(line for lines in content.get("readings", {}).values() for line in lines)]


def test_readings_of_the_numbers_of_heads_are_a_setting():
    def counts(*arguments):
        sweeps = expand(["paper=figure1", *arguments], multirun=True)
        words = (word for sweep in sweeps for word in sweep if word.startswith("method.clusters="))
        return list(dict.fromkeys(words))  # static and random have a sweep each

    kept, combined = "method.clusters=4,8,16,24", "method.clusters=29,25,17,9"
    assert counts() == counts("reading=both") == [kept, combined]
    assert counts("reading=kept") == [kept] and counts("reading=combined") == [combined]
    assert [32 - int(k) + 1 for k in combined.partition("=")[2].split(",")] == [4, 8, 16, 24]
    with pytest.raises(ConfigError, match=r"unknown reading 'keep' \(did you mean 'kept'\?\)"):
        counts("reading=keep")
    with pytest.raises(ConfigError, match="reading=kept: paper=table2 has no readings"):
        expand(["paper=table2", "reading=kept"], multirun=True)


def test_each_line_is_a_sweep_on_the_tables_model_and_tasks(table):
    path = table("method=mha,chai", "method=random method.clusters=2,4")
    assert read_table(path, ["limit=5"]) == [
        ["method=mha,chai", "model=tiny", "task=micro", "limit=5"],
        ["method=random", "method.clusters=2,4", "model=tiny", "task=micro", "limit=5"],
    ]
    for overrides in read_table(path, ["limit=5", "hydra.verbose=false"]):
        check_overrides(overrides, multirun=True)


def test_model_and_task_given_take_the_place_of_the_tables(table):
    assert read_table(table("method=mha"), ["task=micro_piqa", "model=llama7b", "model.dtype=bfloat16"]) == [
        ["method=mha", "task=micro_piqa", "model=llama7b", "model.dtype=bfloat16"]
    ]


def test_hyper_parameters_go_to_the_methods_that_have_them(table):
    path = table("method=mha,random,chai", "method=random method.clusters=2")
    common = ["model=tiny", "task=micro"]
    assert read_table(path, ["method.clusters=4"]) == [
        ["method=mha", *common],
        ["method=random,chai", "method.clusters=4", *common],
        ["method=random", "method.clusters=2", *common],
    ]
    assert read_table(path, ["method.clusters=4", "method.tokens=6"])[:3] == [
        ["method=mha", *common],
        ["method=random", "method.clusters=4", *common],
        ["method=chai", "method.clusters=4", "method.tokens=6", *common],
    ]
    assert read_table(table("method=mha,chai,spatten"), ["method.keep_ratio=0.3", "method.tokens=6"]) == [
        ["method=mha", *common],
        ["method=chai", "method.tokens=6", *common],
        ["method=spatten", "method.tokens=0.3", "method.tokens=6", *common],
    ]
    assert read_table(table("method=mha,chai_qkv"), ["method.tokens=6"])[1] == [
        "method=chai_qkv",
        "method.tokens=6",
        *common,
    ]  # a key that its file inherits
    with pytest.raises(ConfigError, match="method.tokns=6: no method of paper=own has such a key to set"):
        read_table(path, ["method.tokns=6"])


def test_a_method_that_is_not_there_is_named(table):
    with pytest.raises(ConfigError, match="paper=own: unknown method 'nosuch'; valid: chai, "):
        read_table(table("method=mha", "method=nosuch method.x=1"), [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["paper=tabel2"], "unknown paper 'tabel2' (did you mean 'table2'?); valid: embedded, figure1, micro, table1"),
        (["paper=table1,table2"], "unknown paper 'table1,table2'"),
        (["paper=table1", "paper=table2"], "cannot read paper=table1 paper=table2; expected one paper=NAME"),
        (["+paper=table1"], "cannot read +paper=table1; expected one paper=NAME"),
        (["~paper"], "cannot read ~paper; expected one paper=NAME"),
        (
            ["paper=table1", "method=mha"],
            "method= cannot be combined with paper=table1, which lists its methods itself",
        ),
    ],
)
def test_mistakes_are_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        expand(overrides, multirun=True)
    assert message in str(error.value)


def test_without_m_one_line_says_so():
    with pytest.raises(ConfigError, match="^paper=micro is a sweep: add -m$"):
        expand(["paper=micro"], multirun=False)


def test_a_line_without_paper_is_left_alone():
    assert expand(["method=mha", "task=paper"], multirun=False) == [["method=mha", "task=paper"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_names_what_there_is(path):
    content = yaml.safe_load(path.read_text())
    assert set(content) - {"reading", "readings"} == {"model", "task", "sweeps"}
    assert content["model"] in choices("model")
    assert set(content["task"].split(",")) <= set(choices("task"))
    for line in lines_of(content):
        assert line.startswith("method=")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_of_a_method_that_is_there_is_valid(path, table):
    """Its keys and values are the method's."""
    there = choices("method")
    content = yaml.safe_load(path.read_text())
    lines = []
    for line in lines_of(content):
        methods, _, rest = line.removeprefix("method=").partition(" ")
        lines += [f"method={method} {rest}" for method in methods.split(",") if method in there]
    unpublished = ["method.clusters=4"] if content["model"] == "opt66b" else []
    own = read_table(table(*lines, model=content["model"], task=content["task"]), unpublished)
    assert len(own) >= 2
    for overrides in own:
        check_overrides(overrides, multirun=True)


def test_help_and_refusal_through_the_command_line(capsys):
    from experiments.cli import main

    assert main(["--help"]) == 0
    assert "paper=table2" in (shown := capsys.readouterr().out) and "table1, table2, table3, table4" in shown
    assert main(["paper=micro"]) == 2
    assert capsys.readouterr().err == "error: paper=micro is a sweep: add -m\n"


def test_one_failing_sweep_hides_no_other(tmp_path, table, monkeypatch, capfd):
    """The first sweep can't run (counts beyond the heads), the others do; the exit code tells."""
    path = table(
        "method=random method.clusters=99", "method=mha", "method=random method.clusters=2,4", task="micro_piqa"
    )
    monkeypatch.setattr(cli, "expand", lambda overrides, multirun: paper.read_table(path, overrides))
    results = tmp_path / "results"
    assert cli.main(["-m", f"results_dir={results}", "limit=2", "device=cpu"]) == 2
    errors = capfd.readouterr().err
    assert "error: method: " in errors and "Traceback" not in errors
    states = {
        f"{status.parts[-4]}": json.loads(status.read_text())["state"]
        for status in results.glob("accuracy/tiny/*/micro_piqa/*/status.json")
    }
    assert states == {"mha": "done", "random": "done"}
    assert len(list(results.glob("accuracy/tiny/random/micro_piqa/*/result.json"))) == 2


def test_a_table_needs_no_heavy_imports():
    code = (
        "import sys; from experiments.cli import main; assert main(['-m', 'paper=nosuch']) == 2; "
        "heavy = {'torch', 'transformers', 'lm_eval', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert paper.GROUP in done.stderr
