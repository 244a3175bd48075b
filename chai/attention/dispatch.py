"""Choose the fastest implementation of an attention for given shapes and device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from chai.attention import reference
from chai.attention.dense import dense_attention
from chai.attention.gpu import GpuInputs, attention_on_gpu, fused_mha, has_kernels
from chai.attention.grouped import grouped_attention
from chai.attention.sdpa import sdpa_attention
from chai.heads import HeadClusters, KVHeadMap, take_heads

#: Up to this q_len, products over all heads beat one task per cluster on a CPU.
DENSE_ON_CPU = 768
#: Device types of the fast paths; any other runs the reference.
FAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
#: Up to this q_len, products over all heads beat the fused kernel on an accelerator.
DENSE_ON_GPU = 16


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    clusters: HeadClusters | KVHeadMap,
    scaling: float | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute clustered head attention (paper, Section 3.4) by the fastest path for these shapes.

    Args:
        query: ``[B, H, T, D]`` if ``clusters`` is a :class:`HeadClusters`; ``[B, k, T, D]``, queries of the
            representatives alone, if it is a :class:`KVHeadMap`.
        key: ``[B, n, S, D]``, all KV heads, or the stored ones of the map.
        value: ``[B, H_kv, S, D_value]``; ``H_kv`` divides ``H``.
        clusters: Head clusters of each row, or these with the stored KV heads.
        scaling: Factor of the scores; default ``D ** -0.5``.
        mask: ``[B or 1, 1, T, S]``, bool (true: attend) or additive float, hiding later tokens; ``None`` means causal.
        softcap: Bound of the scores, ``softcap * tanh(score / softcap)``, before the mask; ``None``: unbounded.

    Returns:
        ``[B, H, T, D_value]``.

    Raises:
        ValueError: The shapes do not fit each other (stock kernels would broadcast some of them silently).
    """
    _check_shapes(query, key, value, clusters)
    if isinstance(clusters, HeadClusters):
        query = take_heads(query, clusters.representatives)
        clusters = KVHeadMap.all_stored(clusters, key.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device, q_len = query.device.type, query.shape[2]
    if _needs_grad(query, key, value) or device not in FAST_DEVICES:
        return reference.clustered_attention(query, key, value, clusters, scaling, mask, softcap)
    if device == "cuda":
        inputs = GpuInputs(query, key, value, scaling, clusters, mask, softcap)
        if has_kernels(inputs):
            return attention_on_gpu(inputs)
    if q_len <= (DENSE_ON_CPU if device == "cpu" else DENSE_ON_GPU):
        return dense_attention(query, key, value, clusters, scaling, mask, softcap)
    if device == "cpu":
        return grouped_attention(query, key, value, clusters, scaling, mask, softcap)
    if softcap is not None:  # the fused kernel cannot cap scores
        return dense_attention(query, key, value, clusters, scaling, mask, softcap)
    return sdpa_attention(query, key, value, clusters, scaling, mask)


def shared_value_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_map: KVHeadMap,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Compute ``y_h = A_r V_r``: members reuse the output of their representative (paper, Table 4, CHAI-QKV).

    This is multi-head attention of ``k`` heads. Arguments and result as in :func:`clustered_attention` with a map, but
    ``value`` is ``[B, n, S, D_value]``, the values of the stored KV heads.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if not head_map.one_to_one:
        key, value = take_heads(key, head_map.kv_heads), take_heads(value, head_map.kv_heads)
    if mask is None and 1 < q_len < kv_len:
        mask = reference.causal_mask(q_len, kv_len, query.device)
    out = mha_attention(query, key, value, scaling, mask, softcap=softcap)  # [B, T, k, D_value]
    return take_heads(out.transpose(1, 2), head_map.clusters.assignment)


def mha_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None,
    fused: Callable[[], Tensor] | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute multi-head attention by the faster of a fused kernel and plain products.

    The fused kernel of torch decodes half-precision types on a CPU several times slower than plain products do.

    From query ``[B, H, T, D]``, key and value ``[B, H_kv, S, D]`` to ``[B, T, H, D]``; ``fused`` runs another
    fused kernel (default: torch's). With a soft cap, which no fused kernel computes, each head is a cluster of its own.
    """
    if softcap is not None:
        own = torch.arange(query.shape[1], device=query.device).expand(len(query), -1)
        return clustered_attention(query, key, value, HeadClusters(own, own), scaling, mask, softcap).transpose(1, 2)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or not half or query.shape[2] != 1:
        if fused is None:
            fused = partial(_sdpa, query, key, value, scaling, mask)
        return fused_mha(query, key, value, mask, fused) if query.device.type == "cuda" and half else fused()
    batch_size, num_heads, _, head_dim = query.shape
    # One product per KV head for all query heads that read it.
    grouped = (query * scaling).view(batch_size * key.shape[1], -1, head_dim)
    scores = torch.bmm(grouped, key.flatten(0, 1).transpose(1, 2)).view(batch_size, num_heads, 1, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    weights = weights.view(batch_size * value.shape[1], -1, key.shape[2])
    return torch.bmm(weights, value.flatten(0, 1)).view(batch_size, 1, num_heads, -1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    causal, gqa = mask is None and query.shape[2] > 1, key.shape[1] != query.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=gqa
    ).transpose(1, 2)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, clusters: HeadClusters | KVHeadMap) -> None:
    batch_size, query_heads, _, head_dim = query.shape
    if isinstance(clusters, HeadClusters):
        num_heads, expected, num_keys = clusters.num_heads, clusters.num_heads, None
        rows = len(clusters.assignment)
    else:
        num_heads, expected, num_keys = clusters.clusters.num_heads, clusters.clusters.k, clusters.num_stored
        rows = len(clusters.kv_heads)
    if (batch_size, query_heads) != (rows, expected):
        raise ValueError(f"query is {tuple(query.shape)}: expected batch size {rows} and {expected} heads")
    if value.ndim != 4 or num_heads % value.shape[1]:
        raise ValueError(
            f"value is {tuple(value.shape)}: expected [B, N, S, D] with N dividing {num_heads} query heads"
        )
    if num_keys is None and (key.ndim != 4 or num_heads % key.shape[1]):
        raise ValueError(f"key is {tuple(key.shape)}: expected [B, N, S, D] with N dividing {num_heads} query heads")
    if num_keys is not None and key.shape[1] != num_keys:
        raise ValueError(f"key is {tuple(key.shape)}: expected the {num_keys} stored KV heads")
    if {key.shape[0], value.shape[0]} != {batch_size} or key.shape[2] != value.shape[2] or key.shape[3] != head_dim:
        raise ValueError(f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}, value {tuple(value.shape)}")
