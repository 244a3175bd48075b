"""``python -m experiments.status``: the truth about every run, from what is on disk."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from experiments.config.compose import compose_config
from experiments.config.schema import REPOSITORY
from experiments.runs.files import write_json
from experiments.runs.folder import RunFolder
from experiments.runs.state import run_state
from experiments.status import collect_rows, format_duration, main, select_rows
from experiments.sweeps.job import record_outcome
from experiments.sweeps.record import Job, Sweep

METHODS = ("mha", "chai", "random", "static", "spatten")


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, RunFolder]:
    """A sweep of five: done, running at 25 of 100, killed, failed, never begun."""
    monkeypatch.chdir(tmp_path)
    found, jobs = {}, []
    config = compose_config(["task=micro_piqa"])
    for method in METHODS:
        overrides = [f"method={method}", "task=micro_piqa"]
        config.method.name = method
        folder = RunFolder(config.copy())
        found[method] = folder
        jobs.append(Job(overrides, [str(folder.path.relative_to("results"))]))
    sweep = Sweep(tmp_path / "results" / "sweeps" / "now", "local", jobs, pid=0)
    sweep.write()
    for method in METHODS[:4]:
        found[method].start()
    found["mha"].finish({"metrics": {}})
    found["static"].fail("No space left on device")
    for method in ("mha", "random", "static"):
        found[method].release()
    record_outcome(sweep, 2, -9, "killed by SIGKILL; out of memory?")
    status = found["chai"].path / "status.json"
    write_json(status, {"state": "running", "started": time.time() - 30, "progress": {"done": 25, "total": 100}})
    return found


def test_every_state_is_told(folders, tmp_path, capsys):
    rows = {row.parts["method"]: row.state for row in collect_rows(tmp_path / "results")}
    assert {method: (state.state, state.reason) for method, state in rows.items()} == {
        "mha": ("done", ""),
        "chai": ("running", ""),
        "random": ("died", "killed by SIGKILL; out of memory?"),
        "static": ("failed", "No space left on device"),
        "spatten": ("missing", ""),
    }
    assert main([]) == 0
    told = capsys.readouterr().out
    assert "25 of 100 (25 %)" in told and "No space left on device" in told
    assert "5 runs: 1 done, 1 running, 1 died, 1 failed, 1 missing." in told
    assert "--rerun prints the commands for the 3 that have ended unfinished" in told
    folders["chai"].release()


def test_a_run_whose_lock_is_gone_has_died(folders):
    assert run_state(folders["chai"].path).state == "running"
    folders["chai"].release()
    assert run_state(folders["chai"].path).state == "died"


def test_a_run_that_no_sweep_asked_for_is_told_as_well(folders, capsys):
    config = compose_config(["task=micro_boolq"])
    folder = RunFolder(config)
    folder.start()
    folder.fail("out of memory")
    folder.release()
    assert main(["task=micro_boolq"]) == 0
    told = capsys.readouterr().out
    assert folder.id in told and "out of memory" in told and "1 runs: 1 failed." in told
    assert main(["task=micro_boolq", "--failed", "--rerun"]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "was started without a sweep: rerun its command" in told.err
    assert main(["sweep=last"]) == 0
    assert folder.id not in capsys.readouterr().out


def test_filters_and_commands(folders, capsys):
    assert main(["method=static,mha", "state=failed"]) == 0
    told = capsys.readouterr().out
    assert "1 runs: 1 failed." in told
    assert main(["--failed", "--rerun"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(
        line.endswith(f"-m method={m} task=micro_piqa") for line, m in zip(lines, ("random", "static"), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methd=chai"], "unknown filter 'methd' (did you mean 'method'?); valid: experiment, model"),
        (["state=broken"], "unknown state 'broken'; valid: done, running"),
        (["chai"], "cannot read chai; expected KEY=NAME"),
        (["--launch"], "--launch goes with --rerun"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("job", "begun", "expected"),
    [
        ("PENDING", False, ("queued", "")),
        ("RUNNING", False, ("queued", "starting")),
        ("CANCELLED", False, ("missing", "Slurm: CANCELLED")),
        ("PENDING", True, ("queued", "will resume")),
        ("TIMEOUT", True, ("died", "Slurm: TIMEOUT")),
    ],
)
def test_slurms_word_counts_where_the_run_has_none(folders, job, begun, expected):
    folders["chai"].release()
    state = run_state(folders["chai" if begun else "spatten"].path, None, job)
    assert (state.state, state.reason) == expected


def test_an_earlier_failure_gives_way_to_the_last_attempts_reason(folders):
    outcome = {"code": 2, "error": "method: no", "started": 1e12}
    assert run_state(folders["static"].path, outcome).reason == "method: no"


def test_durations():
    assert [format_duration(seconds) for seconds in (42, 720, 11100, None)] == ["42 s", "12 min", "3 h 05 min", ""]


def test_it_needs_no_heavy_imports(tmp_path):
    code = (
        "import sys; from experiments.status import main; assert main([]) == 0; "
        "heavy = {'torch', 'transformers', 'lm_eval', 'pandas', 'submitit'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "no run in results matches" in done.stdout


def test_the_last_sweep_is_the_last_even_if_a_job_of_it_was_complete(tmp_path):
    done, new = "accuracy/m/mha/t/a", "accuracy/m/chai/t/b"
    Sweep(tmp_path / "sweeps" / "1", "slurm", [Job(["x"], [done], slurm_id="1")], created=1.0).write()
    Sweep(
        tmp_path / "sweeps" / "2", "slurm", [Job(["y"], [new], slurm_id="2"), Job(["x"], [done])], created=2.0
    ).write()
    rows = select_rows(tmp_path, {"sweep": ["last"]}, failed=False)
    assert [row.name for row in rows] == [new]
