"""Sweeps without a cluster: what is planned and recorded, what would be submitted, and local processes that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.runs.code import current_code, snapshot
from experiments.runs.files import read_json, write_json
from experiments.runs.folder import RunFolder
from experiments.runs.resolve import run_folders
from experiments.sweeps import local
from experiments.sweeps.job import record_death, record_outcome, split_forced
from experiments.sweeps.launch import launch
from experiments.sweeps.monitor import monitor_runs
from experiments.sweeps.plan import plan_jobs
from experiments.sweeps.record import Job, Sweep, read_sweeps


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Commands that pretend to be Slurm's: what is submitted stays in this folder."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    commands = {
        "sbatch": f'n=$(ls {folder}/*.sh 2>/dev/null | wc -l); cp "$1" {folder}/$n.sh; echo "Submitted batch job 7$n"',
        "srun": "exit 1",
        "squeue": "for i in 0 1 2; do for n in 0 1 2; do echo 7${n}_$i FAILED; done; done",
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


def finish(overrides: list[str]) -> Path:
    """A run that is done."""
    (folder,) = run_folders(compose_config(overrides))
    folder.start()
    folder.finish({"metric": "acc", "metrics": {"acc": 0.5}})
    folder.release()
    return folder.path


def test_each_run_is_planned_once(tmp_path):
    sweeps = [
        ["method=mha,chai", "task=micro_piqa", f"results_dir={tmp_path}"],
        ["method=chai", "task=micro_piqa,micro"],
    ]
    sweeps[1].append(sweeps[0][-1])
    planned = plan_jobs(sweeps)
    assert [one.job.overrides[:2] for one in planned] == [
        ["method=mha", "task=micro_piqa"],
        ["method=chai", "task=micro_piqa"],
        ["method=chai", "task=micro"],
    ]
    assert len(planned[2].job.runs) == 5 and planned[1].job.runs[0] in planned[2].job.runs
    with pytest.raises(ConfigError, match="results_dir cannot be a sweep"):
        plan_jobs([[f"results_dir={tmp_path / 'a'},{tmp_path / 'b'}"]])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=latency", "task.data_dir=/data"], "latency/tiny/chai/none"),
        (["experiment=profile"], "profile/tiny/none/micro"),
        (["experiment=train_dejavu"], "train_dejavu/tiny/dejavu/none"),
        (["experiment=pretrain_tiny"], "pretrain_tiny/tiny/chai/micro"),
        (["task=micro_boolq"], "accuracy/tiny/chai/micro_boolq"),
    ],
)
def test_folders_are_known_before_the_work(tmp_path, overrides, expected):
    (folder,) = run_folders(compose_config([*overrides, f"results_dir={tmp_path}"]))
    assert folder.path.parent == tmp_path / expected


def test_what_slurm_is_asked_for(tmp_path, slurm):
    arguments = ["-m", "hydra/launcher=slurm", "model=llama7b,llama33b,opt66b", "method=mha", "task=piqa,boolq"]
    settings = ["hydra.launcher.partition=gpu", "+hydra.launcher.additional_parameters.constraint=a100"]
    assert main([*arguments, *settings, "hydra.launcher.poll_s=0.1"]) == 1
    scripts = [path.read_text() for path in sorted(slurm.glob("?.sh"))]
    for text, (gpus, cores, memory, limit) in zip(
        scripts, [(1, 8, 48, 240), (4, 16, 160, 480), (8, 32, 320, 720)], strict=True
    ):
        lines = set(text.splitlines())
        assert {
            f"#SBATCH --gpus-per-node={gpus}",
            f"#SBATCH --cpus-per-task={cores}",
            f"#SBATCH --mem={memory * 1024}M",
            f"#SBATCH --time={limit}",
            "#SBATCH --array=0-1%2",
            "#SBATCH --signal=USR2@120",
            "#SBATCH --requeue",
            "#SBATCH --partition=gpu",
            "#SBATCH --constraint=a100",
        } <= lines
        assert f"--cpus-per-task={cores} {sys.executable}" in text  # the step's own
    (sweep,) = read_sweeps(tmp_path / "results")
    assert [job.slurm_id for job in sweep.jobs] == ["70_0", "70_1", "71_0", "71_1", "72_0", "72_1"]
    assert (sweep.path / "code" / "run.py").exists() and sweep.code["digest"] == current_code().digest


def test_a_tiny_job_has_no_gpus_and_time_to_save(tmp_path, slurm):
    arguments = ["-m", "hydra/launcher=slurm", "method=mha", "task=micro_piqa", "hydra.launcher.timeout_min=1"]
    assert main([*arguments, "hydra.launcher.poll_s=0.1"]) == 1
    text = (slurm / "0.sh").read_text()
    assert "--gpus" not in text and "#SBATCH --signal=USR2@15" in text


def test_what_is_done_is_not_submitted(tmp_path, slurm):
    finish(["method=mha", "task=micro_piqa"])
    arguments = ["-m", "hydra/launcher=slurm", "hydra.launcher.poll_s=0.1", "task=micro_piqa"]
    assert main([*arguments, "method=mha"]) == 0
    assert not list(slurm.glob("?.sh"))
    assert main([*arguments, "method=mha,chai,random"]) == 1
    assert "#SBATCH --array=0-1%2" in (slurm / "0.sh").read_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("timeout_min=0", "timeout_min is 0; valid: 1 or more"),
        ("timeout_min=x", "hydra.launcher.timeout_min is 'x'; expected int"),
        ("signal_delay_s=900", "signal_delay_s is 900; valid: between 0 and the limit, 900 s"),
    ],
)
def test_wrong_settings_are_refused(slurm, capsys, setting, message):
    assert main(["-m", "hydra/launcher=slurm", f"hydra.launcher.{setting}"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("results").exists()


def test_no_slurm_and_a_refusal_are_one_line_each(slurm, monkeypatch, capsys):
    (slurm / "sbatch").write_text('#!/bin/sh\necho "sbatch: error: invalid partition specified: no" >&2; exit 1\n')
    assert main(["-m", "hydra/launcher=slurm", "method=mha"]) == 2
    assert capsys.readouterr().err == "error: Slurm refuses the jobs: sbatch: error: invalid partition specified: no\n"
    assert not list(Path("results/sweeps").iterdir())
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["-m", "hydra/launcher=slurm", "method=mha"]) == 2
    told = capsys.readouterr().err
    assert "sbatch is not available" in told and len(told.splitlines()) == 1


def test_a_snapshot_is_the_code_at_launch(tmp_path):
    code = snapshot(tmp_path / "code")
    assert (tmp_path / "code" / "conf" / "config.yaml").exists() and not (tmp_path / "code" / "tests").exists()
    ask = (
        "from experiments.runs.code import current_code; from experiments.config.compose import compose_config as c; "
        "from experiments.runs.resolve import run_folders as r; "
        "print(current_code().digest, *(f.path for f in r(c([]))))"
    )
    told = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path / "code", capture_output=True, text=True, check=True, timeout=100
    ).stdout.split()
    assert told == [code.digest, *(str(folder.path) for folder in run_folders(compose_config([])))]


def test_force_holds_once(tmp_path):
    config = compose_config(["task=micro", "force=true", f"results_dir={tmp_path}"])
    folders = run_folders(config)
    assert [part.force for part in split_forced(config, folders, launched=0.0)] == [True]
    folders[1].start()
    begun, rest = split_forced(config, folders, launched=0.0)
    assert (begun.force, list(begun.task.members)) == (False, ["micro_hellaswag"])
    assert (rest.force, len(rest.task.members)) == (True, 4)
    assert [folder.path for folder in run_folders(begun)] == [folders[1].path]


class Fake:
    """Jobs that finish, fail or die at once, in place of a run's process."""

    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(local, "start_job", self.start)

    def start(self, sweep: Sweep, index: int, environment: dict[str, str], **more: object) -> subprocess.Popen[bytes]:
        (method,) = (word for word in sweep.jobs[index].overrides if word.startswith("method="))
        if method == "method=chai":
            code = f"import os, signal; os.kill(os.getpid(), {int(signal.SIGKILL)})"
        else:
            finish([word for word in sweep.jobs[index].overrides if not word.startswith("hydra")])
            record_outcome(sweep, index, 0, None)
            code = "pass"
        return subprocess.Popen([sys.executable, "-S", "-c", code], **more)  # type: ignore[call-overload]


