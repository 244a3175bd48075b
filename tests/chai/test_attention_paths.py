"""The fast paths against the slow loop, over random shapes, types, masks and memberships."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import chai.attention.grouped
from chai.attention import clustered_attention, mha_attention, reference
from chai.attention.dense import dense_attention
from chai.attention.grouped import grouped_attention
from chai.attention.sdpa import sdpa_attention
from chai.cpu import run_tasks
from chai.heads import HeadClusters, KVHeadMap
from tests.oracle import attend_one_by_one

PATHS = {
    "reference": reference.clustered_attention,
    "dense": dense_attention,
    "grouped": grouped_attention,
    "sdpa": sdpa_attention,
    "dispatched": clustered_attention,
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SIZES = ["giant", "singletons", "any"]


@some.composite
def problems(draw):
    """Queries, keys, values, a membership and a mask, with their dtype."""
    group = draw(some.sampled_from([1, 2, 4]))
    key_heads = draw(some.integers(1, 4))
    heads = group * key_heads
    k = draw(some.integers(1, heads))
    rows, count, past = draw(some.integers(1, 3)), draw(some.sampled_from([1, 2, 5, 9])), draw(some.integers(0, 6))
    size, length = draw(some.sampled_from([4, 8])), count + past
    generator = torch.Generator().manual_seed(draw(some.integers(0, 10_000)))
    shape = draw(some.sampled_from(SIZES))
    clusters = []
    for _ in range(rows):
        representatives = torch.randperm(heads, generator=generator)[:k].sort().values
        if shape == "giant":  # all that represents nothing follows the first
            assignment = torch.zeros(heads, dtype=torch.long)
        else:
            assignment = torch.randint(k, (heads,), generator=generator)
        assignment[representatives] = torch.arange(k)
        clusters.append((assignment, representatives))
    if shape == "singletons":
        own = torch.arange(heads)
        clusters, k = [(own, own)] * rows, heads
    dtype = draw(some.sampled_from(list(TOLERANCE)))
    query = torch.randn(rows, heads, count, size, generator=generator).to(dtype)
    key, value = (torch.randn(rows, key_heads, length, size, generator=generator).to(dtype) for _ in range(2))
    mask = torch.ones(count, length, dtype=torch.bool).tril(past).repeat(rows, 1, 1, 1)
    kind = draw(some.sampled_from(["none", "causal", "padding", "additive"]))
    if kind in ("padding", "additive"):
        for row in range(rows):
            mask[row, :, :, : draw(some.integers(0, past))] = False  # padding left of what every query sees
    membership = HeadClusters(*(torch.stack(parts) for parts in zip(*clusters, strict=True)))
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    given_mask = {"none": None, "causal": mask, "padding": mask, "additive": additive.to(dtype)}[kind]
    return query, key, value, membership, given_mask, additive, draw(some.sampled_from([1.0, size**-0.5]))


def run(path, query, key, value, clusters, scaling, mask, all_keys=False, softcap=None):
    """A fast path on what a compacted cache (or one with all keys) would give it."""
    build = KVHeadMap.all_stored if all_keys else KVHeadMap.only_read
    plan = build(clusters, key.shape[1])
    kept = torch.stack([own[heads] for own, heads in zip(key, plan.stored, strict=True)])
    chosen = torch.stack([own[heads] for own, heads in zip(query, clusters.representatives, strict=True)])
    return path(chosen, kept, value, plan, scaling, mask, *([] if softcap is None else [softcap]))


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    all_keys=some.booleans(),
    block=some.sampled_from([3, 256]),
    softcap=some.sampled_from([None, 0.7]),
)
def test_every_path_equals_the_slow_loop(name, problem, all_keys, block, softcap):
    softcap = None if name == "sdpa" else softcap  # the fused kernel has none, and is not chosen then
    query, key, value, clusters, mask, additive, scaling = problem
    previous, chai.attention.grouped.BLOCK = chai.attention.grouped.BLOCK, block
    try:
        with torch.no_grad():
            actual = run(PATHS[name], query, key, value, clusters, scaling, mask, all_keys, softcap)
    finally:
        chai.attention.grouped.BLOCK = previous
    sources = clusters.representatives.gather(1, clusters.assignment)
    expected = attend_one_by_one(query, key, value, scaling, additive, sources, tokens=0, softcap=softcap)
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCE[query.dtype], (name, query.dtype, float(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5, 8])
@torch.no_grad()
def test_long_prompts_equal_the_reference(dtype, k):
    """Several blocks of query rows, single heads through the stock kernel, a first part that came before."""
    generator = torch.Generator().manual_seed(k)
    query, key, value = (torch.randn(2, 8, 600, 16, generator=generator).to(dtype) for _ in range(3))
    representatives = torch.stack([torch.randperm(8, generator=generator)[:k].sort().values for _ in range(2)])
    assignment = torch.randint(k, (2, 8), generator=generator)
    assignment.scatter_(1, representatives, torch.arange(k).expand(2, -1))
    clusters = HeadClusters(assignment, representatives)
    for count in (600, 595, 300):
        late = query[:, :, -count:]
        actual = run(grouped_attention, late, key, value, clusters, 0.25, None)
        exact = (late.float(), key.float(), value.float())
        expected = run(reference.clustered_attention, *exact, clusters, 0.25, None, all_keys=True)
        error = (actual.float() - expected).norm() / expected.norm()
        assert float(error) < TOLERANCE[dtype], count


def test_paths_through_which_gradients_flow():
    """With gradients wanted, the choice falls on the path that has them, for any length."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 300, 8, generator=generator) for _ in range(3))
    clusters = HeadClusters(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 3]]))
    plan = KVHeadMap.all_stored(clusters, 4)
    chosen = query[:, [0, 3]].requires_grad_()
    clustered_attention(chosen, key, value, plan, 0.5, None).sum().backward()
    assert chosen.grad is not None and float(chosen.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [8, 2])
@torch.no_grad()
def test_all_heads_decode_like_stock(dtype, key_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, 1, 16, generator=generator).to(dtype)
    key, value = (torch.randn(3, key_heads, 21, 16, generator=generator).to(dtype) for _ in range(2))
    mask = torch.ones(3, 1, 1, 21, dtype=torch.bool)
    mask[0, :, :, :4] = False
    for form in (None, mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)):
        own = form.float() if form is not None and form.dtype != torch.bool else form
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=own, scale=0.25, enable_gqa=True
        ).transpose(1, 2)
        actual = mha_attention(query, key, value, 0.25, form, lambda expected=expected: expected)
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert float(error) < TOLERANCE[dtype]


def test_workers_do_every_task_once_and_leave_torch_as_it_was():
    before, done = torch.get_num_threads(), []
    threads = set()

    def work(tasks):
        threads.add(threading.get_ident())
        for task in tasks:
            done.append((task, torch.get_num_threads()))

    run_tasks(work, range(50))
    assert sorted(task for task, _ in done) == list(range(50))
    assert before == 1 or {inside for _, inside in done} == {1}
    assert before == 1 or threading.get_ident() not in threads
    assert torch.get_num_threads() == before


def test_an_exception_of_a_worker_reaches_the_caller():
    def work(tasks):
        for task in tasks:
            if task == 3:
                raise ZeroDivisionError("task 3")

    with pytest.raises(ZeroDivisionError, match="task 3"):
        run_tasks(work, range(10))
    run_tasks(lambda tasks: list(tasks), range(3))  # the threads live on
