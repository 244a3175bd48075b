"""Every command that the README and the documentation show is run, at a small size (tests/docs/walk.py)."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from tests.docs.coverage import ELSEWHERE, elsewhere
from tests.docs.pages import PAGES, REPOSITORY, TABLES, commands, split
from tests.docs.walk import walk


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_compiled_kmeans")
def test_the_commands_of_the_tables_run(tmp_path, record_property):
    """One test, for its process pays the imports once; tests/docs/test_examples.py walks the other pages."""
    done = walk(TABLES, tmp_path)
    for name, value in done.properties():
        record_property(name, value)
    assert not done.failed, "\n\n".join(done.failed)
    assert len(done.outcomes) > 40
    check_latency(
        done.project, only(done, "python run.py experiment=latency model=llama7b .* method.clusters=4").output
    )
    example = only(done, "python -c .*cache.nbytes.*")
    # The ratio that its comment states: the cache keeps the keys of 8 + 6 + 4 + 4 of 64 heads, and all values.
    ratio = (1 + 22 / 64) / 2
    assert f"# {ratio}" in example.command and f"\n{ratio}\n" in example.output


def only(done, pattern):
    """Return the outcome of the one command that matches a pattern."""
    (found,) = (one for one in done.outcomes if re.fullmatch(pattern, one.command, re.DOTALL))
    return found


def check_latency(project, shown):
    """The README's benchmark ends with its table: attention, a layer and the model, with the real vocabulary."""
    for part in ("attention", "layer", "model"):
        assert re.search(rf"^ {part} prefill ", shown, re.MULTILINE) and re.search(
            rf"^ {part} decode ", shown, re.MULTILINE
        )
    (path, *_) = project.glob("results/latency/llama7b-random/chai/none/*/measurements.parquet")
    rows = pd.read_parquet(path)
    assert set(rows.part) == {"attention", "layer", "model"} and (rows.ms > 0).all()
    assert "vocab_size: 32000" in (path.parent / "config.yaml").read_text()


FAILING = {
    "python run.py method=nosuch": "unknown method 'nosuch'",
    "python -m analysis.tables nosuch": "unknown table 'nosuch'",
    "python examples/nosuch.py": "No such file",
    "python run.py method.profile=FOLDER": "does not know what it stands for",
    "train-it --fast": "does not know how to run it",
    "make nosuch": "No rule to make target",
}


def test_a_command_that_fails_or_is_unknown_is_found(tmp_path):
    page = tmp_path / "page.md"
    lines = "\n".join(["python run.py --help    # runs", *FAILING, "python run.py --help"])
    page.write_text(f"# A page\n\n```\n{lines}\n```\n")
    done = walk([page], tmp_path)
    assert [one.command for one in done.outcomes if not one.code] == ["python run.py --help"]
    failed = {text.partition("\n")[0]: text for text in done.failed}
    assert failed.keys() == FAILING.keys()
    for command, reason in FAILING.items():
        assert reason in failed[command]


def test_what_is_covered_elsewhere_is_there():
    """Each file that the table names exists, each entry has a command, and each extra of the package is one."""
    asked = {command for page in PAGES for command in commands(page)}
    for pattern, where in ELSEWHERE.items():
        assert any(re.fullmatch(pattern, command) for command in asked), f"no page has {pattern}"
        for name in re.findall(r"tests/[\w/]+\.py|Makefile", where):
            assert (REPOSITORY / name).is_file(), name
    for command in filter(elsewhere, asked):
        for word in split(command):
            assert not word.startswith("tests/") or (REPOSITORY / word).is_file(), command
        extras = re.findall(r"\[(\w+)\]", command) if command.startswith("pip ") else []
        assert set(extras) <= set(re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE))


def test_commands_between_backticks_and_in_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `python -m analysis.tables table1|table2`, then\n`make\nreport`, not `python`; or\n"
        "`experiment=memory seed=1`.\n"
        "```bash\npython run.py \\\n  limit=1   # small\n```\n```console\n$ torchrun run.py\nits output\n```\n"
        "```yaml\nnot: a command\n```\n"
    )
    assert commands(page) == [
        "python run.py limit=1", "torchrun run.py",
        "python -m analysis.tables table1", "python -m analysis.tables table2",
        "make report", "python run.py experiment=memory seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["```shell\npython run.py\n```\n", "~~~\npython run.py\n~~~\n", "- x\n\n  ```\n  make\n  ```\n"]
)
def test_blocks_that_could_hide_commands_are_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=r"page\.md: "):
        commands(page)
