"""The choice of the fastest implementation: measured once, remembered, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chai.attention.fastest import Candidates, FastestChoice, describe_device, length_class, measure_on_gpu

CPU = torch.device("cpu")


class Measure:
    """Times that are given, and how often they were asked for."""

    def __init__(self, **times: float) -> None:
        self.times, self.calls = times, 0

    def __call__(self, candidates: Candidates, device: torch.device) -> dict[str, float]:
        self.calls += 1
        return {name: time for name, time in self.times.items() if name in candidates}


def runs() -> Candidates:
    return {"a": lambda: "from a", "b": lambda: "from b"}


def refuse() -> Candidates:
    raise AssertionError("candidates are only built where they are measured")


def test_measured_once_for_each_key(tmp_path: Path) -> None:
    measure = Measure(a=2.0, b=1.0)
    choice = FastestChoice(tmp_path, measure)
    assert [choice.name(("shape", 1), runs, CPU) for _ in range(2)] == ["b", "b"] and measure.calls == 1
    assert choice.name(("shape", 1), refuse, CPU) == "b"
    choice.name(("shape", 2), runs, CPU)
    assert measure.calls == 2


def test_unmeasured(tmp_path: Path) -> None:
    measure = Measure(a=2.0, b=1.0)
    choice = FastestChoice(tmp_path, measure)
    with choice.unmeasured():
        assert choice.name("key", runs, CPU) == "a"
    assert not measure.calls and not list(tmp_path.iterdir())
    assert choice.name("key", runs, CPU) == "b"


def test_remembered_by_the_next_process(tmp_path: Path) -> None:
    FastestChoice(tmp_path, Measure(a=2.0, b=1.0)).name(("shape", 1), runs, CPU)
    measure = Measure(a=1.0, b=2.0)
    assert FastestChoice(tmp_path, measure).name(("shape", 1), runs, CPU) == "b" and not measure.calls
    (file,) = tmp_path.iterdir()
    assert file.stem == describe_device(CPU) and list(json.loads(file.read_text()).values()) == ["b"]


def test_other_candidates_are_measured_anew(tmp_path: Path) -> None:
    """Those of a later version may be faster, and a name may be gone."""
    FastestChoice(tmp_path, Measure(a=2.0, b=1.0)).name("key", runs, CPU)
    more = FastestChoice(tmp_path, Measure(a=2.0, b=1.0, c=0.5))
    assert more.name("key", lambda: {**runs(), "c": lambda: 2}, CPU) == "c"
    fewer = FastestChoice(tmp_path, Measure(a=2.0, c=3.0))
    assert fewer.name("key", lambda: {"a": lambda: 1, "c": lambda: 2}, CPU) == "a"
    assert FastestChoice(tmp_path, Measure()).name("key", runs, CPU) == "b"


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_file_is_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / f"{describe_device(CPU)}.json"
    path.write_text(text)
    assert FastestChoice(tmp_path, Measure(a=1.0, b=2.0)).name("key", runs, CPU) == "a"
    assert list(json.loads(path.read_text()).values()) == ["a"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert FastestChoice(tmp_path / "file" / "below", Measure(a=1.0, b=2.0)).name("key", runs, CPU) == "a"


def test_what_fails_is_not_chosen_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    assert FastestChoice(tmp_path, Measure(b=1.0)).name("key", runs, CPU) == "b"
    with pytest.raises(RuntimeError, match=r"no implementation .* works for 'other' .*: a, b"):
        FastestChoice(tmp_path, Measure()).name("other", runs, CPU)


def test_interpreted_kernels_are_not_timed() -> None:
    assert measure_on_gpu({"a": lambda: 1 / 0, "b": lambda: None}, CPU) == {"a": 0.0, "b": 0.0}


def test_length_classes() -> None:
    assert [length_class(n) for n in (1, 2, 3, 5, 6, 7, 9, 1500, 1537, 2048, 2049)] == [
        1, 2, 3, 6, 6, 8, 12, 1536, 2048, 2048, 3072,
    ]  # fmt: skip
    assert all(length <= length_class(length) <= 1.5 * length for length in range(1, 3000))
