"""CUDA graphs of functions over static buffers."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Runs functions that read and write static buffers, from their second call on as a CUDA graph.

    The first call of a key runs as it is, which compiles kernels and lets libraries allocate what they keep. Graphs
    stay for later requests and share their memory: one runs at a time.

    Args:
        device: Where the functions run.
        generator: Whose random numbers they draw.
        captures: False: every call runs as it is.
    """

    def __init__(self, device: torch.device, generator: torch.Generator, captures: bool) -> None:
        self._generator, self._seen, self._graphs = generator, set[Hashable](), dict[Hashable, torch.cuda.CUDAGraph]()
        self._captures, self._pool, self._stream = captures, None, None
        if captures:
            self._pool = torch.cuda.graph_pool_handle()
            # The stream of torch.cuda.graph is one for the process, on the device that captured first.
            self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run ``function``, which must do the same for the same key."""
        if not self._captures or key not in self._seen:
            function()
            self._seen.add(key)
            return
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._generator)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
            self._graphs[key] = graph
        self._graphs[key].replay()
