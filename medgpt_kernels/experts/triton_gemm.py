"""Grouped products in Triton: which tile a program computes, and the loop over the depth.

T tokens, K experts a token, S = T K rows sorted by expert, E experts, M, N and K rows, columns and
depth of a tile. The schedule of (expert, tile of rows) is found on the device: a program counts the
experts' tiles before its own. Weights are read as W [K, N] by strides, or as MXFP4 rows of blocks
packed along the depth (x W) or along the columns (d_y W^T), which unpack in registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.experts.triton_unpack import unpack
from medgpt_kernels.registry import Unsupported
from medgpt_kernels.rotary.triton import DTYPES, INTERPRETED

DENSE = tl.constexpr(0)
PACKED_DEPTH = tl.constexpr(1)
PACKED_COLUMNS = tl.constexpr(2)


@triton.jit
def find_tile(tile, ExpertOffs, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of rows (num_experts past the last), its first row, the expert's end."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(ExpertOffs + e, mask=e < num_experts, other=0)
    end = tl.load(ExpertOffs + e + 1, mask=e < num_experts, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    until = tl.cumsum(tiles, 0)
    expert = tl.minimum(tl.sum((until <= tile).to(tl.int32), 0), num_experts)
    here = e == expert
    before = tl.sum(tl.where(here, until - tiles, 0), 0)
    first = tl.sum(tl.where(here, begin, 0), 0) + (tile - before) * BLOCK_M
    return expert, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def find_expert(row, ExpertOffs, num_experts, BLOCK_E: tl.constexpr):
    """The expert of one sorted row."""
    e = tl.arange(0, BLOCK_E)
    until = tl.load(ExpertOffs + e + 1, mask=e < num_experts, other=2147483647)
    return tl.sum((until <= row).to(tl.int32), 0)


@triton.jit
def find_rows(first, end, GatherIndices, BLOCK_M: tl.constexpr):
    """Sorted rows of a tile, the rows of its operand, and which exist; the others repeat one."""
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    row = tl.minimum(row, end - 1)
    source = row
    if GatherIndices is not None:
        source = tl.load(GatherIndices + row)
    return row, source, inside


@triton.jit
def product(
    x_rows, W, Scales, n0, n, width, depth, stride_w_k, stride_w_n, stride_scales_row,
    low_rank_rows, Expand, rank, scaling, stride_expand_r, stride_expand_n,
    PACKED: tl.constexpr, UNPACK: tl.constexpr, EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x W of one expert, fp32 [M, N], and scaling (low_rank Expand) where there is such.

    low_rank is fp32, and enters as two 16-bit parts where x has 16 bits: what it rounds to must not
    decide on which side of the activation's limit a value lies.

    n [N] are the columns, n0 the first where they are consecutive. With MXFP4 stride_w_k or
    stride_w_n, whichever is not packed, is from one row of blocks to the next.
    """
    BLOCK_N: tl.constexpr = n.shape[0]
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    acc = tl.zeros([x_rows.shape[0], BLOCK_N], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (n < width)[None, :]
        if EVEN_K:
            x = tl.load(x_rows[:, None] + k[None, :])
        else:
            x = tl.load(x_rows[:, None] + k[None, :], mask=(k < depth)[None, :], other=0)
            inside = inside & (k < depth)[:, None]
        if PACKED == PACKED_DEPTH:
            block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
            mask = (n < width)[:, None] & (block * 32 < depth)[None, :]
            w = unpack(W, Scales, n, block, mask, stride_w_n, stride_scales_row, DTYPE, UNPACK)
            w = tl.trans(w)
        elif PACKED == PACKED_COLUMNS:
            block = n0 // 32 + tl.arange(0, BLOCK_N // 32)
            mask = (k < depth)[:, None] & (block * 32 < width)[None, :]
            w = unpack(W, Scales, k, block, mask, stride_w_k, stride_scales_row, DTYPE, UNPACK)
        else:
            w = tl.load(W + k[:, None] * stride_w_k + n[None, :] * stride_w_n, mask=inside, other=0)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    if Expand is not None:
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            low = tl.load(low_rank_rows[:, None] + r[None, :], mask=(r < rank)[None, :], other=0)
            expand = tl.load(
                Expand + r[:, None] * stride_expand_r + n[None, :] * stride_expand_n,
                mask=(r < rank)[:, None] & (n < width)[None, :],
                other=0,
            )
            high = low.to(DTYPE)
            added = tl.dot(high, expand, input_precision=INPUT_PRECISION)
            if expand.dtype != tl.float32:
                rest = (low - high.to(tl.float32)).to(DTYPE)
                added = tl.dot(rest, expand, added, input_precision=INPUT_PRECISION)
            acc += added * scaling
    return acc


class Weight(NamedTuple):
    """One stack of weights as a product reads it: W [E, depth, width]."""

    tensor: torch.Tensor
    scales: torch.Tensor | None
    depth: int
    width: int
    stride_k: int
    stride_n: int
    packed: int  # DENSE, PACKED_DEPTH or PACKED_COLUMNS

    def arguments(self) -> dict:
        return {
            "W": self.tensor,
            "Scales": self.scales,
            "depth": self.depth,
            "width": self.width,
            "stride_w_e": self.tensor.stride(0),
            "stride_w_k": self.stride_k,
            "stride_w_n": self.stride_n,
            "stride_scales_e": 0 if self.scales is None else self.scales.stride(0),
            "stride_scales_row": 0 if self.scales is None else self.scales.stride(1),
            "PACKED": self.packed,
        }


def weight(tensor: torch.Tensor, scales, in_out: bool, *, transposed: bool = False) -> Weight:
    """The weights of x W, or of d_y W^T where transposed; blocks and scales where MXFP4."""
    if scales is not None:
        tensor, scales = tensor.contiguous(), scales.contiguous()
        outputs, inputs = scales.shape[1], scales.shape[2] * 32
        row = tensor.stride(1)
        if transposed:
            return Weight(tensor, scales, outputs, inputs, row, 0, PACKED_COLUMNS.value)
        return Weight(tensor, scales, inputs, outputs, 0, row, PACKED_DEPTH.value)
    k, n = (1, 2) if in_out != transposed else (2, 1)
    sizes, steps = tensor.shape, tensor.stride()
    return Weight(tensor, None, sizes[k], sizes[n], steps[k], steps[n], DENSE.value)


def low_rank_arguments(rows, expand: torch.Tensor | None, transposed: bool, scaling: float) -> dict:
    """rows [S, R] times expand [E, R, N], or [E, N, R] where transposed; None: no such addition."""
    if expand is None:
        return {
            "LowRank": None, "Expand": None, "rank": 0, "scaling": 0.0, "stride_expand_e": 0,
            "stride_expand_r": 0, "stride_expand_n": 0, "BLOCK_R": 16,
        }  # fmt: skip
    r, n = (2, 1) if transposed else (1, 2)
    return {
        "LowRank": rows,
        "Expand": expand,
        "rank": rows.shape[1],
        "scaling": scaling,
        "stride_expand_e": expand.stride(0),
        "stride_expand_r": expand.stride(r),
        "stride_expand_n": expand.stride(n),
        "BLOCK_R": min(64, max(16, triton.next_power_of_2(rows.shape[1]))),
    }


def check_supported(x, topk_weights, *weights) -> None:
    """Raise Unsupported, before any work, for what these kernels cannot do."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise Unsupported("Triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if x.dtype not in DTYPES:
        raise Unsupported(f"x of {x.dtype} in Triton")
    if topk_weights.dtype != torch.float32:
        raise Unsupported(f"topk_weights of {topk_weights.dtype} in Triton")
    if any(sum((n - 1) * s for n, s in zip(w.shape[1:], w.stride()[1:], strict=True)) >= 2**31
           for w in weights if w is not None):  # fmt: skip
        raise Unsupported("one expert's weights of 2^31 elements or more in Triton")


def choose(kernel: str, x: torch.Tensor, rows: int, num_experts: int, packed: bool, *marks: str):
    """The tile of a product whose height fits the rows that an expert has on average.

    Args:
        kernel: as the table names it.
        marks: what may want another tile: "long" (offsets of 64 bits), "lora", "concatenated",
            "odd"; the first with one wins.
    """
    mean = triton.cdiv(rows, num_experts)
    height = 16 if mean <= 16 else 64 if mean <= 64 else 128
    bits = tiles.bits(x)
    key = f"{bits}-{'mxfp4' if packed else 'dense'}-{32 if bits == 32 else height}"
    return tiles.choose(kernel, x, *(f"{key}-{mark}" for mark in marks), key)


def narrowed(tile: tiles.Tile, columns: int) -> tiles.Tile:
    """The same tile with no more columns than a narrow product has."""
    return tile | {"BLOCK_N": min(tile["BLOCK_N"], max(16, triton.next_power_of_2(columns)))}


def experts_block(num_experts: int) -> int:
    """BLOCK_E of the kernels that look for an expert."""
    return max(16, triton.next_power_of_2(num_experts))


def row_tiles(rows: int, num_experts: int, block_m: int) -> int:
    """At most so many tiles of rows have any, whatever the experts' shares."""
    return min(triton.cdiv(rows, block_m) + num_experts, rows)
