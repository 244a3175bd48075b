"""What ends a run early, and what is left of it: signals, locks, disks, memory, numbers that are none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.cli import main
from experiments.config.compose import compose_config
from experiments.config.schema import REPOSITORY
from experiments.evaluation.lm import MethodLM
from experiments.execute import run_config
from experiments.runs import files, locks
from experiments.runs import folder as runs
from experiments.runs.experiment import Outcome, mark_failed, run_lifecycle
from experiments.runs.files import read_json, write_atomically
from experiments.runs.folder import RunFolder
from experiments.runs.locks import RunLock, RunLocked, lock_owner, lock_path
from experiments.system import interrupts as signals

#: Runs the command line in a process that is killed at its n-th forward pass.
KILLED_AT_THE_NTH = """
import os, signal, sys
from experiments.cli import main
from experiments.evaluation.lm import MethodLM
left, call = [int(sys.argv[1])], MethodLM._model_call
def counted(self, *args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, *args, **kwargs)
MethodLM._model_call = counted
sys.exit(main(sys.argv[2:]))
"""
HOLD = "import sys, time; from pathlib import Path; from experiments.runs.locks import RunLock\n" \
    "lock = RunLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(600)"  # fmt: skip


def command(workplace, results, *overrides):
    return [
        f"results_dir={results}", f"model.path={workplace / 'small'}", f"task.data_dir={workplace / 'data'}",
        "task=micro_hellaswag", "batch_size=4", "method=mha", *overrides,
    ]  # fmt: skip


def a_folder(tmp_path, *overrides) -> RunFolder:
    return RunFolder(compose_config([f"results_dir={tmp_path}", "task=micro_piqa", *overrides]))


def status(folder) -> dict:
    found = read_json(folder.path / "status.json")
    assert found is not None
    return found


def errors_of(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]


def answered(folder) -> int:
    """Requests whose answers are saved."""
    lines = (folder / "answers.jsonl").read_text().splitlines()[1:]
    return sum(len(json.loads(line)["answers"]) for line in lines)


def signal_at(monkeypatch, number, nth) -> None:
    """Let this process send itself a signal at its n-th forward pass."""
    call, forwards = MethodLM._model_call, []

    def counted(self, *args, **kwargs):
        forwards.append(1)
        if len(forwards) == nth:
            os.kill(os.getpid(), number)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MethodLM, "_model_call", counted)


def test_a_killed_run_leaves_no_result_and_resumes(workplace, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THE_NTH, "7", *command(workplace, tmp_path)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    (folder,) = tmp_path.glob("accuracy/*/*/*/*")
    assert not (folder / "result.json").exists()
    assert read_json(folder / "status.json")["state"] == "running" and lock_owner(folder) is None
    saved = answered(folder)
    assert 6 * 4 <= saved < 48
    assert run_config(compose_config(command(workplace, tmp_path, "batch_size=64"))) == 0  # another run
    assert not (folder / "result.json").exists()
    assert run_config(compose_config(command(workplace, tmp_path))) == 0
    assert read_json(folder / "result.json")["resumed"] == saved
    assert len(list(tmp_path.rglob("result.json"))) == 2


def test_a_signal_ends_a_sweep_between_two_batches(workplace, tmp_path, monkeypatch, capfd):
    signal_at(monkeypatch, signal.SIGTERM, 5)
    with pytest.raises(SystemExit) as ended:
        main(["-m", *command(workplace, tmp_path, "seed=1,2")])
    assert ended.value.code == 128 + signal.SIGTERM
    said = capfd.readouterr().err
    assert "interrupted by SIGTERM: rerun the same command to resume" in said
    assert "Traceback" not in said
    (folder,) = tmp_path.glob("accuracy/*/*/*/*")  # the second run wasn't started
    found = read_json(folder / "status.json")
    assert (found["state"], found["error"]) == ("failed", "interrupted by SIGTERM")
    assert found["progress"] == {"done": answered(folder), "total": 48}
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signals_save_and_say_so(workplace, tmp_path, monkeypatch, number):
    signal_at(monkeypatch, number, 5)
    config = compose_config(command(workplace, tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_config(config)
    assert ended.value.code == 128 + number
    (path,) = tmp_path.rglob("status.json")
    assert read_json(path)["error"] == f"interrupted by {number.name}"
    assert signal.getsignal(number) is signal.SIG_DFL
    saved = answered(path.parent)
    assert run_config(config) == 0
    assert read_json(path.with_name("result.json"))["resumed"] == saved >= 16


def test_handlers_of_others_stay_and_sections_are_finished():
    theirs = []
    before = signal.signal(signal.SIGUSR2, lambda *_: theirs.append(1))
    try:
        with signals.interruptible():
            os.kill(os.getpid(), signal.SIGUSR2)
            assert theirs == [1]
            done = []
            with pytest.raises(signals.Interrupted, match="SIGTERM"), signals.shielded():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # once is enough
                done.append(1)
            assert done == [1]
            with pytest.raises(signals.Interrupted):  # also where the first was dropped on its way
                signals.raise_if_interrupted()
        signals.raise_if_interrupted()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signals.interruption(SystemExit(0)) and signals.interruption(ValueError()) is None


def test_two_processes_never_work_on_the_same_run(workplace, tmp_path, capsys):
    config = compose_config(command(workplace, tmp_path, "task=micro", "limit=2"))
    overrides = command(workplace, tmp_path, "task=micro_boolq", "limit=2")
    assert run_config(compose_config(overrides)) == 0
    (boolq,) = tmp_path.glob("accuracy/*/*/*/*")
    (boolq / "result.json").unlink()
    assert lock_owner(boolq) is None and lock_owner(boolq.with_name("nothing")) is None
    holder = subprocess.Popen([sys.executable, "-c", HOLD, boolq], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        held = lock_owner(boolq)
        assert held is not None and held.pid == holder.pid and held.since == pytest.approx(time.time(), abs=60)
        before = (boolq / "status.json").read_text()
        capsys.readouterr()
        assert run_config(config) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            f"skipping: locked by process {holder.pid} on" in said
            and "micro_boolq" not in said.partition("Accuracy of")[2]
        )
        assert len(list(tmp_path.rglob("result.json"))) == 4
        assert run_config(compose_config([*overrides, "force=true"])) == 0  # not even a model is loaded
        mark_failed([RunFolder(compose_config(overrides))], "no model")
        assert (boolq / "status.json").read_text() == before
    finally:
        holder.kill()
        holder.wait()
    assert lock_owner(boolq) is None
    assert run_config(config) == 0
    assert len(list(tmp_path.rglob("result.json"))) == 5


def test_a_run_that_another_process_has_just_finished_is_not_done_again(tmp_path, capsys):
    folder, other = a_folder(tmp_path), a_folder(tmp_path)
    assert run_lifecycle(other, dict) is Outcome.DONE
    assert run_lifecycle(folder, lambda: pytest.fail("done again")) is Outcome.DONE
    assert "completed by another process" in capsys.readouterr().out
    again = []
    assert run_lifecycle(a_folder(tmp_path, "force=true"), lambda: again.append(1) or {}) is Outcome.DONE
    assert again == [1]


def test_the_lock_survives_the_start_and_ends_with_the_run(tmp_path):
    folder = a_folder(tmp_path)

    def work():
        assert lock_owner(folder.path).pid == os.getpid()
        return {}

    assert run_lifecycle(folder, work) is Outcome.DONE
    assert lock_owner(folder.path) is None
    assert lock_path(folder.path) == tmp_path / ".locks" / f"{folder.id}.lock"


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_lease_stands_in_where_the_file_system_refuses_locks(tmp_path, monkeypatch, refusal):
    def refuse(*_):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "LEASE", 0.6)
    folder = a_folder(tmp_path).path
    first, second = RunLock(folder), RunLock(folder)
    first.acquire()
    lease = lock_path(folder).with_suffix(".lease")
    assert lock_owner(folder).pid == os.getpid()
    with pytest.raises(RunLocked, match=f"process {os.getpid()} on"):
        second.acquire()
    marker = lease.read_text()
    first.release()
    assert lock_owner(folder) is None
    lines = [line if not line.startswith("host=") else "host=elsewhere" for line in marker.splitlines()]
    lease.write_text("\n".join(lines) + "\n")  # of a machine that is gone
    assert lock_owner(folder).host == "elsewhere"
    second.acquire()
    assert lock_owner(folder).pid == os.getpid()
    second.release()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB of its own."""
    target = tmp_path / "disk"
    target.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", target], capture_output=True)
    if mounted.returncode:
        pytest.skip("can't mount a small file system here (needs root)")
    yield target
    subprocess.run(["umount", "-l", target], check=True)


