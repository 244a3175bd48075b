"""When functions are captured, on a CUDA device that is only pretended."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from chai.engine.graphs import Graphs

CUDA = torch.device("cuda", 1)


class FakeGraph:
    """Counts what a captured graph would run."""

    def __init__(self):
        self.replays, self.generator = 0, None

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        self.replays += 1


@pytest.fixture
def captures(monkeypatch):
    """The streams of all captures."""
    streams = []

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        streams.append(stream)
        yield

    for name, fake in (
        ("CUDAGraph", FakeGraph),
        ("graph", capture),
        ("graph_pool_handle", lambda: "pool"),
        ("Stream", lambda device: f"stream of {device}"),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    return streams


def test_the_second_run_of_a_key_is_captured_on_a_stream_of_the_device(captures):
    graphs, runs = Graphs(CUDA, torch.Generator(), captures=True), []
    for key in ("a", "a", "b", "a", "b"):
        graphs.run(key, lambda key=key: runs.append(key))
    assert runs == ["a", "a", "b", "b"]  # each as it is, then to be captured
    assert captures == ["stream of cuda:1"] * 2
    assert [graph.replays for graph in graphs._graphs.values()] == [2, 1]


def test_a_run_that_failed_was_not_the_first(captures):
    """Nothing is known to be compiled and allocated after it."""
    graphs = Graphs(CUDA, torch.Generator(), captures=True)

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        graphs.run("a", fail)
    graphs.run("a", lambda: None)
    assert not captures
    graphs.run("a", lambda: None)
    assert len(captures) == 1


def test_without_captures_every_call_runs_as_it_is(captures):
    graphs, runs = Graphs(CUDA, torch.Generator(), captures=False), []
    for _ in range(3):
        graphs.run("a", lambda: runs.append(1))
    assert len(runs) == 3 and not captures
