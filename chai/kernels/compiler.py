"""Triton, if it is installed, and where its kernels can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels are then never called, but their modules can be imported

    def _jit(function: Callable | None = None, **options: Any) -> Any:
        return function if function is not None else _jit

    triton, tl = cast("Any", SimpleNamespace(jit=_jit)), cast("Any", None)

#: Whether Triton is installed.
INSTALLED = tl is not None


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (``TRITON_INTERPRET=1``, read when they are imported)."""
    return INSTALLED and bool(triton.knobs.runtime.interpret)


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of ``device``: on a CUDA device, or anywhere if they are interpreted."""
    return INSTALLED and (device.type == "cuda" or is_interpreted())


@dataclass(frozen=True)
class Case:
    """A kernel with its types and constants, to be compiled without a GPU."""

    name: str
    kernel: Any
    signature: dict[str, str]  # type of each argument that is not constant, such as "*bf16" and "i32"
    constants: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages
    architectures: tuple[int, ...] = (80, 90)  # for which it is meant
