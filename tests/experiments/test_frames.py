"""The way from the command line to the attention product and to K-means is short enough to be read."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from chai.attention import dense
from chai.clustering import kmeans
from experiments.cli import main
from experiments.config.schema import REPOSITORY

OWN = [REPOSITORY / name for name in ("chai", "experiments")]


def own_frames(stack: traceback.StackSummary) -> list[str]:
    """The frames of this project's code, outermost first."""
    return [
        f"{Path(frame.filename).relative_to(REPOSITORY)}:{frame.name}"
        for frame in stack
        if any(Path(frame.filename).is_relative_to(folder) for folder in OWN)
    ]


@pytest.fixture
def stacks(tmp_path, monkeypatch) -> dict[str, list[list[str]]]:
    """The own frames of each call of the attention product and of K-means in a run of ``method=chai``."""
    found: dict[str, list[list[str]]] = {"attention": [], "kmeans": []}
    attend, cluster = dense._attend_block, kmeans._cluster

    def recording_attend(*args):
        found["attention"].append([*own_frames(traceback.extract_stack()), "chai/attention/dense.py:_attend_block"])
        return attend(*args)

    def recording_cluster(*args):
        found["kmeans"].append([*own_frames(traceback.extract_stack()), "chai/clustering/kmeans.py:_cluster"])
        return cluster(*args)

    monkeypatch.setattr(dense, "_attend_block", recording_attend)
    monkeypatch.setattr(kmeans, "_cluster", recording_cluster)
    settings = ["method=chai", "model=tiny", "task=micro_piqa", "limit=4", "device=cpu"]
    assert main([*settings, f"results_dir={tmp_path}"]) == 0
    return found


def test_frames_from_the_command_line(stacks):
    for name, most in (("attention", 18), ("kmeans", 20)):
        assert stacks[name]
        deepest = max(stacks[name], key=len)
        assert len(deepest) <= most, deepest
        assert deepest[0] == "experiments/cli.py:main"
        to_model = deepest.index("experiments/evaluation/lm.py:_model_call") + 1
        assert to_model <= 10  # the rest is the library
