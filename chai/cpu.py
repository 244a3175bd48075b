"""CPU execution: the fastest GEMM type, and a pool of one thread per core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

_LOCK = threading.Lock()
_POOLS: dict[int, ThreadPoolExecutor] = {}


@cache
def gemm_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the type in which matrices of ``dtype`` are multiplied fastest.

    A CPU without bfloat16 or float16 instructions emulates their products, several times slower than float32's.
    """
    if device != "cpu":
        return dtype
    if dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def keys_times_query(dtype: torch.dtype) -> bool:
    """Whether the scores of one token are faster as ``K q`` than as ``q K^T``.

    MKL reads fp32 keys row by row at the speed of memory, but transposed keys up to three times slower. oneDNN is a
    quarter faster on transposed keys of half precision.
    """
    return dtype.itemsize > 2


def run_tasks(work: Callable[[Iterator[T]], None], tasks: Iterable[T]) -> None:
    """Run ``work`` on one shared iterator of tasks in ``torch.get_num_threads()`` threads, and wait for all.

    Torch operations are single-threaded inside. Prefill consists of many products of a few milliseconds: split over
    the cores, each waits for its slowest part and passes its blocks through the shared cache. One whole task per core
    keeps the blocks in the core's own cache (15 to 20 % faster).

    Raises:
        Exception: The first exception of any thread, after the others have ended.
    """
    threads = torch.get_num_threads()
    shared = _SharedIterator(tasks)
    if threads == 1:
        work(shared)
        return
    futures = [_pool(threads).submit(_without_grad, work, shared) for _ in range(threads)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


class _SharedIterator(Iterator[T]):
    """An iterator that several threads may advance."""

    def __init__(self, tasks: Iterable[T]) -> None:
        self._tasks = iter(tasks)
        self._lock = threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            return next(self._tasks)


def _without_grad(work: Callable[[Iterator[T]], None], tasks: Iterator[T]) -> None:
    with torch.inference_mode():  # the mode is per thread, so that of the caller has no effect here
        work(tasks)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the pool of this many threads; create it at the first use."""
    with _LOCK:
        if threads not in _POOLS:
            ready = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(threads, "chai-kernel", initializer=_single_threaded)
            for _ in range(threads):
                pool.submit(ready.wait)
            ready.wait()
            torch.set_num_threads(threads)  # the setting of the workers is also the default of later threads
            _POOLS[threads] = pool
        return _POOLS[threads]


def _single_threaded() -> None:
    torch.get_num_threads()  # the first call in a thread adopts the setting of the process, so it must come first
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_POOLS.clear)  # a forked process has none of the threads