def test_a_full_disk_fails_the_run_in_one_line_and_it_resumes(workplace, small_disk, monkeypatch, capfd):
    call, forwards = MethodLM._model_call, []

    def filling(self, *args, **kwargs):
        forwards.append(1)
        if len(forwards) == 3:
            with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="space"):
                while True:
                    filler.write(bytes(4096))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MethodLM, "_model_call", filling)
    config = compose_config(command(workplace, small_disk, "batch_size=1"))
    assert run_config(config) == 1
    said = capfd.readouterr().err
    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "No space left on device" in error and "answers.jsonl" in error and "Traceback" not in said
    (folder,) = small_disk.glob("accuracy/*/*/*/*")
    found = read_json(folder / "status.json")
    assert found["state"] == "failed" and "No space left on device" in found["error"]
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "status.json", "answers.jsonl"}
    # Nor is there room to start: a done run that is forced stays what it was.
    (small_disk / "filler").unlink()
    assert run_config(config) == 0
    result = (folder / "result.json").read_text()
    assert json.loads(result)["resumed"] >= 3
    forwards[:] = [1, 1]
    assert run_config(compose_config(command(workplace, small_disk, "method=random", "method.clusters=2"))) == 1
    assert run_config(compose_config(command(workplace, small_disk, "batch_size=1", "force=true"))) == 1
    assert (folder / "result.json").read_text() == result and read_json(folder / "status.json")["state"] == "done"


