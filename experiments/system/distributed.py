"""Several processes that score together, each with the whole model: ``torchrun`` or ``accelerate launch`` starts them.

They cut the requests into the same batches as one process would, each answers every n-th of them, and all get all
answers. So the numbers are those of one process, not just nearly. The first process (rank 0) leads: it alone holds a
run's lock, writes the run's folder and prints; the others score what it tells them to.

Whatever the processes tell each other is one round in which each hears what all say. A process that failed says so in
the next round instead of what was expected, hence a failure of one is the failure of all, and nobody waits for ever.
Gloo does the talking, for answers are small and the model's forward needs no other process.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from experiments.config.schema import ConfigError
from experiments.evaluation.responses import FILE
from experiments.runs.experiment import describe
from experiments.runs.folder import RunError
from experiments.system.processes import processes

PATIENCE = timedelta(days=7)  # a process may be that much slower than another; one that is gone is noticed at once
POLL = 0.02  # seconds between two looks whether a round is over; signals are handled meanwhile

SHARE = "answers.rank{}.jsonl"  # of each process but the leader

T = TypeVar("T")

#: What a process says in a round: what kind of thing, and the thing.
Word = tuple[str, Any]


@dataclass
class Team:
    """The processes that score together; a process by itself is a team of one.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1
    _heard: Word | None = field(default=None, repr=False)  # what the leader said when something else was due
    _trouble: str = field(default="", repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process has the run's folder."""
        return self.rank == 0

    def own(self, parts: Sequence[T]) -> Sequence[T]:
        """The parts of a piece of work that are this process's; the longest come first, so that all get as much."""
        return parts[self.rank :: self.size]

    def share(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` returns in each process, in all of them.

        Raises:
            RunError: it failed in another process, which is named; or one has ended.
            Exception: what it raised in this process.
        """
        if self.size == 1:
            return [work()]
        error: Exception | None = None
        try:
            said: Word = ("share", work())
        except Exception as caught:
            said, error = ("failed", describe(caught)), caught
        heard = self._round(said)
        if error is not None:
            raise error
        if not self.leads and heard[0][0] in ("command", "end"):  # the leader has failed since the last round
            self._heard = heard[0]
            raise RunError("process 0 has failed")
        for rank, (kind, thing) in enumerate(heard):
            if kind != "share":
                raise RunError(f"process {rank}: {thing}")
        return [thing for _, thing in heard]

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in this process, if it fails in none; raises as :meth:`share` does."""
        found: list[T] = []

        def keep() -> None:
            found.append(work())

        self.share(keep)
        return found[0]

    def from_leader(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the leading process, which alone does it; raises as :meth:`share` does."""
        return self.share(work if self.leads else lambda: None)[0]  # type: ignore[arg-type, return-value]

    def command(self, thing: Any) -> None:
        """Of the leader: let the others do ``thing``.

        Raises:
            RunError: one has ended.
        """
        if self.size > 1:
            self._round(("command", thing))

    def dismiss(self) -> None:
        """Of the leader: the others have nothing more to do."""
        if self.size > 1:
            self._round(("end", None))

    def follow(self, work: Callable[[Any], object]) -> None:
        """Of the others: do what the leader says, until it dismisses them; a failure is told and then forgotten.

        Raises:
            RunError: a process has ended.
        """
        while True:
            word, self._heard = self._heard or self._round(("failed", self._trouble or "had nothing to do"))[0], None
            if word[0] == "end":
                return
            if word[0] == "command":
                try:
                    self._trouble = ""
                    work(word[1])
                except Exception as error:
                    self._trouble = describe(error)

    def _round(self, said: Word) -> list[Word]:
        """What every process says."""
        try:
            content = torch.frombuffer(bytearray(pickle.dumps(said)), dtype=torch.uint8)
            length = torch.tensor([len(content)])
            lengths = [torch.zeros_like(length) for _ in range(self.size)]
            _wait(torch.distributed.all_gather(lengths, length, async_op=True))
            room = torch.zeros(int(max(lengths)), dtype=torch.uint8)
            room[: len(content)] = content
            rooms = [torch.zeros_like(room) for _ in range(self.size)]
            _wait(torch.distributed.all_gather(rooms, room, async_op=True))
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise RunError(f"another process of this run has ended ({reason})") from None
        return [pickle.loads(bytes(one[: int(size)].tolist())) for one, size in zip(rooms, lengths, strict=True)]


#: A process by itself.
ALONE = Team()


def _wait(work: Any) -> None:
    while not work.is_completed():
        time.sleep(POLL)
    work.wait()  # raises what went wrong


def join() -> Team:
    """The team of this process, by what the launcher has put into the environment.

    Raises:
        RunError: the others can't be reached.
    """
    if processes() == 1:
        return Team()
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"can't reach the other processes: {(str(error).splitlines() or [''])[0]}") from None
        atexit.register(torch.distributed.destroy_process_group)
    return Team(torch.distributed.get_rank(), torch.distributed.get_world_size())


def own_device(device: str, device_map: Any) -> str:
    """The device of this process: where there is a choice of GPUs, each process of a machine takes one.

    Raises:
        ConfigError: one device for all, or a model that is divided, with several processes.
    """
    if processes() == 1:
        return device
    if device_map is not None:
        raise ConfigError(
            f"model.device_map={device_map} divides the model, and {processes()} processes would each do so: "
            "give model.device_map=null, or start one process"
        )
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device={device} puts {processes()} processes on one GPU; valid: device=cuda, a GPU for each"
        )
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def own_share(rank: int) -> str:
    """The file of a process's own answers: ``answers.jsonl`` of the leader, ``answers.rank1.jsonl`` ..."""
    return FILE if rank == 0 else SHARE.format(rank)


def shares(folder: Path, team: Team) -> list[str]:
    """Names of the files that the processes other than the leader write, or have left in an earlier start."""
    left = (path.name for path in folder.glob(SHARE.format("*")))
    return sorted({*left, *(own_share(rank) for rank in range(1, team.size))})