def test_a_killed_process_stops_no_other(tmp_path, monkeypatch, capsys):
    Fake(monkeypatch)
    monkeypatch.chdir(tmp_path)
    overrides = ["method=mha,chai,random", "task=micro_piqa", "hydra/launcher=local", "hydra.launcher.jobs=2"]
    assert launch([overrides]) == 1
    told = capsys.readouterr().out
    assert told.count("] done: ") == 2
    assert "missing: accuracy/tiny/chai/micro_piqa/" in told or "failed: accuracy/tiny/chai/micro_piqa/" in told
    assert "killed by SIGKILL; out of memory?" in told


def test_cores_and_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def shares(*arguments):
        return [(one["OMP_NUM_THREADS"], one.get("CUDA_VISIBLE_DEVICES")) for one in local.divide_machine(*arguments)]

    assert shares(None, [], 0) == [("4", None)] * 4
    assert shares(None, ["0", "1", "2", "3"], 2) == [("8", "0,1"), ("8", "2,3")]
    assert shares(3, ["0", "1"], 1) == [("5", None)] * 3  # not enough for one each: all see all
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert local.visible_gpus() == ["2", "5"]


def test_a_job_from_a_snapshot_leaves_its_outcome(tmp_path, monkeypatch, capfd):
    """The whole way once: processes from the snapshot, relative paths from where it was launched."""
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", "hydra/launcher=local", "task=micro_piqa", "limit=2", "device=cpu"]
    assert main([*arguments, "method=random", "method.clusters=4,99"]) == 1
    shown = capfd.readouterr().out
    assert "] done: accuracy/tiny/random/micro_piqa/" in shown
    assert "(method: clusters: 99 clusters in a layer of 16 heads; valid: 1 to 16)" in shown
    (result,) = (tmp_path / "results").glob("accuracy/tiny/random/micro_piqa/*/result.json")
    assert json.loads(result.read_text())["versions"]["code"] == str(current_code())


