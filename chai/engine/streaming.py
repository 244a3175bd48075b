"""Read generated tokens while the device works on the next ones."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenReader:
    """Copies the tokens of a step to the host without waiting for later steps.

    On a CUDA device the copy runs on a stream of its own, behind the step that wrote the tokens, and starts after the
    next step has been launched: while the host waits for it, the device has work.

    Args:
        sequence: long ``[places, B]``, where step after step writes its tokens.
        stream: Of the copies, on a CUDA device.
    """

    def __init__(self, sequence: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._sequence, self._events, self._stream = sequence, dict[int, torch.cuda.Event](), stream
        #: Steps that are launched before the tokens of a step are read.
        self.lag = 0
        if stream is not None:
            self.lag = 1
            self._host = torch.empty(sequence.shape[1], dtype=torch.long, pin_memory=True)
            self._copied = torch.cuda.Event()

    def mark(self, place: int) -> None:
        """Note that what has been launched so far writes the tokens of this place."""
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._sequence.device))
            self._events[place] = event

    def read(self, place: int) -> Tensor:
        """Return the tokens of a marked place, long ``[B]`` on the CPU; waits until they are there."""
        if self._stream is None:
            return self._sequence[place].cpu().clone()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._events.pop(place))
            self._host.copy_(self._sequence[place], non_blocking=True)
            self._copied.record(self._stream)
        self._copied.synchronize()
        return self._host.clone()
