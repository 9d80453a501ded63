"""Attention over a KV cache on the CPU: the launcher of csrc/cpu/decode_attention.cpp."""

import torch

from medgpt_kernels import native
from medgpt_kernels.decode_attention.reference import FP8
from medgpt_kernels.native import DTYPE_CODES, fp32, pointer, rows
from medgpt_kernels.registry import Unsupported

native.cpu()

_NONE = (0, 0, 0)


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
    q, k, v = rows(q), rows(k), rows(v)
    cache_seqlens = cache_seqlens.contiguous()
    k_scale, v_scale, sinks, cos, sin = map(fp32, (k_scale, v_scale, sinks, cos, sin))
    batches, tokens, heads, head_dim = q.shape
    pages, page, kv_heads, _ = k_cache.shape
    capacity, table_stride, table_length, half = page, 0, 0, 0
    if block_table is not None:
        block_table = rows(block_table)
        capacity, table_stride = page * block_table.shape[1], block_table.stride(0)
    if cos is not None:
        table_length, half = cos.shape
    out = torch.empty((batches, tokens, heads, head_dim), dtype=q.dtype)
    library.decode_attention(
        DTYPE_CODES[q.dtype],
        k_cache.dtype == FP8,
        batches,
        tokens,
        heads,
        kv_heads,
        head_dim,
        capacity,
        cache_seqlens.data_ptr(),
        pointer(block_table),
        table_stride,
        pages,
        page,
        pointer(cos),
        pointer(sin),
        half,
        table_length,
        pointer(k_scale),
        pointer(v_scale),
        pointer(sinks),
        window_left,
        softmax_scale,
        q.data_ptr(),
        pointer(k),
        pointer(v),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        q.stride()[:3],
        _NONE if k is None else k.stride()[:3],
        _NONE if v is None else v.stride()[:3],
        k_cache.stride()[:3],
        v_cache.stride()[:3],
        out.data_ptr(),
    )
    return out
