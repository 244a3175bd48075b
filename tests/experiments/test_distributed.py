from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.config.validate import check_overrides
from experiments.evaluation.accuracy import run
from experiments.evaluation.responses import BatchResponses, SavedResponses, response_file, worker_files
from experiments.runs import model
from experiments.runs.experiment import describe_error
from experiments.runs.model import model_source, process_device
from experiments.system.distributed import DistributedError, ProcessGroup, init_distributed
from experiments.system.interrupts import Interrupted, interruptible
from tests.conftest import REPOSITORY

SETTINGS = ["task=micro", "limit=6", "batch_size=2", "method=chai"]


def results(folder: Path) -> dict[str, dict]:
    return {
        path.parent.parent.name: json.loads(path.read_text()) for path in folder.glob("accuracy/*/*/*/*/result.json")
    }


def test_two_processes_score_as_one_does(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it
    try:
        assert run(compose_config([*SETTINGS, f"results_dir={tmp_path / 'one'}"])) == 0
    finally:
        torch.set_num_threads(threads)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "tests.experiments.two_processes", *SETTINGS, f"results_dir={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=220)
    assert done.returncode == 1, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: process 1: RuntimeError: the device is lost"]
    assert done.stdout.count("Accuracy of tiny") == 1

    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    (failed,) = one.keys() - two.keys()  # the first task, in which a process failed; the others went on
    (status,) = (tmp_path / "two").glob(f"accuracy/*/*/{failed}/*/status.json")
    assert json.loads(status.read_text())["state"] == "failed"
    assert "the device is lost" in json.loads(status.read_text())["error"]
    assert len(two) == 4
    for name, result in two.items():
        for key in result.keys() - {"seconds", "processes"}:
            assert result[key] == one[name][key], (name, key)
        assert (result["processes"], one[name]["processes"]) == (2, 1)
        samples = [next((tmp_path / kind).glob(f"accuracy/*/*/{name}/*/samples.parquet")) for kind in ("one", "two")]
        pd.testing.assert_frame_equal(*map(pd.read_parquet, samples), check_exact=True)
        assert sorted(path.name for path in samples[1].parent.iterdir()) == [
            "config.yaml", "result.json", "samples.parquet", "status.json",
        ]  # fmt: skip


def start(scene, rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    results.put((rank, scene(init_distributed(describe_error))))


def play(scene) -> list:
    """What a scene returns in each of two processes; ``None`` for one that died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=start, args=(scene, rank, port, results)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode is not None
    by_rank = dict(results.get(timeout=5) for process in both if process.exitcode == 0)
    return [by_rank.get(rank) for rank in range(2)]


def attempt(work):
    try:
        return work()
    except (DistributedError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def test_all_receive_the_values_of_all():
    def scene(group: ProcessGroup):
        return group.all_gather(group.rank * 10), group.broadcast(group.rank), group.run_on_all(lambda: group.rank)

    assert play(scene) == [([0, 10], 0, 0), ([0, 10], 0, 1)]


def test_a_failure_of_one_is_the_failure_of_all_and_what_follows_works():
    def scene(group: ProcessGroup):
        first = attempt(lambda: group.run_on_all(lambda: {}["gone"] if group.rank == 1 else 0))
        return first, group.all_gather(group.rank)

    assert play(scene) == [("DistributedError: process 1: KeyError: 'gone'", [0, 1]), ("KeyError: 'gone'", [0, 1])]


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("exchange", ["all_gather", "run_on_all"])
def test_a_failure_between_two_rounds(culprit, exchange):
    """The others wait for an exchange that the failed one never comes to."""

    def scene(group: ProcessGroup):
        done = []

        def work(number: int) -> None:
            if group.is_main_process:
                group.send_command(number)
            if number == 1 and group.rank == culprit:
                raise KeyError("stumbled")
            done.append((number, group.all_gather(number) if exchange == "all_gather" else group.run_on_all(int)))

        if not group.is_main_process:
            group.worker_loop(work)
            return done
        outcomes = [attempt(lambda number=number: work(number)) for number in range(3)]
        group.shutdown()
        return outcomes, done

    (outcomes, done), followed = play(scene)
    assert done == followed == [(number, [number] * 2 if exchange == "all_gather" else 0) for number in (0, 2)]
    failure = "KeyError: 'stumbled'"
    assert outcomes[1] == (failure if culprit == 0 else f"DistributedError: process 1: {failure}")


def test_a_failing_round_does_not_lose_the_next_command():
    """Rank 0 has failed and sends its next command into the round in which the other reports a failure of its own."""

    def scene(group: ProcessGroup):
        done = []

        def work(number: int) -> None:
            if number == 0:
                attempt(lambda: group.run_on_all(lambda: {}["gone"]))
            done.append(number)

        if group.is_main_process:
            for number in range(2):
                group.send_command(number)
            group.shutdown()
        else:
            group.worker_loop(work)
        return done

    assert play(scene)[1] == [0, 1]


def test_nobody_waits_for_a_process_that_died():
    def scene(group: ProcessGroup):
        if group.rank == 1:
            os._exit(9)
        return attempt(lambda: group.all_gather(0))

    assert play(scene)[0].startswith("DistributedError: another process of this run has ended")


def test_signals_are_handled_while_waiting_for_another_process():
    def scene(group: ProcessGroup):
        group.all_gather(0)
        if group.rank == 1:
            time.sleep(5)
            return attempt(lambda: group.all_gather(0)) and None
        began = time.monotonic()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            with interruptible():
                group.all_gather(0)
        except Interrupted:
            return time.monotonic() - began

    assert play(scene)[0] < 3


def test_a_single_process_exchanges_nothing():
    group = init_distributed()
    assert (group.rank, group.world_size, group.is_main_process) == (0, 1, True)
    assert group.all_gather(3) == [3]
    assert group.run_on_all(lambda: 4) == 4
    assert group.shard([1, 2, 3]) == [1, 2, 3]
    group.send_command(0)
    group.shutdown()


def test_each_process_has_a_device(monkeypatch):
    assert process_device("auto", "auto") == "auto"
    monkeypatch.setattr(model, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_device("cuda", None) == "cuda:1"
    assert process_device("cpu", None) == "cpu"
    with pytest.raises(ConfigError, match="device=cuda:0 puts 2 processes on one GPU"):
        process_device("cuda:0", None)
    with pytest.raises(ConfigError, match="model.device_map=auto divides the model"):
        process_device("auto", "auto")


def test_answers_of_other_processes_are_known(tmp_path):
    about = {"device": "cpu"}
    for rank in range(2):
        mine = SavedResponses(tmp_path / response_file(rank), about)
        mine.add(f"batch{rank}", BatchResponses([(-1.0, True)], {}, 0.0))
        mine.close()
    assert worker_files(tmp_path, 1) == ["answers.rank1.jsonl"]
    assert worker_files(tmp_path, 3) == ["answers.rank1.jsonl", "answers.rank2.jsonl"]
    one = SavedResponses(tmp_path / response_file(0), about, [tmp_path / response_file(1), tmp_path / response_file(2)])
    assert one.find("batch0") is not None and one.find("batch1") is not None
    one.close()
    other = SavedResponses(tmp_path / response_file(2), {"device": "cuda"}, [tmp_path / response_file(1)])
    assert other.find("batch1") is None and not other.discarded
    other.close()


def test_device_maps_are_checked():
    places = "{model.embed_tokens:0,model.layers:cuda:1,lm_head:disk}"
    source = model_source(compose_config([f"model.device_map={places}"]))
    assert source.device_map == {"model.embed_tokens": 0, "model.layers": "cuda:1", "lm_head": "disk"}
    check_overrides(["model.device_map=balanced"])
    for wrong, message in [
        ("evenly", "model.device_map is 'evenly'; valid: auto, balanced, balanced_low_0, sequential, null"),
        ("{model.layers:gpu}", "model.device_map puts model.layers on 'gpu'; valid: a GPU's index"),
        ("{model.layers:-1}", "puts model.layers on -1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_overrides([f"model.device_map={wrong}"])
