"""Rotary position embedding in Triton, for CUDA and ROCm.

T tokens, B sequences of S tokens, H heads, D head_dim, R rotary_dim <= D, half = R/2.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from medgpt_kernels import aot, tiles
from medgpt_kernels.registry import Unsupported

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _token_positions(
    t, b, inside, PositionIds, CuSeqlens, stride_position_b, stride_position_t, num_sequences,
    search_steps,
):  # fmt: skip
    """Position of each token t of batch entry b; the sequence is the last that starts by t."""
    if PositionIds is not None:
        where = PositionIds + b.to(tl.int64) * stride_position_b
        position = tl.load(where + t.to(tl.int64) * stride_position_t, mask=inside, other=0)
    elif CuSeqlens is not None:
        low = t * 0
        high = low + num_sequences
        for _ in range(search_steps):
            middle = (low + high) // 2
            past = tl.load(CuSeqlens + middle) > t
            high = tl.where(past, middle, high)
            low = tl.where(past, low, middle)
        position = t - tl.load(CuSeqlens + low)
    else:
        position = t
    return position


@triton.jit
def _rotate_heads(
    Out, X, cos, sin, b, t, tile_h, stride_b, stride_t, stride_h, tokens, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INDEX: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)[None, None, :]
    X += b.to(tl.int64) * stride_b
    Out += b.to(tl.int64) * tokens * (HEADS * HEAD_DIM)
    t_wide = t.to(INDEX)[:, None, None]
    x_rows = X + t_wide * stride_t + h.to(INDEX)[None, :, None] * stride_h  # [T, H, 1]
    out_rows = Out + t_wide * (HEADS * HEAD_DIM) + h[None, :, None] * HEAD_DIM
    rows = (t < tokens)[:, None, None] & (h < HEADS)[None, :, None]
    inside = rows & (i < HALF)
    first = tl.load(x_rows + i, mask=inside, other=0).to(tl.float32)  # [T, H, half]
    second = tl.load(x_rows + i + HALF, mask=inside, other=0).to(tl.float32)
    c, s = cos[:, None, :], sin[:, None, :]
    dtype = Out.dtype.element_ty
    tl.store(out_rows + i, (first * c - second * s).to(dtype), mask=inside)
    tl.store(out_rows + i + HALF, (second * c + first * s).to(dtype), mask=inside)
    if HEAD_DIM > 2 * HALF:
        d = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :]
        rest = tl.load(x_rows + d, mask=rows & (d < HEAD_DIM))
        tl.store(out_rows + d, rest, mask=rows & (d < HEAD_DIM))


@triton.jit(do_not_specialize=["tokens", "table_length", "num_sequences", "search_steps"])
def _rotary_kernel(
    QOut,
    KOut,
    Q,
    K,
    Cos,
    Sin,
    PositionIds,
    CuSeqlens,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_position_b,
    stride_position_t,
    tokens,
    table_length,
    num_sequences,
    search_steps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    TILES_Q: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    TILES: tl.constexpr = TILES_Q + (K_HEADS + BLOCK_H - 1) // BLOCK_H
    tile_h = tl.program_id(0) % TILES  # heads run fastest: their table rows are in the cache
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    t = tl.program_id(0) // TILES % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
    b = tl.program_id(0) // TILES // tiles_t
    position = _token_positions(
        tl.minimum(t, tokens - 1), b, t < tokens, PositionIds, CuSeqlens, stride_position_b,
        stride_position_t, num_sequences, search_steps,
    )  # fmt: skip
    i = tl.arange(0, BLOCK_HALF)
    known = (position >= 0) & (position < table_length)
    at = position.to(tl.int64)[:, None] * HALF + i[None, :]
    mask = known[:, None] & (i < HALF)[None, :]
    cos = tl.load(Cos + at, mask=mask, other=float("nan"))  # beyond the tables: loud, not wrong
    sin = tl.load(Sin + at, mask=mask, other=float("nan"))
    if INVERSE:
        sin = -sin
    if tile_h < TILES_Q:
        _rotate_heads(
            QOut, Q, cos, sin, b, t, tile_h, stride_q_b * UNIT, stride_q_t * UNIT,
            stride_q_h * UNIT, tokens, Q_HEADS,
            HEAD_DIM, HALF, INDEX, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif K_HEADS > 0:
        _rotate_heads(
            KOut, K, cos, sin, b, t, tile_h - TILES_Q, stride_k_b * UNIT,
            stride_k_t * UNIT, stride_k_h * UNIT, tokens,
            K_HEADS, HEAD_DIM, HALF, INDEX, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


INTERPRETED = not isinstance(_rotary_kernel, triton.JITFunction)


def check_supported(x: torch.Tensor) -> None:
    """Raise Unsupported, before any work, for what these kernels cannot do."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise Unsupported("Triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if x.dtype not in DTYPES:
        raise Unsupported(f"q of {x.dtype} in Triton")


