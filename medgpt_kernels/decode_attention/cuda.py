"""Attention over a KV cache in CUDA C++: launchers of csrc/cuda/decode_attention.cu.

B sequences of S new tokens, H query heads, D head_dim. Two launches whose shapes come from maxima
alone; more than 16 new tokens are Triton's.
"""

import torch

from medgpt_kernels import native
from medgpt_kernels.decode_attention.reference import FP8
from medgpt_kernels.native import DTYPE_CODES, fp32, pointer, rows
from medgpt_kernels.registry import PassedOn, Unsupported

native.cuda()
MAX_TOKENS, SPLIT, MAX_SCRATCH = 16, 256, 2**28  # bytes
_NONE = (0, 0, 0)


def _splits(capacity: int, window_left: int, tokens: int) -> int:
    """Splits that one sequence's keys can touch; they start at multiples of SPLIT."""
    most = max(1, -(-capacity // SPLIT))
    if window_left < 0:
        return most
    return min(most, -(-(window_left + tokens - 1) // SPLIT) + 1)


def _check(q, k_cache, v_cache) -> None:
    if q.dtype not in DTYPE_CODES:
        raise Unsupported(f"q of {q.dtype}")
    if q.shape[1] > MAX_TOKENS:
        raise PassedOn(f"{q.shape[1]} new tokens: not few")
    if q.shape[3] % 8:
        raise PassedOn(f"head_dim {q.shape[3]}, no multiple of 8")
    step = 8 if k_cache.dtype == FP8 else 16 // k_cache.itemsize  # elements of one load
    for cache in (k_cache, v_cache):
        if cache.data_ptr() % (step * cache.itemsize) or any(s % step for s in cache.stride()[:3]):
            raise PassedOn("a cache whose rows do not start on 16 bytes")


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
    _check(q, k_cache, v_cache)
    q, k, v, block_table = rows(q), rows(k), rows(v), rows(block_table)
    cache_seqlens = cache_seqlens.contiguous()
    k_scale, v_scale, sinks, cos, sin = map(fp32, (k_scale, v_scale, sinks, cos, sin))
    batches, tokens, heads, head_dim = q.shape
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    splits = _splits(capacity, window_left, tokens)
    shape = (batches, tokens, heads, splits, head_dim + 2)
    if 4 * batches * tokens * heads * splits * (head_dim + 2) > MAX_SCRATCH:
        raise PassedOn(f"scratch of {list(shape)}")
    parts = torch.empty(shape, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    device, stream = native.place(q)
    native.cuda(device).decode_attention(
        device=device,
        stream=stream,
        dtype=DTYPE_CODES[q.dtype],
        fp8=k_cache.dtype == FP8,
        batches=batches,
        tokens=tokens,
        heads=heads,
        kv_heads=k_cache.shape[2],
        head_dim=head_dim,
        capacity=capacity,
        pages=k_cache.shape[0],
        page=page,
        seqlens=pointer(cache_seqlens),
        block_table=pointer(block_table),
        table_stride=0 if block_table is None else block_table.stride(0),
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
        splits=splits,
        parts=pointer(parts),
        out=pointer(out),
    )
    return out
