"""Sweeps on a real Slurm: the same numbers as here, and nothing lost or done twice whatever becomes of the jobs.

Slurm's shortest limit is a minute, and it looks for jobs beyond theirs every half minute. So a time-out is made by
moving the end of a running job (``scontrol update EndTime=``), which is then a limit like any other: the job gets the
signal before it, and is queued again. The end is as far away as the delay of the signal and half a minute together, or
Slurm would look too late for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from experiments.config.schema import REPOSITORY
from experiments.status import collect_rows, main
from tests.slurm.cluster import Cluster, ClusterError

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

METHODS = ("mha", "chai", "random", "static")
TASKS = ("micro_piqa", "micro_boolq")
SWEEP = [f"method={','.join(METHODS)}", f"task={','.join(TASKS)}", "limit=6", "device=cpu"]
PATIENCE = 900.0  # seconds; only a test that fails takes that long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(cores=8)
    try:
        cluster.start()
    except ClusterError as error:
        pytest.skip(f"needs a real Slurm: {error}")
    yield cluster
    cluster.stop()


@pytest.fixture
def hold(tmp_path, cluster, monkeypatch) -> Path:
    """The folder whose files hold runs; Slurm's commands and jobs find the cluster and the hook."""
    folder = tmp_path / "hold"
    folder.mkdir()
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    monkeypatch.setenv("CHAI_TEST_HOLD", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "hold"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def start(results: Path, *overrides: str, launcher: str = "slurm") -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "run.py"), "-m", f"results_dir={results}", f"hydra/launcher={launcher}"]
    own = ["hydra.launcher.poll_s=0.5", "hydra.launcher.signal_delay_s=15"] if launcher == "slurm" else []
    return subprocess.Popen(
        [*command, *own, *overrides], cwd=results.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def states(results: Path) -> dict[str, tuple[str, str]]:
    """``method-task`` of each run that was asked for, and the state that the status command tells of it."""
    rows = collect_rows(results)
    return {f"{row.parts['method']}-{row.parts['task']}": (row.state.state, row.state.reason) for row in rows}


def wait(results: Path, ready: Callable[[dict[str, tuple[str, str]]], bool]) -> dict[str, tuple[str, str]]:
    end = time.monotonic() + PATIENCE
    while not ready(found := states(results)):
        assert time.monotonic() < end, found
        time.sleep(0.5)
    return found


def results_of(results: Path) -> dict[str, dict]:
    return {
        "/".join(path.parts[-5:-1]): json.loads(path.read_text())
        for path in results.glob("accuracy/*/*/*/*/result.json")
    }


def numbers(result: dict) -> dict:
    return {key: result[key] for key in ("metrics", "stderr", "n", "savings", "flops", "seed", "run_id", "settings_id")}


def job_of(results: Path, name: str) -> str:
    (row,) = (row for row in collect_rows(results) if f"{row.parts['method']}-{row.parts['task']}" == name)
    return str(row.job.slurm_id)


def test_a_sweep_equals_the_same_sweep_run_here(tmp_path, cluster, hold):
    queued = start(tmp_path / "slurm", *SWEEP, "hydra.launcher.array_parallelism=3")
    told = queued.communicate()[0]
    assert queued.returncode == 0, told
    assert told.count("] done: ") == 8
    here = start(tmp_path / "here", *SWEEP, launcher="basic")
    assert here.wait() == 0
    ours, theirs = results_of(tmp_path / "slurm"), results_of(tmp_path / "here")
    assert set(ours) == set(theirs) and len(ours) == 8
    for name, result in ours.items():
        assert numbers(result) == numbers(theirs[name])
        samples = [
            pd.read_parquet(tmp_path / side / "accuracy" / name / "samples.parquet") for side in ("slurm", "here")
        ]
        pd.testing.assert_frame_equal(*samples, check_exact=True)


def test_killed_cancelled_timed_out_and_full_runs_are_told_and_done_by_the_same_command(
    tmp_path, cluster, hold, capsys
):
    results = tmp_path / "results"
    killed = [f"{method}-micro_piqa" for method in METHODS]
    cancelled, timed_out, full = "chai-micro_boolq", "random-micro_boolq", "static-micro_boolq"
    for name in (*killed, cancelled, timed_out):
        (hold / name).touch()
    disk = results / "accuracy" / "tiny" / "static" / "micro_boolq"
    disk.mkdir(parents=True)
    # Room for a status and a configuration, a page each, but not for a result.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", disk], check=True)
    try:
        client = start(results, *SWEEP)
        found = wait(
            results,
            lambda now: (
                [state for state, _ in now.values()].count("running") == 6
                and sum(state in ("done", "failed") for state, _ in now.values()) == 2
            ),
        )
        assert {name for name, (state, _) in found.items() if state == "running"} == {*killed, cancelled, timed_out}
        assert found[full][0] == "failed" and "No space left on device" in found[full][1]
        jobs = {name: job_of(results, name) for name in (cancelled, timed_out)}

        for name in killed:
            os.kill(int((hold / f"{name}.held").read_text()), signal.SIGKILL)
        cluster.run("scancel", jobs[cancelled])
        assert cluster.run("scontrol", "update", f"JobId={jobs[timed_out]}", "EndTime=now+45").returncode == 0
        found = wait(
            results, lambda now: all(now[name][0] == "died" for name in killed) and now[cancelled][0] == "failed"
        )
        assert all("killed by SIGKILL" in found[name][1] for name in killed)
        assert found[cancelled][1] == "interrupted by SIGTERM"
        found = wait(results, lambda now: now[timed_out][0] == "queued")
        assert "interrupted by SIGUSR2" in found[timed_out][1]
        (hold / timed_out).unlink()
        told = client.communicate()[0]
        assert client.returncode == 1, told
        assert [told.count(f"] {state}: ") for state in ("done", "died", "failed")] == [2, 4, 2]
        assert states(results)[timed_out][0] == "done"

        before = {path: path.stat().st_mtime_ns for path in results.glob("accuracy/*/*/*/*/result.json")}
        assert len(before) == 2
        assert main([f"results_dir={results}", "--failed", "--rerun"]) == 0
        assert capsys.readouterr().out.count("run.py") == 6
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        for mark in hold.iterdir():
            mark.unlink()
        again = start(results, *SWEEP)
        told = again.communicate()[0]
        assert again.returncode == 0, told
        assert told.count("] done: ") == 6
        assert {state for state, _ in states(results).values()} == {"done"} and len(states(results)) == 8
        assert all(path.stat().st_mtime_ns == then for path, then in before.items())
        nothing = start(results, *SWEEP)
        assert nothing.wait() == 0 and cluster.run("squeue", "-h").stdout == ""
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failing_configuration_hides_none_of_the_others(tmp_path, cluster, hold):
    counts = "1,99,2,3"
    client = start(
        tmp_path / "results", "method=random", f"method.clusters={counts}", "task=micro_piqa", "limit=2", "device=cpu"
    )
    told = client.communicate()[0]
    assert client.returncode == 1, told
    assert told.count("] done: ") == 3
    (row,) = (row for row in collect_rows(tmp_path / "results") if row.state.state != "done")
    told = "method: clusters: 99 clusters in a layer of 16 heads; valid: 1 to 16"
    assert (row.state.state, row.state.reason) == ("failed", told)


def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path, cluster, hold):
    results, name = tmp_path / "results", "mha-micro_piqa"
    (hold / name).touch()
    client = start(results, "method=mha", "task=micro_piqa", "limit=6", "device=cpu")
    wait(results, lambda now: now.get(name, ("", ""))[0] == "running" and (hold / f"{name}.held").exists())
    higher = cluster.run(
        "sbatch", "--partition=high", f"--cpus-per-task={cluster.cores}", "--output=/dev/null", "--wrap=sleep 3"
    )
    assert higher.returncode == 0, higher.stderr
    found = wait(results, lambda now: now[name][0] == "queued")
    assert "interrupted by SIGTERM" in found[name][1]
    (hold / name).unlink()
    told = client.communicate()[0]
    assert client.returncode == 0, told


def test_jobs_outlive_their_client_and_are_not_submitted_twice(tmp_path, cluster, hold):
    results, name = tmp_path / "results", "mha-micro_piqa"
    (hold / name).touch()
    arguments = ("method=mha", "task=micro_piqa", "limit=6", "device=cpu")
    client = start(results, *arguments)
    wait(results, lambda now: now.get(name, ("", ""))[0] == "running")
    client.send_signal(signal.SIGINT)
    told = client.communicate()[0]
    assert client.returncode == 130 and "the jobs continue; to watch: python -m experiments.status" in told
    assert states(results)[name][0] == "running"
    again = start(results, *arguments)
    while not (line := again.stdout.readline()).startswith("already queued, as job"):
        assert line
    (hold / name).unlink()
    told = again.communicate()[0]
    assert again.returncode == 0, told
    assert len(list(results.glob("sweeps/*/slurm/*_submitted.pkl"))) == 1
