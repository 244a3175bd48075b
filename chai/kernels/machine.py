"""What this machine multiplies fast."""

from __future__ import annotations

from functools import cache

import torch


@cache
def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type in which matrices of ``dtype`` are multiplied fastest.

    On a CPU without instructions for bfloat16 or float16 their products are emulated, several times slower than
    float32's.
    """
    if device != "cpu":
        return dtype
    if dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def scores_by_rows(dtype: torch.dtype) -> bool:
    """Whether one token's scores are faster as keys times queries than as queries times transposed keys.

    MKL reads rows of fp32 keys as they lie, at the memory's speed, and transposed ones up to three times slower; oneDNN
    is a quarter faster on transposed keys of half precision.
    """
    return dtype.itemsize > 2
