"""``make gpu``: what is asked is compared with what was measured, and nothing is passed over in silence."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.config.compose import compose_config
from experiments.config.validate import check_overrides
from experiments.gpu import __main__ as gpu
from experiments.gpu import correctness
from experiments.gpu.correctness import check_kernels
from experiments.gpu.problems import Problem, large_problem
from experiments.gpu.report import Outcome
from experiments.gpu.speed import RUNS, Figure, Measured, judge

TINY = (
    "experiment=latency", "model=llama7b", "model.random_init=true", "model.dtype=bfloat16", "device=cpu",
    "model.architecture.num_hidden_layers=1", "model.architecture.hidden_size=64", "method.clusters=2",
    "model.architecture.intermediate_size=64", "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=4", "model.architecture.vocab_size=64", "experiment.rounds=2",
)  # fmt: skip


def write_run(folder: Path, speedup: float, of_peak: float = 0.8) -> Path:
    columns = {"part": "attention", "phase": "decode", "length": 2048, "k": 4, "ms": 1.0, "limit": 1.78}
    columns |= {"best_baseline": "cudnn", "speedup_p25": speedup - 0.1, "speedup_p75": speedup + 0.1}
    rows = [
        {**columns, "role": "method", "speedup": speedup, "of_peak": 0.5},
        {**columns, "role": "baseline", "speedup": 1.0, "of_peak": of_peak},
    ]
    pd.DataFrame(rows).astype({"k": "Int64"}).to_parquet(folder / "measurements.parquet")
    return folder


@pytest.mark.parametrize(("speedup", "holds"), [(1.39, False), (1.40, True), (float("nan"), False)])
def test_a_figure_that_falls_short_is_found(tmp_path: Path, speedup: float, holds: bool) -> None:
    measured = Measured("decode", ("experiment.rows=1",), (Figure(2048, 1.40, 4),))
    (outcome,) = judge(measured, write_run(tmp_path, speedup))
    assert outcome.holds is holds
    assert (outcome.name, outcome.asked) == ("decode, 1 x 2048, k = 4", "1.40, limit 1.78")


def test_a_figure_without_a_row_falls_short(tmp_path: Path) -> None:
    measured = Measured("decode", ("experiment.rows=1",), (Figure(4096, 1.40, 4), Figure(2048, 1.4, 18)))
    assert [outcome.holds for outcome in judge(measured, write_run(tmp_path, 2.0))] == [False, False]


@pytest.mark.parametrize(("of_peak", "holds"), [(0.75, True), (0.7, False), (float("nan"), False)])
def test_the_baseline_has_a_limit_of_its_own(tmp_path: Path, of_peak: float, holds: bool) -> None:
    measured = Measured("next token", ("experiment.rows=16",), (), most_over_limit=1.35)
    (outcome,) = judge(measured, write_run(tmp_path, 1.0, of_peak))
    assert outcome.holds is holds and outcome.asked == "at most 1.35"


@pytest.mark.parametrize("measured", RUNS, ids=lambda measured: measured.name)
def test_every_run_can_be_composed(measured: Measured) -> None:
    check_overrides(list(measured.overrides))
    config = compose_config(list(measured.overrides))
    assert config.experiment.lengths == sorted({figure.length for figure in measured.figures})


def test_a_run_is_measured_and_judged(tmp_path: Path) -> None:
    """The whole way, at a small size and on the CPU: in the engine, and of attention alone."""
    settings = [f"results_dir={tmp_path}"]
    phases = ("experiment.phases=[decode]", "experiment.lengths=[64]", "experiment.rows=2")
    attention = Measured("a", (*TINY, "experiment.parts=[attention]", *phases), (Figure(64, 1e-9, 2),))
    engine = Measured("e", (*TINY, "experiment.parts=[engine]", *phases), (Figure(64, 1e9),), most_over_limit=1e9)
    outcomes = [*gpu.measure(attention, settings), *gpu.measure(engine, settings)]
    assert [outcome.holds for outcome in outcomes if "k = H" not in outcome.name] == [True, False, True]
    assert "of engine" in outcomes[1].found
    (control,) = [outcome for outcome in outcomes if "k = H" in outcome.name]
    assert control.asked == "0.98" and control.holds is (float(control.found.split()[0]) >= 0.98)
    files = list(tmp_path.glob("**/measurements.parquet"))
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 2 and [outcome.holds for outcome in gpu.measure(attention, settings)] == [True]
    assert sum(path.stat().st_mtime_ns > old for path, old in zip(files, before, strict=True)) == 1  # measured again


def test_a_failed_run_falls_short(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "run_config", lambda config: 1)
    measured = Measured("a", (*TINY, "experiment.lengths=[64]"), (Figure(64, 1.0),))
    (outcome,) = gpu.measure(measured, [f"results_dir={tmp_path}"])
    assert outcome.holds is False and "failed" in outcome.found


def test_without_a_gpu_kernels_are_interpreted_and_compiled(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "is_interpreted", lambda: False)
    commands: list[tuple[list[str], bool]] = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        commands.append((command[1:], "TRITON_INTERPRET" in (options.get("env") or {})))
        return subprocess.CompletedProcess(command, 1 if "chai.kernels.compile" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main([]) == 1
    assert commands == [(["-m", "experiments.gpu"], True), (["-m", "chai.kernels.compile"], False)]
    printed = capsys.readouterr().out
    assert "no CUDA device" in printed and "nothing was measured" in " ".join(printed.split())


def test_interpreted_checks(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED_PROBLEMS", 2)
    monkeypatch.setattr(gpu, "INTERPRETED_TOKENS", 2)
    outcomes = gpu.without_gpu()
    assert len(outcomes) == 4 and all(outcome.holds for outcome in outcomes)


def test_a_wrong_kernel_is_found(monkeypatch) -> None:
    monkeypatch.setattr("experiments.gpu.correctness.is_exact", lambda problem, result: False)
    outcomes = list(check_kernels(torch.device("cpu"), 2))
    assert [outcome.holds for outcome in outcomes] == [False, False] and "2 wrong" in outcomes[0].found


def test_all_settings_at_several_blocks(monkeypatch) -> None:
    """What is compared on a GPU at LLaMA-7B's heads, here at fewer heads and shorter."""

    def smaller(device: torch.device, k: int, q_len: int, size: int, **options) -> Problem:
        return large_problem(device, k // 4, max(1, q_len // 16), size // 16, num_heads=4, **options)

    monkeypatch.setattr(correctness, "large_problem", smaller)
    outcomes = list(correctness.check_settings(torch.device("cpu")))
    assert len(outcomes) == 12 and all(outcome.holds for outcome in outcomes)
    monkeypatch.setattr(correctness, "is_exact", lambda problem, result: False)
    assert next(correctness.check_settings(torch.device("cpu"))).holds is False


def test_generate_is_compared() -> None:
    outcomes = list(correctness.check_generate(torch.device("cpu")))
    assert [outcome.name for outcome in outcomes] == ["generate(), chai", "generate(), chai_qkv", "generate(), random"]
    assert all(outcome.holds for outcome in outcomes)


def test_an_error_of_one_check_is_an_outcome(capsys) -> None:
    def check() -> Iterator[Outcome]:
        yield Outcome("first", "found", "asked", True)
        raise RuntimeError("out of resources\nand more")

    first, second = gpu.guarded("second", check)
    assert first.holds and second == Outcome("second", "RuntimeError: out of resources", "", False)
    assert "out of resources" in capsys.readouterr().err


def test_a_wrong_setting_is_refused(capsys) -> None:
    assert gpu.main(["experiment.round=3"]) == 2
    assert "experiment.round" in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_checks(monkeypatch, capsys) -> None:
    for holds, code in ((True, 0), (None, 0), (False, 1)):
        monkeypatch.setattr(gpu, "without_gpu", lambda holds=holds: [Outcome("one", "found", "asked", holds)])
        assert gpu.main([]) == code
    assert "NO" in capsys.readouterr().out
