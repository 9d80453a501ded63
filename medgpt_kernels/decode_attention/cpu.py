"""Attention over a KV cache on the CPU: the launcher of csrc/cpu/decode_attention.cpp."""

import torch

from medgpt_kernels import native
from medgpt_kernels.attention.cpu import rows
from medgpt_kernels.decode_attention.reference import FP8
from medgpt_kernels.native import DTYPE_CODES, pointer
from medgpt_kernels.registry import Unsupported

native.cpu()

_NONE = (0, 0, 0)


def _contiguous(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def decode_attention(
    q,
    k_cache,
    v_cache,
    cache_seqlens,
    block_table,
    k,
    v,
    k_scale,
    v_scale,
    sinks,
    cos,
    sin,
    window_left,
    softmax_scale,
):
    library = native.cpu()
    if q.dtype not in DTYPE_CODES:
        raise Unsupported(f"q of {q.dtype}")
    q = rows(q)
    if k is not None:
        k, v = rows(k), rows(v)
    cache_seqlens = cache_seqlens.contiguous()
    if block_table is not None:
        block_table = rows(block_table)
    k_scale, v_scale, sinks, cos, sin = (
        _contiguous(x, torch.float32) for x in (k_scale, v_scale, sinks, cos, sin)
    )
    page = k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype)
    library.decode_attention(
        dtype=DTYPE_CODES[q.dtype],
        fp8=k_cache.dtype == FP8,
        batches=q.shape[0],
        tokens=q.shape[1],
        heads=q.shape[2],
        kv_heads=k_cache.shape[2],
        head_dim=q.shape[3],
        capacity=page if block_table is None else page * block_table.shape[1],
        seqlens=pointer(cache_seqlens),
        block_table=pointer(block_table),
        table_stride=0 if block_table is None else block_table.stride(0),
        pages=k_cache.shape[0],
        page=page,
        cos=pointer(cos),
        sin=pointer(sin),
        half=0 if cos is None else cos.shape[1],
        table_length=0 if cos is None else cos.shape[0],
        k_scale=pointer(k_scale),
        v_scale=pointer(v_scale),
        sinks=pointer(sinks),
        window_left=window_left,
        scale=softmax_scale,
        q=pointer(q),
        k=pointer(k),
        v=pointer(v),
        k_cache=pointer(k_cache),
        v_cache=pointer(v_cache),
        q_strides=q.stride()[:3],
        k_strides=_NONE if k is None else k.stride()[:3],
        v_strides=_NONE if v is None else v.stride()[:3],
        k_cache_strides=k_cache.stride()[:3],
        v_cache_strides=v_cache.stride()[:3],
        out=pointer(out),
    )
    return out
