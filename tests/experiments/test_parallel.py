from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.config.compose import compose_config
from experiments.config.schema import ConfigError
from experiments.config.validate import check_overrides
from experiments.evaluation.accuracy import model_source, run
from experiments.evaluation.responses import Answered, Answers
from experiments.runs.folder import RunError
from experiments.system import distributed as parallel
from experiments.system.distributed import Team, join, own_device, own_share, shares
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


def start(scene, rank: int, port: int, told) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    told.put((rank, scene(join())))


def play(scene) -> list:
    """What a scene returns in each of two processes; ``None`` for one that died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    both = [context.Process(target=start, args=(scene, rank, port, told)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode is not None
    heard = dict(told.get(timeout=5) for process in both if process.exitcode == 0)
    return [heard.get(rank) for rank in range(2)]


def attempt(work):
    try:
        return work()
    except (RunError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def test_all_hear_all():
    def scene(team: Team):
        return team.share(lambda: team.rank * 10), team.from_leader(lambda: team.size), team.together(lambda: team.rank)

    assert play(scene) == [([0, 10], 2, 0), ([0, 10], 2, 1)]


def test_a_failure_of_one_is_the_failure_of_all_and_what_follows_works():
    def scene(team: Team):
        first = attempt(lambda: team.share(lambda: {}["gone"] if team.rank == 1 else 0))
        return first, team.share(lambda: team.rank)

    assert play(scene) == [("RunError: process 1: KeyError: 'gone'", [0, 1]), ("KeyError: 'gone'", [0, 1])]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failure_between_two_rounds(culprit):
    """The others wait for an exchange that the failed one never comes to."""

    def scene(team: Team):
        done = []

        def work(number: int) -> None:
            if number == 1 and team.rank == culprit:
                raise KeyError("stumbled")
            done.append((number, team.share(lambda: number)))

        def lead(number: int) -> object:
            team.command(number)
            return work(number)

        if not team.leads:
            team.follow(work)
            return done
        found = [attempt(lambda number=number: lead(number)) for number in range(3)]
        team.dismiss()
        return found, done

    (found, done), followed = play(scene)
    assert done == followed == [(0, [0, 0]), (2, [2, 2])]
    assert found[1] == ("KeyError: 'stumbled'" if culprit == 0 else "RunError: process 1: KeyError: 'stumbled'")


def test_nobody_waits_for_a_process_that_died():
    def scene(team: Team):
        if team.rank == 1:
            os._exit(9)
        return attempt(lambda: team.share(lambda: 0))

    assert play(scene)[0].startswith("RunError: another process of this run has ended")


def test_alone():
    team = join()
    assert (team.rank, team.size, team.leads) == (0, 1, True)
    assert team.share(lambda: 3) == [3]
    assert team.own([1, 2, 3]) == [1, 2, 3]
    team.command(0)
    team.dismiss()


def test_each_process_has_a_device(monkeypatch):
    assert own_device("auto", "auto") == "auto"
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda", None) == "cuda:1"
    assert own_device("cpu", None) == "cpu"
    with pytest.raises(ConfigError, match="device=cuda:0 puts 2 processes on one GPU"):
        own_device("cuda:0", None)
    with pytest.raises(ConfigError, match="model.device_map=auto divides the model"):
        own_device("auto", "auto")


def test_answers_of_other_processes_are_known(tmp_path):
    about = {"device": "cpu"}
    for rank in range(2):
        mine = Answers(tmp_path / own_share(rank), about)
        mine.add(f"batch{rank}", Answered([(-1.0, True)], {}, 0.0))
        mine.close()
    assert shares(tmp_path, Team()) == ["answers.rank1.jsonl"]
    assert shares(tmp_path, Team(0, 3)) == ["answers.rank1.jsonl", "answers.rank2.jsonl"]
    one = Answers(tmp_path / own_share(0), about, [tmp_path / own_share(1), tmp_path / own_share(2)])
    assert one.find("batch0") is not None and one.find("batch1") is not None
    one.close()
    other = Answers(tmp_path / own_share(2), {"device": "cuda"}, [tmp_path / own_share(1)])
    assert other.find("batch1") is None and not other.left_aside
    other.close()


def test_device_maps_are_checked():
    places = "{model.embed_tokens:0,model.layers:cuda:1,lm_head:disk}"
    source = model_source(compose_config([f"model.device_map={places}"]))
    assert source.device_map == {"model.embed_tokens": 0, "model.layers": "cuda:1", "lm_head": "disk"}
    check_overrides(["model.device_map=balanced"])
    for wrong, told in [
        ("evenly", "model.device_map is 'evenly'; valid: auto, balanced, balanced_low_0, sequential, null"),
        ("{model.layers:gpu}", "model.device_map puts model.layers on 'gpu'; valid: a GPU's index"),
        ("{model.layers:-1}", "puts model.layers on -1"),
    ]:
        with pytest.raises(ConfigError, match=told):
            check_overrides([f"model.device_map={wrong}"])