def test_a_process_that_says_why_keeps_the_word(tmp_path):
    sweep = Sweep(tmp_path / "results" / "sweeps" / "now", "local", [Job([], [])])
    sweep.write()
    record_outcome(sweep, 0, 2, "wrong", started=5.0)
    record_death(sweep, 0, 2, started=5.0)
    assert (read_json(sweep.outcome_path(0)) or {})["error"] == "wrong"


def test_a_run_that_is_done_twice_keeps_one_folder(tmp_path):
    config = compose_config(["model=tiny", "task=micro_piqa", f"results_dir={tmp_path}"])
    moved = compose_config(["model=tiny", "task=micro_piqa", f"results_dir={tmp_path}", "model.resources.gpus=2"])
    assert RunFolder(config).path == RunFolder(moved).path


def write_done(folder: Path, **fields) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "status.json", {"state": "done", **fields})
    write_json(folder / "result.json", {})


UPLOAD = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
Path(sys.argv[1], "begun").touch()
time.sleep(2)
Path(sys.argv[1], "uploaded").touch()
"""


def test_a_job_may_upload_after_its_runs_are_done(tmp_path, monkeypatch):
    """The launcher waits for a process whose results are complete, instead of interrupting it."""
    run = tmp_path / "accuracy/m/mha/t/abc"
    sweep = Sweep(tmp_path / "sweeps" / "s", "local", [Job(["x"], [str(run.relative_to(tmp_path))])])
    sweep.write()
    write_done(run, started=1.0, updated=2.0)

    def start(sweep, index, environment, **options):
        return subprocess.Popen([sys.executable, "-c", UPLOAD, str(run)], **options)

    monkeypatch.setattr(local, "start_job", start)
    launcher = local.LocalLauncher.__new__(local.LocalLauncher)
    launcher.slots, launcher.running = [{"OMP_NUM_THREADS": "1"}], {}
    assert launcher.run(sweep, [0]) == 0
    assert (run / "uploaded").exists()


def test_a_forced_job_that_dies_at_once_is_not_done(tmp_path, capsys):
    """The result of an earlier sweep does not count for it."""
    name = "accuracy/m/mha/t/abc"
    write_done(tmp_path / name, started=1.0, updated=2.0)
    sweep = Sweep(tmp_path / "sweeps" / "s", "local", [Job(["x"], [name], force=True)])
    sweep.write()
    (sweep.path / "jobs").mkdir()
    write_json(sweep.path / "jobs" / "0.json", {"code": 1, "error": "killed by SIGKILL", "ended": time.time()})
    assert monitor_runs(sweep, [0], dict) == 1
    assert "not run again" in " ".join(capsys.readouterr().out.split())