def test_a_read_only_folder_is_one_line_for_every_experiment(small_disk, capfd):
    done, new = a_folder(small_disk), a_folder(small_disk, "seed=1")
    assert run_lifecycle(done, dict) is Outcome.DONE
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert run_lifecycle(new, lambda: pytest.fail("started")) is Outcome.FAILED
    assert mark_failed([done, new], "no model") is Outcome.FAILED
    first, second = errors_of(capfd)
    assert "cannot write the run's folder" in first and "Read-only file system" in first
    assert second.startswith("error: no model (cannot write")
    assert done.is_done and lock_owner(done.path) is None


def test_a_status_that_cannot_be_replaced_is_overwritten(tmp_path, monkeypatch, capfd):
    folder = a_folder(tmp_path)

    def full(path, write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def work():
        monkeypatch.setattr(files, "write_atomically", full)
        folder.progress(1, 2)
        return {}

    monkeypatch.setattr(runs, "PROGRESS_EVERY", 0.0)
    assert run_lifecycle(folder, work) is Outcome.FAILED
    found = status(folder)
    assert found["state"] == "failed" and found["error"].startswith("No space left on device")
    assert found["progress"] == {"done": 1, "total": 2}
    (error,) = errors_of(capfd)
    assert "result.json" in error
    monkeypatch.setattr(runs, "overwrite", lambda path, text: full(path, None))
    assert run_lifecycle(folder, dict) is Outcome.FAILED
    assert "cannot write the run's folder" in errors_of(capfd)[0]
    assert status(folder)["state"] == "failed"


def test_a_full_disk_is_told_by_writers_that_do_not_say_so(tmp_path, monkeypatch):
    def unclear(temporary):
        temporary.write_text("half")
        raise RuntimeError("unexpected position")

    with pytest.raises(RuntimeError, match="unexpected"):
        write_atomically(tmp_path / "file", unclear)
    monkeypatch.setattr(files, "is_full", lambda folder: True)
    with pytest.raises(OSError, match="No space left on device.*file"):
        write_atomically(tmp_path / "file", unclear)
    assert not list(tmp_path.iterdir())


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: torch.empty(1 << 58), "out of memory (a smaller batch_size takes less): "),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore")), "less): CUDA out of memory. Tried"),
        (raising(MemoryError()), "out of memory (a smaller batch_size takes less): no details available"),
        (raising(OSError(errno.EDQUOT, "Disk quota exceeded", "x/y")), "Disk quota exceeded: x/y"),
        (raising(ValueError("two\nlines")), "ValueError: two lines"),
    ],
    ids=["cpu memory", "gpu memory", "python memory", "quota", "unforeseen"],
)
def test_reasons_are_one_line_and_the_next_run_goes_on(tmp_path, capfd, work, message):
    folder = a_folder(tmp_path)
    assert run_lifecycle(folder, work) is Outcome.FAILED
    assert status(folder)["state"] == "failed" and message in status(folder)["error"]
    assert "\n" not in status(folder)["error"]
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and ("Traceback" in said) == (message.startswith("ValueError"))
    assert run_lifecycle(folder, dict) is Outcome.DONE and "error" not in status(folder)


def test_what_a_run_goes_on_from_is_dropped_when_it_is_done(tmp_path):
    folder = a_folder(tmp_path)

    def stopped():
        (folder.path / "kept").write_text("kept")
        (folder.path / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_lifecycle(folder, stopped, keep=("kept",), until_done=("half",))
    assert status(folder)["error"] == "interrupted"

    def resumed():
        assert (folder.path / "half").read_text() == "half"
        return {}

    assert run_lifecycle(folder, resumed, keep=("kept",), until_done=("half",)) is Outcome.DONE
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "status.json", "result.json", "kept"}


def test_progress_is_in_the_status_now_and_then(tmp_path, monkeypatch):
    folder = a_folder(tmp_path)

    def work():
        folder.progress(1, 3)
        assert "progress" not in status(folder)
        monkeypatch.setattr(runs, "PROGRESS_EVERY", 0.0)
        before = status(folder)
        folder.progress(2, 3)
        assert status(folder)["progress"] == {"done": 2, "total": 3} and status(folder)["state"] == "running"
        assert status(folder)["started"] == before["started"] and status(folder)["updated"] > before["updated"]
        return {}

    assert run_lifecycle(folder, work) is Outcome.DONE
    assert "progress" not in status(folder)


def test_weights_that_are_no_numbers_fail_the_run(workplace, tmp_path, capfd):
    broken = tmp_path / "model"
    broken.mkdir()
    for source in (workplace / "small").iterdir():
        (broken / source.name).write_bytes(source.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    config = compose_config(command(workplace, tmp_path / "results", f"model.path={broken}"))
    assert run_config(config) == 1
    (error,) = errors_of(capfd)
    assert "non-finite log-likelihood (nan)" in error
    (path,) = tmp_path.rglob("status.json")
    assert read_json(path)["state"] == "failed" and "non-finite log-likelihood (nan)" in read_json(path)["error"]
