"""Attention over a KV cache in Triton, for CUDA and ROCm: append, one launch per split, join.

B sequences of S new tokens, H query heads, G key heads, P = H / G query heads of one key head,
D head_dim, M and N rows and columns of a tile of scores. Row r of one key head is query r // P of
head g P + r % P. fp8 is taken apart by integer arithmetic: not every card has e4m3.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from medgpt_kernels import aot, tiles
from medgpt_kernels.attention.triton_fwd import (
    LOG2_E,
    MAX_WINDOW,
    NO_SCORE,
    _load_rotated_tile,
    _load_tile,
    check_call,
    dense,
)
from medgpt_kernels.decode_attention.reference import FP8
from medgpt_kernels.rotary.triton import rows

FEW_TOKENS = 16  # more new tokens than this are not split over the keys


@triton.jit
def _from_fp8(code):
    """e4m3 codes as fp32."""
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code >= 0x80, -value, value)


@triton.jit
def _to_fp8(x):
    """fp32 as e4m3 codes, to nearest even and saturated."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    whole = magnitude.to(tl.int32, bitcast=True)
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - (120 << 3)
    small = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(magnitude < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _row_offset(BlockTable, b, j, inside, stride_table, stride_b, stride_t, PAGE: tl.constexpr):
    """Elements from a cache's start to the rows of keys j of sequence b."""
    if BlockTable is None:
        offset = b.to(tl.int64) * stride_b + j.to(tl.int64) * stride_t
    else:
        page = tl.load(BlockTable + b.to(tl.int64) * stride_table + j // PAGE, mask=inside, other=0)
        offset = page.to(tl.int64) * stride_b + (j % PAGE).to(tl.int64) * stride_t
    return offset


@triton.jit
def _store(Cache, offset, x, scale, mask, FP8_CACHE: tl.constexpr, dtype: tl.constexpr):
    if FP8_CACHE:
        wide = x.to(dtype).to(tl.float32)
        tl.store(Cache + offset, _to_fp8(tl.div_rn(wide, tl.zeros_like(wide) + scale)), mask=mask)
    else:
        tl.store(Cache + offset, x.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["capacity", "table_length"])
def _decode_append_kernel(
    KCache,
    VCache,
    K,
    V,
    CacheSeqlens,
    BlockTable,
    KScale,
    VScale,
    Cos,
    Sin,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_kc_b,
    stride_kc_t,
    stride_kc_h,
    stride_vc_b,
    stride_vc_t,
    stride_vc_h,
    stride_table,
    capacity,
    table_length,
    TOKENS,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    FP8_CACHE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    g = tl.program_id(0) % KV_HEADS
    token = tl.program_id(0) // KV_HEADS % TOKENS
    b = tl.program_id(0) // KV_HEADS // TOKENS
    length = tl.load(CacheSeqlens + b)
    at = length + token
    inside = (length >= 0) & (at < capacity)
    g_wide, b_wide, token_wide = g.to(tl.int64), b.to(tl.int64), token.to(tl.int64)
    dtype: tl.constexpr = K.dtype.element_ty
    k_scale = 1.0 if KScale is None else tl.load(KScale + g)
    v_scale = 1.0 if VScale is None else tl.load(VScale + g)
    K += b_wide * stride_k_b + token_wide * stride_k_t + g_wide * stride_k_h
    V += b_wide * stride_v_b + token_wide * stride_v_t + g_wide * stride_v_h
    KCache += g_wide * stride_kc_h + _row_offset(
        BlockTable, b, at, inside, stride_table, stride_kc_b, stride_kc_t, PAGE
    )
    VCache += g_wide * stride_vc_h + _row_offset(
        BlockTable, b, at, inside, stride_table, stride_vc_b, stride_vc_t, PAGE
    )
    d = tl.arange(0, BLOCK_D)
    mask = inside & (d < HEAD_DIM)
    v = tl.load(V + d, mask=mask, other=0)
    _store(VCache, d, v, v_scale, mask, FP8_CACHE, dtype)
    if Cos is not None:
        i = tl.arange(0, BLOCK_HALF)
        turned = inside & (i < HALF)
        where = at.to(tl.int64) * HALF + i
        known = turned & (at < table_length)
        cos = tl.load(Cos + where, mask=known, other=float("nan"))
        sin = tl.load(Sin + where, mask=known, other=float("nan"))
        first = tl.load(K + i, mask=turned, other=0).to(tl.float32)
        second = tl.load(K + i + HALF, mask=turned, other=0).to(tl.float32)
        _store(KCache, i, first * cos - second * sin, k_scale, turned, FP8_CACHE, dtype)
        _store(KCache, i + HALF, second * cos + first * sin, k_scale, turned, FP8_CACHE, dtype)
        mask = mask & (d >= 2 * HALF)
    k = tl.load(K + d, mask=mask, other=0)
    _store(KCache, d, k, k_scale, mask, FP8_CACHE, dtype)


@triton.jit
def _seen(total, first, last, tokens, capacity, window_left, HAS_LEFT: tl.constexpr):
    """Keys [begin, end) that some query of first ... last sees."""
    begin = total * 0
    if HAS_LEFT:
        begin = tl.maximum(total - tokens + first - window_left, 0)
    end = tl.minimum(tl.minimum(total - tokens + last + 1, total), capacity)
    return begin, tl.maximum(end, begin)


@triton.jit
def _load_cache(
    Cache, offsets, inside, OFFSET: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
    FP8_CACHE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    x = _load_tile(Cache + offsets, inside, OFFSET, BLOCK_D, HEAD_DIM, True)
    if FP8_CACHE:
        x = _from_fp8(x).to(dtype)  # exact
    return x


@triton.jit(do_not_specialize=["capacity", "table_length", "window_left", "split"])
def _decode_split_kernel(
    PartOut,
    PartMax,
    PartSum,
    Q,
    KCache,
    VCache,
    CacheSeqlens,
    BlockTable,
    KScale,
    Cos,
    Sin,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_kc_b,
    stride_kc_t,
    stride_kc_h,
    stride_vc_b,
    stride_vc_t,
    stride_vc_h,
    stride_table,
    capacity,
    table_length,
    window_left,
    split,
    splits,
    tokens,
    appended,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    FP8_CACHE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(0) % KV_HEADS
    part = tl.program_id(0) // KV_HEADS % splits
    blocks = tl.cdiv(tokens * GROUP, BLOCK_M)
    block = tl.program_id(0) // KV_HEADS // splits % blocks
    b = tl.program_id(0) // KV_HEADS // splits // blocks
    length = tl.load(CacheSeqlens + b)
    total = length + appended
    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    begin, end = _seen(total, first, last, tokens, capacity, window_left, HAS_LEFT)
    begin += part * split
    end = tl.minimum(begin + split, end)
    if (length < 0) | (begin >= end):
        return
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = r // GROUP
    inside = query < tokens
    at = total - tokens + query
    g_wide, b_wide = g.to(tl.int64), b.to(tl.int64)
    head = (g * GROUP + r % GROUP).to(tl.int64)
    q_rows = Q + b_wide * stride_q_b + query.to(tl.int64) * stride_q_t + head * stride_q_h
    if Cos is None:
        q = _load_tile(q_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
    else:
        q = _load_rotated_tile(
            q_rows, Cos, Sin, at, inside, table_length, 0, BLOCK_D, HEAD_DIM, HALF
        )
    if KScale is not None:
        scale *= tl.load(KScale + g)
    KCache += g_wide * stride_kc_h
    VCache += g_wide * stride_vc_h
    m = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n0 in range(begin, end, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        cached = j < end
        k_rows = _row_offset(BlockTable, b, j, cached, stride_table, stride_kc_b, stride_kc_t, PAGE)
        k = _load_cache(KCache, k_rows, cached, 0, BLOCK_D, HEAD_DIM, FP8_CACHE, q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * scale  # [M, N]
        keep = cached[None, :] & (j[None, :] <= at[:, None])
        if HAS_LEFT:
            keep = keep & (j[None, :] >= at[:, None] - window_left)
        s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        v_rows = _row_offset(BlockTable, b, j, cached, stride_table, stride_vc_b, stride_vc_t, PAGE)
        v = _load_cache(VCache, v_rows, cached, 0, BLOCK_D, HEAD_DIM, FP8_CACHE, q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=INPUT_PRECISION)
    row = ((b_wide * KV_HEADS + g) * splits + part) * (tokens * GROUP) + r  # of all parts
    tl.store(PartMax + row, m, mask=inside)
    tl.store(PartSum + row, l, mask=inside)
    d = tl.arange(0, BLOCK_D)
    tl.store(PartOut + row[:, None] * BLOCK_D + d[None, :], acc, mask=inside[:, None])


@triton.jit(do_not_specialize=["capacity", "window_left", "split"])
def _decode_join_kernel(
    Out,
    PartOut,
    PartMax,
    PartSum,
    CacheSeqlens,
    VScale,
    Sinks,
    capacity,
    window_left,
    split,
    splits,
    tokens,
    appended,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head = tl.program_id(0) % HEADS
    query = tl.program_id(0) // HEADS % tokens
    b = tl.program_id(0) // HEADS // tokens
    g = head // GROUP
    r = query * GROUP + head % GROUP
    length = tl.load(CacheSeqlens + b)
    block = r // BLOCK_M
    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    begin, end = _seen(length + appended, first, last, tokens, capacity, window_left, HAS_LEFT)
    used = tl.where(length < 0, 0, tl.cdiv(end - begin, split))
    m = tl.full([], NO_SCORE, tl.float32)
    l = tl.zeros([], tl.float32)
    if Sinks is not None:
        sink = tl.load(Sinks + head).to(tl.float32) * 1.4426950408889634
        none = sink <= NO_SCORE
        m = tl.where(none, NO_SCORE, sink)
        l = tl.where(none, 0.0, 1.0)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    first_row = (b.to(tl.int64) * KV_HEADS + g) * splits
    for i0 in range(0, used, BLOCK_SPLITS):
        i = i0 + tl.arange(0, BLOCK_SPLITS)
        row = (first_row + i) * (tokens * GROUP) + r
        part_m = tl.load(PartMax + row, mask=i < used, other=NO_SCORE)
        part_l = tl.load(PartSum + row, mask=i < used, other=0.0)
        out = tl.load(
            PartOut + row[:, None] * BLOCK_D + d[None, :], mask=(i < used)[:, None], other=0.0
        )
        m_new = tl.maximum(m, tl.max(part_m, 0))
        factor = tl.exp2(part_m - m_new)
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(part_l * factor, 0)
        acc = acc * alpha + tl.sum(out * factor[:, None], 0)
        m = m_new
    acc /= tl.where(l == 0, 1.0, l)
    if VScale is not None:
        acc *= tl.load(VScale + g)
    row = (b.to(tl.int64) * tokens + query) * HEADS + head
    out = tl.where(length < 0, 0.0, acc).to(Out.dtype.element_ty)
    tl.store(Out + row * HEAD_DIM + d, out, mask=d < HEAD_DIM)


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"stride_{name}_{c}": x.stride(i) for i, c in enumerate("bth")}


def _tile(q: torch.Tensor, group: int) -> tiles.Tile:
    """Rows and columns of a tile of scores, and SPLIT, the keys of a split for one new token."""
    key = f"{tiles.bits(q)}-{tiles.head_limit(q.shape[3])}"
    many = q.shape[1] * group > 16
    return tiles.choose("decode_split", q, *((f"{key}-many",) if many else ()), key)


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
    check_call(q, softmax_scale)
    q = rows(q)
    cos, sin, cache_seqlens = dense(cos), dense(sin), dense(cache_seqlens)
    batches, tokens, heads, head_dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batches == 0:
        return out
    if block_table is not None:
        block_table = rows(block_table)
    fp8 = k_cache.dtype == FP8
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    group = heads // kv_heads
    capacity = page if block_table is None else page * block_table.shape[1]
    tile = _tile(q, group)
    split = tile.pop("SPLIT")
    block_m, block_d = tile.pop("BLOCK_M"), max(16, triton.next_power_of_2(head_dim))
    # the most keys that one block of queries sees, whatever the lengths are
    seen = capacity if window_left < 0 else min(capacity, window_left + tokens)
    split = split * tokens if tokens <= FEW_TOKENS else max(seen, 1)
    splits = max(1, triton.cdiv(seen, split))
    shared = {
        "CacheSeqlens": cache_seqlens,
        "capacity": capacity,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
    }
    caches = {
        "KCache": k_cache,
        "VCache": v_cache,
        "BlockTable": block_table,
        "KScale": k_scale,
        "Cos": cos,
        "Sin": sin,
        **_strides("kc", k_cache),
        **_strides("vc", v_cache),
        "stride_table": 0 if block_table is None else block_table.stride(0),
        "table_length": 0 if cos is None else cos.shape[0],
        "HALF": 0 if cos is None else cos.shape[1],
        "PAGE": page if block_table is not None else 0,
        "FP8_CACHE": fp8,
    }
    cut = {
        "window_left": min(window_left, MAX_WINDOW),
        "HAS_LEFT": window_left >= 0,
        "split": split,
        "splits": splits,
        "tokens": tokens,
        "appended": 0 if k is None else tokens,
        "GROUP": group,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
    }
    parts = torch.empty(
        batches * heads * tokens * splits, block_d, dtype=torch.float32, device=q.device
    )
    maximum, total = torch.empty(2, parts.shape[0], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        if k is not None:
            k, v = rows(k), rows(v)
            _decode_append_kernel[(batches * tokens * kv_heads,)](
                K=k,
                V=v,
                VScale=v_scale,
                TOKENS=tokens,
                **_strides("k", k),
                **_strides("v", v),
                **shared,
                **caches,
                BLOCK_D=block_d,
                BLOCK_HALF=triton.next_power_of_2(max(caches["HALF"], 1)),
                **tiles.choose("decode_append", q),
            )
        blocks = triton.cdiv(tokens * group, block_m)
        _decode_split_kernel[(batches * blocks * splits * kv_heads,)](
            PartOut=parts,
            PartMax=maximum,
            PartSum=total,
            Q=q,
            **_strides("q", q),
            scale=softmax_scale * LOG2_E,
            INPUT_PRECISION="ieee",
            **tile,
            **shared,
            **caches,
            **cut,
        )
        _decode_join_kernel[(batches * tokens * heads,)](
            Out=out,
            PartOut=parts,
            PartMax=maximum,
            PartSum=total,
            VScale=v_scale,
            Sinks=dense(sinks),
            **tiles.choose("decode_join", q),
            **shared,
            **cut,
        )
    return out


class Variant(NamedTuple):
    """One call that the gate compiles; what is not named is a full layer of gpt-oss."""

    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None  # q's
    head_dim: int = 64
    heads: int = 64
    kv_heads: int = 8
    rotary_dim: int = 64
    window: int = -1
    page: int = 0  # dense
    tokens: int = 1
    new: bool = True


VARIANTS = (
    Variant(page=16),
    Variant(window=127),
    Variant(dtype=torch.float16, page=256, window=127),
    Variant(cache=FP8, page=64),
    Variant(tokens=16, page=64),
    Variant(tokens=64),
    Variant(new=False, rotary_dim=0),
    Variant(dtype=torch.float32),
    Variant(dtype=torch.float32, cache=FP8, window=127, page=16),
    Variant(head_dim=80, heads=32, kv_heads=32, rotary_dim=32, page=16),
    Variant(head_dim=128, heads=32, rotary_dim=128, page=16),
    Variant(head_dim=128, heads=32, rotary_dim=128, tokens=16),
    Variant(dtype=torch.float32, head_dim=128, heads=32, rotary_dim=128),
    Variant(head_dim=256, heads=8, kv_heads=4, rotary_dim=256),
    Variant(head_dim=256, heads=8, kv_heads=4, rotary_dim=256, tokens=64, cache=FP8),
    Variant(dtype=torch.float32, head_dim=256, heads=8, kv_heads=4, rotary_dim=256),
)
QUICK = VARIANTS[:2]


def _launch(variant: Variant) -> None:
    def meta(*size, dtype=variant.dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    batches, length = 4, 32768
    cache_dtype = variant.cache or variant.dtype
    shape = (batches * length // variant.page, variant.page) if variant.page else (batches, length)
    caches = [meta(*shape, variant.kv_heads, variant.head_dim, dtype=cache_dtype) for _ in "kv"]
    table = None
    if variant.page:
        table = meta(batches, length // variant.page, dtype=torch.int32)
    new = [
        meta(batches, variant.tokens, variant.kv_heads, variant.head_dim) if variant.new else None
        for _ in "kv"
    ]
    scale = meta(variant.kv_heads, dtype=torch.float32) if variant.cache else None
    tables = None
    if variant.rotary_dim:
        tables = meta(length, variant.rotary_dim // 2, dtype=torch.float32)
    decode_attention(
        meta(batches, variant.tokens, variant.heads, variant.head_dim),
        *caches,
        meta(batches, dtype=torch.int32),
        table,
        *new,
        scale,
        scale,
        meta(variant.heads, dtype=torch.float32),
        tables,
        tables,
        variant.window,
        variant.head_dim**-0.5,
    )


def aot_kernels() -> Iterator[aot.AotKernel]:
    """Every kernel of this op as its launcher would launch it on each family of cards."""
    for variant in VARIANTS:
        name = "-".join(str(value).removeprefix("torch.") for value in variant)
        products = "ieee" if variant.dtype == torch.float32 else aot.FEW_ROWS
        for family, cards in tiles.each_family():
            yield from aot.record(
                f"{name}-{family}",
                functools.partial(_launch, variant),
                products={"_decode_split_kernel": products},
                quick=variant in QUICK,
                cards=cards,
            )
