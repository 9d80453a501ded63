"""Attention over a KV cache in eager PyTorch: the specification.

B sequences of S new tokens, H query heads, G key and value heads, D head_dim, n keys of one
sequence; caches [B, S_max, G, D] or [pages, page, G, D].
"""

import torch

from medgpt_kernels.attention.reference import probabilities, visible
from medgpt_kernels.rotary.reference import rotate

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantize(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x [n, G, D] over scale [G], divided in fp32 and saturated, as fp8 e4m3."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        wide = wide / scale[:, None]
    return wide.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _slots(positions, sequence, block_table, page) -> tuple:
    """Where positions of one sequence lie: the first two indices of a cache."""
    if block_table is None:
        return torch.full_like(positions, sequence), positions
    return block_table[sequence, positions // page].long(), positions % page


def _append(cache, slots, rows, scale) -> None:
    if cache.dtype == FP8:
        cache.view(torch.uint8)[slots] = quantize(rows, scale).view(torch.uint8)
    else:
        cache[slots] = rows


def _read(cache, slots, scale, dtype) -> torch.Tensor:
    """Rows [n, G, D] in `dtype`; fp8 is widened and scaled first."""
    if cache.dtype != FP8:
        return cache[slots]
    rows = cache.view(torch.uint8)[slots].view(FP8)
    wide = rows.to(torch.promote_types(dtype, torch.float32))
    return (wide if scale is None else wide * scale[:, None]).to(dtype)


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
    tokens, page, group = q.shape[1], k_cache.shape[1], q.shape[2] // k_cache.shape[2]
    out = q.new_zeros(q.shape)
    for b, length in enumerate(cache_seqlens.tolist()):
        if length < 0:
            continue
        total = length if k is None else length + tokens
        at = torch.arange(total - tokens, total, device=q.device)
        qn, kn = q[b], None if k is None else k[b]
        if cos is not None:
            qn, kn = (rotate(x, cos[at], sin[at]) for x in (qn, kn))
        if k is not None:
            slots = _slots(at, b, block_table, page)
            _append(k_cache, slots, kn, k_scale)
            _append(v_cache, slots, v[b], v_scale)
        first = 0 if window_left < 0 else max(0, total - tokens - window_left)
        slots = _slots(torch.arange(first, total, device=q.device), b, block_table, page)
        kn, vn = _read(k_cache, slots, k_scale, q.dtype), _read(v_cache, slots, v_scale, q.dtype)
        keep = visible(tokens, total - first, window_left, 0, q.device)
        p, _ = probabilities(qn, kn, keep, sinks, softmax_scale)
        vn = vn.repeat_interleave(group, dim=1)
        out[b] = torch.einsum("hqk,khd->qhd", p.to(vn.dtype), vn)
    return out
