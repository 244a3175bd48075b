"""The batches of a scoring: shared among processes, restored if they were saved, in the order of their requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from experiments.evaluation.responses import BatchResponses, Response, SavedResponses
from experiments.system.distributed import ProcessGroup


@dataclass
class Batch:
    """A batch that has to be computed: its requests, and what the scoring fills in."""

    key: str
    positions: list[int]
    responses: Sequence[Response] = ()
    cache_stats: list[dict[str, Any]] = field(default_factory=list)  # one entry: of the only forward pass or generation


class Batches:
    """Batches of requests, of which this process computes its shard.

    Args:
        positions: The positions of each batch's requests.
        key: Returns the name of a batch in the saved responses, from its number and its positions.
        saved: Responses of earlier attempts.
        group: The processes that share the batches.
        progress: Called with the number of this process's requests that are done, and their total.
    """

    def __init__(
        self,
        positions: list[list[int]],
        key: Callable[[int, list[int]], str],
        saved: SavedResponses | None,
        group: ProcessGroup,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.own = group.shard(list(enumerate(positions)))
        self.key, self.saved, self.group, self.progress = key, saved, group, progress
        self.restored_before = self._restored()
        self.responses: dict[int, Any] = {}  # by the position of their request
        self.cache_stats: list[dict[str, Any]] = []

    def missing(self, description: str, *, disable_tqdm: bool) -> Iterator[Batch]:
        """Yield each batch that is not saved; its responses are taken, and saved, when the next one is asked for."""
        total = sum(len(positions) for _, positions in self.own)
        with tqdm(total=total, desc=description, disable=disable_tqdm or not self.group.is_main_process) as bar:
            for number, positions in self.own:
                key = self.key(number, positions)
                done = self.saved.find(key) if self.saved else None
                if done is None:
                    batch, began = Batch(key, positions), time.perf_counter()
                    yield batch
                    (stats,) = batch.cache_stats
                    done = BatchResponses(list(batch.responses), stats, time.perf_counter() - began)
                    if self.saved:
                        self.saved.add(key, done)
                self.responses.update(zip(positions, done.responses, strict=True))
                self.cache_stats.append(done.cache_stats)
                bar.update(len(positions))
                if self.progress is not None:
                    self.progress(bar.n, total)

    def gather(self) -> tuple[list[Any], list[dict[str, Any]]]:
        """Return the responses of all processes, by position, and the cache sizes of all batches."""
        restored, stats = self.restored_before, []
        responses = dict(self.responses)
        for shard in self.group.all_gather((self.responses, self.cache_stats, self._restored() - self.restored_before)):
            responses |= shard[0]
            stats += shard[1]
            restored += shard[2]
        if self.saved:
            self.saved.restored = restored
        return [responses[position] for position in range(len(responses))], stats

    def _restored(self) -> int:
        return self.saved.restored if self.saved else 0
