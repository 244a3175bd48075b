"""Data-parallel scoring: processes started by ``torchrun`` or ``accelerate launch``, each with the whole model.

In each round every process contributes one message and receives those of all. A process that failed contributes its
failure to the next round, whatever its purpose, so all processes fail together and none waits forever.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch.distributed

from experiments.system.processes import world_size

#: Longest wait for a slower process; one that has died is noticed at once.
TIMEOUT = timedelta(days=7)

T = TypeVar("T")

#: One process's part of a round: its kind, and the value, the reason of a failure or the command.
Message = tuple[Literal["value", "failed", "command", "shutdown"], Any]


class DistributedError(Exception):
    """Raised when another process failed, died or cannot be reached. The message is one line."""


@dataclass
class ProcessGroup:
    """Processes that score together; ``ProcessGroup()`` is a single process, which receives its own messages."""

    rank: int = 0
    world_size: int = 1
    describe: Callable[[Exception], str] = repr  # one line for the other processes to report
    _next_message: Message | None = field(default=None, repr=False)  # of rank 0, received instead of a value
    _failure: str = field(default="", repr=False)

    @property
    def is_main_process(self) -> bool:
        """True for rank 0, which owns the run folders."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return every ``world_size``-th item; items sorted by length give shards of equal work."""
        return items[self.rank :: self.world_size]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; a DistributedError if another process failed or died."""
        return self._gather(("value", value))

    def broadcast(self, value: T) -> T:
        """Return rank 0's value in every process."""
        return self.all_gather(value)[0]

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Return this process's ``work()`` once it has succeeded in every process; a DistributedError otherwise."""
        try:
            result = work()
        except Exception as error:
            with suppress(DistributedError):
                self._gather(("failed", self.describe(error)))
            raise
        self._gather(("value", None))
        return result

    def send_command(self, command: Any) -> None:
        """Let the worker loops of the other processes run ``command`` (rank 0 only)."""
        self._exchange(("command", command))

    def shutdown(self) -> None:
        """End the worker loops of the other processes (rank 0 only)."""
        self._exchange(("shutdown", None))

    def worker_loop(self, run: Callable[[Any], object]) -> None:
        """Run rank 0's commands until shutdown; a failing command is reported in the next round and then forgotten."""
        while True:
            message, self._next_message = self._next_message, None
            kind, command = message or self._exchange(("failed", self._failure or "received no command"))[0]
            if kind == "shutdown":
                return
            if kind == "command":
                self._failure = ""
                try:
                    run(command)
                except Exception as error:
                    self._failure = self.describe(error)

    def _gather(self, message: Message) -> list[Any]:
        """Return the values of a round to which every process must contribute one."""
        messages = self._exchange(message)
        if not self.is_main_process and messages[0][0] in ("command", "shutdown"):
            # Rank 0 failed since the last round and is past this one: keep its message for the worker loop.
            self._next_message = messages[0]
            raise DistributedError("process 0 has failed")
        for rank, (kind, reason) in enumerate(messages):
            if kind != "value":
                raise DistributedError(f"process {rank}: {reason}")
        return [value for _, value in messages]

    def _exchange(self, message: Message) -> list[Message]:
        if self.world_size == 1:
            return [message]
        messages: list[Any] = [None] * self.world_size
        errors: list[Exception] = []

        def gather() -> None:
            try:
                torch.distributed.all_gather_object(messages, message)
            except Exception as error:
                errors.append(error)

        # all_gather_object blocks in C++, where no Python signal handler runs: wait for it in another thread.
        thread = threading.Thread(target=gather, daemon=True)
        thread.start()
        thread.join()
        if errors:
            if not isinstance(errors[0], RuntimeError):
                raise errors[0]
            reason = (str(errors[0]).splitlines() or [""])[0][:200]
            raise DistributedError(f"another process of this run has ended ({reason})")
        return messages


def init_distributed(describe: Callable[[Exception], str] = repr) -> ProcessGroup:
    """Return the group of the launcher's processes; a DistributedError if they cannot be reached."""
    if world_size() == 1:
        return ProcessGroup()
    if not torch.distributed.is_initialized():
        try:
            # Gloo is enough: messages are small, and the model's forward needs no communication.
            torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DistributedError(f"cannot reach the other processes: {reason}") from None
        atexit.register(torch.distributed.destroy_process_group)
    return ProcessGroup(torch.distributed.get_rank(), torch.distributed.get_world_size(), describe)
