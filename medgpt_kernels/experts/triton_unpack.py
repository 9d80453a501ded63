"""MXFP4 weights to the dtype of a product, in registers.

R rows of C blocks of 32 values, 16 bytes each. A byte holds two E2M1 codes s|ee|m, the first in its
low half. On the way to bf16 both are treated as one 32-bit word of two bf16, whose exponents and
mantissas take the codes' bits as they are; that leaves values 2^126 times too small.
"""

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles

# how a pair becomes two values of its scale: in fp32 each, as two bf16, or so in PTX
WIDE = tl.constexpr(0)
PAIRS = tl.constexpr(1)
PTX_PAIRS = tl.constexpr(2)
# 2^126 and the scale one after the other: their product may be beyond bf16. fma with -0 is the
# multiplication that every card since sm_80 has, subnormals included, and keeps the zeros' signs.
SCALE_PAIR = tl.constexpr("""{
.reg .b32 t, factor, zero;
mov.b32 factor, 0x7E807E80;
mov.b32 zero, 0x80008000;
fma.rn.bf16x2 t, $2, factor, zero;
fma.rn.bf16x2 t, t, $3, zero;
mov.b32 {$0, $1}, t;
}""")


@triton.jit
def _scaled(bits, scale):
    """A bf16 in the upper half of a word, 2^126 times too small, times a power of two."""
    x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return (x * (scale & 0xFFFF0000).to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def _unpack_pairs(code, scale, UNPACK: tl.constexpr):
    """Bytes and the bits of their scales in bf16 to low and high values in bf16."""
    # a multiplication moves both codes of a byte to their halves, and what else it leaves is cut
    magnitude = (code * 0x40040) & 0x1C001C0
    pair = magnitude | (code * 0x1001000) & 0x80008000
    scale = scale * 0x10001
    if UNPACK == PTX_PAIRS:
        low, high = tl.inline_asm_elementwise(
            SCALE_PAIR, "=h,=h,r,r", [pair, scale], (tl.bfloat16, tl.bfloat16), True, 1
        )
    else:
        low, high = _scaled(pair << 16, scale), _scaled(pair, scale)
    return low, high


@triton.jit
def unpack(
    Blocks, Scales, row, block, mask, stride_row, stride_scale_row, DTYPE: tl.constexpr,
    UNPACK: tl.constexpr,
):  # fmt: skip
    """MXFP4 values [R, 32 C] of `row` [R] and `block` [C].

    Exact but for what DTYPE cannot hold, which rounds to nearest even or overflows to infinity;
    scale byte 255 makes NaN.
    """
    byte = tl.arange(0, 16)
    where = row[:, None] * stride_row + block[None, :] * 16  # [R, C]
    code = tl.load(Blocks + where[:, :, None] + byte, mask=mask[:, :, None], other=0).to(tl.uint32)
    scale = tl.load(
        Scales + row[:, None] * stride_scale_row + block[None, :], mask=mask, other=0
    ).to(tl.uint32)
    # the scale's bits in bf16, the upper half of fp32: 0 is subnormal, 255 not a number
    end = ((scale + 1) & 0xFE) == 0
    scale = ((scale << 7) | tl.where(end, 0x40, 0).to(tl.uint32))[:, :, None]
    if UNPACK == WIDE:
        scale = (scale << 16).to(tl.float32, bitcast=True)
        # exponent and mantissa where fp32 has them: 2^126 times too small, subnormals included
        low = ((code << 22) & 0x1C00000) | ((code << 28) & 0x80000000)
        high = ((code << 18) & 0x1C00000) | ((code << 24) & 0x80000000)
        low = (low.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale).to(DTYPE)
        high = (high.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale).to(DTYPE)
    else:
        low, high = _unpack_pairs(code, scale, UNPACK)
    return tl.reshape(tl.join(low, high), [row.shape[0], block.shape[0] * 32])


def how_to_unpack(dtype: torch.dtype, family: str) -> int:
    """The way for products of this dtype on this family of cards; the interpreter runs no PTX."""
    if dtype != torch.bfloat16 or family == "gfx942":
        return WIDE.value
    return PAIRS.value if family == tiles.INTERPRETER else PTX_PAIRS.value