def index_dtype(*tensors: torch.Tensor | None):
    """The dtype that offsets into these tensors need: half the registers where 32 bits do."""
    last = max(
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        for t in tensors
        if t is not None
    )
    return tl.int64 if last >= 2**31 else tl.int32


def rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is contiguous, as the kernels need."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def stride_unit(*tensors: torch.Tensor | None) -> int:
    """What kernels get strides in: 8 elements where all are multiples of it, else 1.

    Triton itself looks for multiples of 16 only, and would read heads of 72 or 40 dimensions one
    element at a time.
    """
    steps = [s for t in tensors if t is not None for s in t.stride()[:-1]]
    return 8 if all(s % 8 == 0 for s in steps) else 1


def strides(name: str, x: torch.Tensor | None, unit: int) -> dict[str, int]:
    """From one batch entry, token and head to the next; packed tensors have one batch."""
    if x is None:
        b = t = h = 0
    else:
        b, t, h = (x.stride(0) if x.ndim == 4 else 0, x.stride(-3), x.stride(-2))
    return {
        f"stride_{name}_b": b // unit,
        f"stride_{name}_t": t // unit,
        f"stride_{name}_h": h // unit,
    }


def rotate(q, k, cos, sin, position_ids, cu_seqlens, *, inverse: bool = False):
    """q and k, or q alone where k is None, rotated into new contiguous tensors."""
    check_supported(q)
    q, k = rows(q), None if k is None else rows(k)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = None if k is None else torch.empty(k.shape, dtype=k.dtype, device=q.device)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, q_heads, head_dim = q.shape[-3:]
    k_heads, half = 0 if k is None else k.shape[-2], cos.shape[1]
    block_half = triton.next_power_of_2(half)
    config = tiles.choose("rotary", q)
    config["BLOCK_T"] = max(1, config["BLOCK_T"] * 32 // max(block_half, 32))  # half = 32 as told
    tiles_h = triton.cdiv(q_heads, config["BLOCK_H"]) + triton.cdiv(k_heads, config["BLOCK_H"])
    batches = q.shape[0] if q.ndim == 4 else 1
    unit = stride_unit(q, k)
    if position_ids is not None and position_ids.ndim == 1:
        position_ids = position_ids.unsqueeze(0)
    stride_position = (0, 0) if position_ids is None else position_ids.stride()
    with torch.cuda.device_of(q):
        _rotary_kernel[(batches * triton.cdiv(tokens, config["BLOCK_T"]) * tiles_h,)](
            QOut=q_out,
            KOut=k_out,
            Q=q,
            K=k,
            Cos=cos.contiguous(),
            Sin=sin.contiguous(),
            PositionIds=position_ids,
            CuSeqlens=None if position_ids is not None else cu_seqlens,
            **strides("q", q, unit),
            **strides("k", k, unit),
            stride_position_b=stride_position[0],
            stride_position_t=stride_position[1],
            tokens=tokens,
            table_length=cos.shape[0],
            num_sequences=sequences,
            search_steps=max(sequences - 1, 0).bit_length(),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            HEAD_DIM=head_dim,
            HALF=half,
            INVERSE=inverse,
            UNIT=unit,
            INDEX=index_dtype(q, k, q_out, k_out),
            BLOCK_HALF=block_half,
            BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)),
            **config,
        )
    return q_out, k_out


def rotary_fwd(q, k, cos, sin, position_ids, cu_seqlens):
    return rotate(q, k, cos, sin, position_ids, cu_seqlens)


def rotary_bwd(d_q, d_k, cos, sin, position_ids, cu_seqlens):
    return rotate(d_q, d_k, cos, sin, position_ids, cu_seqlens, inverse=True)


def _launch_meta(dtype: torch.dtype, head_dim: int, rotary_dim: int, packed: bool) -> None:
    lead = (4096,) if packed else (4, 4096)
    q = torch.empty(*lead, 64, head_dim, dtype=dtype, device="meta")
    table = torch.empty(4096, rotary_dim // 2, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    rotary_fwd(q, q[..., :8, :], table, table, None, cu_seqlens)
    rotary_bwd(q, q[..., :8, :], table, table, None, cu_seqlens)


def aot_kernels() -> Iterator[aot.AotKernel]:
    """The kernel as its launchers would launch it."""
    for dtype, head_dim, rotary_dim, packed in (
        (torch.bfloat16, 64, 64, True),
        (torch.float32, 128, 128, False),
        (torch.bfloat16, 80, 20, True),
        (torch.float16, 256, 256, True),
    ):
        for family, cards in tiles.each_family():
            yield from aot.record(
                f"{str(dtype).removeprefix('torch.')}-{head_dim}-{rotary_dim}-{packed}-{family}",
                functools.partial(_launch_meta, dtype, head_dim, rotary_dim, packed),
                products={},
                quick=head_dim == 64,
                cards=cards,
            )
