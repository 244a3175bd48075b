"""One thread for each core, in which torch's own operations stay single-threaded.

Prefill is made of many products of a few milliseconds. Each split over the cores waits for the slowest at its end and
passes its blocks through the shared cache; one whole task per core keeps them in the core's own (15 to 20 % faster).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_LOCK = threading.Lock()
_POOLS: dict[int, ThreadPoolExecutor] = {}


def run_tasks(work: Callable[[Iterator[T]], None], tasks: Iterable[T]) -> None:
    """Let ``torch.get_num_threads()`` threads run ``work`` on one shared iterator of tasks, and wait for all.

    An exception of any of them is raised here, after the others have ended.
    """
    threads = torch.get_num_threads()
    shared = _Shared(tasks)
    if threads == 1:
        work(shared)
        return
    futures = [_pool(threads).submit(_without_grad, work, shared) for _ in range(threads)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


class _Shared(Iterator[T]):
    """An iterator that several threads draw from."""

    def __init__(self, tasks: Iterable[T]) -> None:
        self._tasks = iter(tasks)
        self._lock = threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            return next(self._tasks)


def _without_grad(work: Callable[[Iterator[T]], None], tasks: Iterator[T]) -> None:
    with torch.inference_mode():  # a mode of the thread, so the caller's own doesn't reach here
        work(tasks)


def _pool(threads: int) -> ThreadPoolExecutor:
    """The pool of so many threads, made when first asked for."""
    with _LOCK:
        if threads not in _POOLS:
            ready = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(threads, "chai-kernel", initializer=_single_threaded)
            for _ in range(threads):
                pool.submit(ready.wait)
            ready.wait()
            torch.set_num_threads(threads)  # what the workers set is also what later threads would start with
            _POOLS[threads] = pool
        return _POOLS[threads]


def _single_threaded() -> None:
    torch.get_num_threads()  # the first call in a thread takes over the setting of the process, so it comes before
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_POOLS.clear)  # a forked process has none of the threads
