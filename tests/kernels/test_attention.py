"""The attention kernels under Triton's interpreter, against the equation in fp64 over random shapes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chai.attention.gpu import GpuInputs, attention_on_gpu, has_kernels, implementations
from chai.attention.sdpa import wide_sdpa_attention
from chai.heads import HeadClusters, KVHeadMap
from chai.kernels.decode import CONFIGS, DecodeConfig, decode_attention
from chai.kernels.prefill import PrefillConfig, candidates, default_config, prefill_attention
from chai.kernels.tasks import build_tasks, empty_tasks, fill_tasks
from experiments.gpu.problems import Problem, is_exact, random_problem, relative_error, solve
from tests.kernels.launches import Launches

PER_TEST, TESTS = 13, 8  # 104 shapes of each kernel


def check(problem: Problem, result: torch.Tensor) -> None:
    assert is_exact(problem, result)


@pytest.mark.parametrize("part", range(TESTS))
def test_decode(part: int, record_property) -> None:
    for seed in range(part * PER_TEST, (part + 1) * PER_TEST):
        problem, draw = random_problem(seed, one_token=True), random.Random(seed)
        config = DecodeConfig(draw.choice([1, 2, 4]), draw.choice([16, 32, 64]), draw.choice([1, 2, 4]))
        tasks = build_tasks(problem.assignment, problem.head_map.kv_heads, problem.value.shape[1], config.members)
        check(
            problem,
            decode_attention(
                problem.query, problem.key, problem.value, tasks, problem.scaling, kv_len=problem.kv_len,
                starts=problem.starts, mask=problem.mask, softcap=problem.softcap, config=config,
            ),
        )  # fmt: skip
    record_property("kernel shapes", PER_TEST)


@pytest.mark.parametrize("part", range(TESTS))
def test_prefill(part: int, record_property) -> None:
    for seed in range(part * PER_TEST, (part + 1) * PER_TEST):
        problem, draw = random_problem(seed, one_token=False), random.Random(seed)
        config = PrefillConfig(draw.choice([1, 2]), draw.choice([16, 32, 64]), draw.choice([16, 32]))
        tasks = build_tasks(problem.assignment, problem.head_map.kv_heads, problem.value.shape[1], config.members)
        check(
            problem,
            prefill_attention(
                problem.query, problem.key, problem.value, tasks, problem.scaling, starts=problem.starts,
                mask=problem.mask, softcap=problem.softcap, config=config,
            ),
        )  # fmt: skip
    record_property("kernel shapes", PER_TEST)


@pytest.mark.parametrize("one_token", [True, False])
def test_all_implementations_on_a_gpu_agree(one_token: bool) -> None:
    found: set[str] = set()
    kinds: set[str] = set()
    for seed in range(40):
        problem = random_problem(seed, one_token)
        if problem.query.dtype == torch.float32 or draws_alike(problem) in kinds or len(kinds) == 5:
            continue
        kinds.add(draws_alike(problem))
        runs = implementations(problem.inputs)
        for run in runs.values():
            check(problem, run())
        found |= runs.keys()
    expected = {f"split-KV, {config.label}" for config in CONFIGS}
    if not one_token:
        expected = {f"one score, {config.label}" for config in candidates(64, True, False)}
        expected |= {"repeated, torch's choice"}
    assert expected <= found


def draws_alike(problem: Problem) -> str:
    """Name the kind of a problem: what is hidden, and whether queries are grouped and scores bounded."""
    hidden = [problem.mask is None, problem.starts is None, problem.kv_len is None]
    return f"{hidden}, {problem.softcap}, {problem.value.shape[1] == problem.assignment.shape[1]}"


def test_an_inexact_result_is_found() -> None:
    problem = random_problem(1, one_token=False)
    wanted = solve(problem)[0].to(problem.query.dtype)
    assert is_exact(problem, wanted)
    assert not is_exact(problem, wanted * 1.02) and not is_exact(problem, wanted.clone().fill_(torch.nan))


def test_groups_too_large_for_the_kernels() -> None:
    """Falcon-7B has 71 query heads on one KV head."""
    for num_heads, fits in ((32, True), (33, False), (71, False)):
        query, key = torch.randn(1, num_heads, 1, 16).half(), torch.randn(1, 1, 8, 16).half()
        assert has_kernels(GpuInputs(query, key, key, 0.25)) is fits
        labels, first = torch.arange(num_heads)[None] % 4, torch.arange(4)[None]
        head_map = KVHeadMap(HeadClusters(labels, first), torch.zeros_like(first), torch.zeros(1, 1, dtype=torch.long))
        problem = Problem(query[:, :4], key, key, head_map, 0.25, None, None, None, None)
        assert has_kernels(problem.inputs) is fits
        for run in implementations(problem.inputs).values():
            check(problem, run())


def test_the_choice_is_for_a_layout_too() -> None:
    """Keys that a descriptor cannot load, and a prompt after others, have other candidates."""
    query, key = torch.randn(1, 2, 8, 16).half(), torch.randn(1, 2, 8, 16).half()
    plain = GpuInputs(query, key, key, 0.25)
    unaligned = torch.randn(1, 2, 8, 17).half()[..., 1:]
    longer = torch.randn(1, 2, 7, 16).half()
    keys = [replace(plain, **change).key_of_shape() for change in ({}, {"key": unaligned}, {"query": longer})]
    assert len(set(keys)) == 3
    assert attention_on_gpu(plain).shape == attention_on_gpu(replace(plain, key=unaligned)).shape
    assert not has_kernels(replace(plain, value=torch.randn(1, 2, 16, 8).half().transpose(2, 3)))


def test_values_side_by_side() -> None:
    seeds = [seed for seed in range(60) if (p := random_problem(seed, False)).starts is p.softcap is None]
    problems = [random_problem(seed, False) for seed in seeds]
    problems = [one for one in problems if one.value.shape[1] == one.assignment.shape[1]]
    assert len(problems) > 5
    for one in problems:
        tasks = one.head_map.tasks(one.value.shape[1], 2)
        check(one, wide_sdpa_attention(one.query, one.key, one.value, tasks, one.scaling, one.mask))


@pytest.mark.parametrize("one_token", [True, False])
def test_multi_head_attention_with_padding(one_token: bool) -> None:
    query = torch.randn(2, 4, 1 if one_token else 12, 64).half()
    key, value = (torch.randn(2, 2, 20, 64).half() for _ in range(2))
    heads = torch.arange(4).expand(2, -1)
    head_map = KVHeadMap(HeadClusters(heads, heads), heads // 2, torch.arange(2).expand(2, -1))
    starts = torch.tensor([0, 13], dtype=torch.int32)
    kv_len = torch.tensor([17], dtype=torch.int32) if one_token else None
    problem = Problem(query, key, value, head_map, 0.1, None, starts, kv_len, None)
    runs = implementations(replace(problem.inputs, head_map=None))
    assert len(runs) > 4 and "torch's choice" in runs
    for run in runs.values():
        check(problem, run())


def test_prefill_without_descriptors(monkeypatch) -> None:
    monkeypatch.setattr("chai.kernels.prefill.has_descriptors", lambda *tensors: False)
    for seed in range(200, 212):
        problem = random_problem(seed, one_token=False)
        config = default_config(problem.value.shape[3], False, problem.mask is not None)
        tasks = problem.head_map.tasks(problem.value.shape[1], config.members)
        check(
            problem,
            prefill_attention(
                problem.query, problem.key, problem.value, tasks, problem.scaling, starts=problem.starts,
                mask=problem.mask, softcap=problem.softcap,
            ),
        )  # fmt: skip


def test_shape_of_llama_7b() -> None:
    torch.manual_seed(0)
    assignment = (torch.arange(32) % 18)[None]
    query, key = torch.randn(1, 18, 70, 128).half(), torch.randn(1, 18, 70, 128).half()
    value = torch.randn(1, 32, 70, 128).half()
    config = default_config(128, True, False)
    tasks = build_tasks(assignment, torch.arange(18)[None], 32, config.members)
    result = prefill_attention(query, key, value, tasks, 128**-0.5)
    scores = (query.double() @ key.double().transpose(2, 3)) * 128**-0.5
    weights = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).softmax(-1)
    wanted = weights[:, assignment[0]] @ value.double()
    assert relative_error(result, wanted, torch.ones(1, 70, dtype=torch.bool)) < 1e-3
    last = decode_attention(
        query[:, :, -1:], key, value, build_tasks(assignment, torch.arange(18)[None], 32, 2), 128**-0.5
    )
    assert relative_error(last, wanted[:, :, -1:], torch.ones(1, 1, dtype=torch.bool)) < 1e-3


def random_assignments() -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
    for seed in range(40):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        num_heads = draw.choice([1, 4, 6, 12, 32, 40])
        group = draw.choice([size for size in (1, 2, 4) if num_heads % size == 0])
        k, rows = draw.randint(1, num_heads), draw.randint(1, 3)
        labels = [torch.cat([torch.arange(k), torch.randint(k, (num_heads - k,))]) for _ in range(rows)]
        assignment = torch.stack([label[torch.randperm(num_heads)] for label in labels])
        yield assignment, torch.randint(5, (rows, k)), group, draw.choice([1, 2, 4, 8])


def test_tasks_cover_every_head_once() -> None:
    for assignment, kv_heads, group, members in random_assignments():
        num_heads = assignment.shape[1]
        tasks = build_tasks(assignment, kv_heads, num_heads // group, members)
        for row, labels in enumerate(assignment.tolist()):
            covered = []
            for entry in tasks.table[row].tolist():
                for slot in range(entry[2]):
                    value_head, bits = entry[3 + slot], entry[3 + members + slot]
                    heads = [value_head * group + i for i in range(group) if bits >> i & 1]
                    assert heads and {labels[head] for head in heads} == {entry[0]}
                    covered += heads
                assert entry[2] == 0 or entry[1] == kv_heads[row, entry[0]]
            assert sorted(covered) == list(range(num_heads))
            for head, leader in enumerate(tasks.leaders[row].tolist()):
                same = [h for h in range(num_heads) if labels[h] == labels[head] and h // group == head // group]
                assert leader == same[0]


def test_tasks_are_written_anew() -> None:
    tasks = empty_tasks(1, 4, 1, 4, 2, torch.device("cpu"))
    for labels in ([0, 0, 0, 0], [0, 0, 0, 0]):
        fill_tasks(tasks, torch.tensor([labels]), torch.tensor([[0]]))
        assert tasks.table[0, :2, 2].tolist() == [2, 2] and not tasks.table[0, 2:, 2].any()
    tasks = empty_tasks(1, 4, 2, 4, 2, torch.device("cpu"))
    for labels, counts in (([0, 0, 0, 1], [2, 1, 1]), ([0, 0, 1, 1], [2, 2, 0])):
        fill_tasks(tasks, torch.tensor([labels]), torch.tensor([[0, 1]]))
        assert tasks.table[0, :, 2].tolist() == counts


def test_no_value_is_read_on_the_host(monkeypatch) -> None:
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket._qualified_op_name not in (
                "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::item",
            ), f"{function} reads a tensor on the host"  # fmt: skip
            return function(*args, **(kwargs or {}))

    with Refuse(), pytest.raises(AssertionError, match="reads a tensor"):
        bool(torch.ones(1) > 0)
    launches = {name: Launches() for name in ("tasks._fill", "decode._decode", "decode._combine", "prefill._prefill")}
    for name, launch in launches.items():
        monkeypatch.setattr(f"chai.kernels.{name}", launch)
    for one_token, seed in itertools.product((True, False), (3, 5, 12)):
        problem = random_problem(seed, one_token)
        problem.query, problem.key, problem.value = (x.half() for x in (problem.query, problem.key, problem.value))
        runs = implementations(problem.inputs)
        for launch in launches.values():
            launch.grids.clear()
        for run in runs.values():
            with Refuse():
                run()
        own = [name for name in runs if name.startswith(("split-KV", "one score"))]
        kernels = ("decode._decode", "decode._combine") if problem.query.shape[2] == 1 else ("prefill._prefill",)
        assert all(len(launches[name].grids) == len(own) > 0 for name in kernels) and launches["tasks._fill"].grids
