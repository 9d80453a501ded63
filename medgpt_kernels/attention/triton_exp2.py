"""2 ** (s scale - m) of scores: by the exponential unit, or a part of them by a polynomial.

On sm_100 a multiprocessor needs twice as long for the exponentials of heads of 64 as for the
forward's two products. There PTX has arithmetic on pairs of fp32, which makes a polynomial cost few
issue slots: of each PACK scores of a thread POLYNOMIALS are not the exponential unit's. What the
same share of columns gives elsewhere is for tests, and to compare.
"""

import os
import struct

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles

PACK = tl.constexpr(32)
POLYNOMIALS = tl.constexpr(6)  # the best by the static model, docs/static_model.md
# minimax of degree 4 on [-1/2, 1/2] with 1 at 0, relative error 3e-6
COEFFICIENTS = (0.6931241931542219, 0.24024098622765433, 0.05590642672831041, 0.009582853141412249)
MAGIC = 12582912.0  # 1.5 * 2 ** 23: leaves the nearest integer in a sum's low bits

# how: by the exponential unit alone, a share by the polynomial, or that in PTX on pairs
ALL_UNIT = tl.constexpr(0)
SHARED = tl.constexpr(1)
PTX_PAIRS = tl.constexpr(2)


@triton.jit
def _poly_exp2(x):
    """2 ** x for x <= 0 on the FMA units, 2 ** -126 below that."""
    x = tl.maximum(x, -126.0)
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    y = 0.05590642672831041 + f * 0.009582853141412249
    y = 0.24024098622765433 + f * y
    y = 0.6931241931542219 + f * y
    y = 1.0 + f * y
    bits = y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


def _polynomial_pair(i: int) -> list[str]:
    """_poly_exp2 of the pair x into $i and $(i + 1); NaN becomes the largest number."""
    return [
        "mov.b64 {a, b}, x;",
        "max.NaN.f32 a, a, 0fC2FC0000;",  # -126
        "max.NaN.f32 b, b, 0fC2FC0000;",
        "mov.b64 x, {a, b};",
        "add.rn.f32x2 r, x, magic;",
        "add.rn.f32x2 y, r, back;",
        "fma.rn.f32x2 f, y, minus, x;",
        "fma.rn.f32x2 y, f, c4, c3;",
        "fma.rn.f32x2 y, f, y, c2;",
        "fma.rn.f32x2 y, f, y, c1;",
        "fma.rn.f32x2 y, f, y, one;",
        "mov.b64 {u, v}, r;",
        "mov.b64 {p, q}, y;",
        "shl.b32 u, u, 23;",
        "shl.b32 v, v, 23;",
        "add.s32 u, u, p;",
        "add.s32 v, v, q;",
        f"mov.b32 ${i}, u;",
        f"mov.b32 ${i + 1}, v;",
    ]


def _ptx(pack: int, polynomials: int) -> str:
    """`pack` powers from as many scores, then as many -m, then as many scales."""
    lines = [".reg .b64 s, m, c, x, y, r, f;", ".reg .f32 a, b;", ".reg .b32 u, v, p, q;"]
    constants = {"magic": MAGIC, "back": -MAGIC, "one": 1.0, "minus": -1.0}
    constants |= {f"c{i}": value for i, value in enumerate(COEFFICIENTS, 1)}
    for name, value in constants.items():
        bits = struct.pack(">f", value).hex().upper()
        lines += [f".reg .b64 {name};", f"mov.b64 {name}, 0x{bits}{bits};"]
    for i in range(0, pack, 2):
        for name, k in (("s", 1), ("m", 2), ("c", 3)):
            lines.append(f"mov.b64 {name}, {{${i + k * pack}, ${i + k * pack + 1}}};")
        lines.append("fma.rn.f32x2 x, s, c, m;")
        if i < pack - polynomials:
            lines += [
                "mov.b64 {a, b}, x;",
                f"ex2.approx.ftz.f32 ${i}, a;",
                f"ex2.approx.ftz.f32 ${i + 1}, b;",
            ]
        else:
            lines += _polynomial_pair(i)
    return "{\n" + "\n".join(lines) + "\n}"


PTX = tl.constexpr(_ptx(PACK.value, POLYNOMIALS.value))
PTX_CONSTRAINTS = tl.constexpr(",".join(["=f"] * PACK.value + ["f"] * 3 * PACK.value))


@triton.jit
def exp2_scores(s, scale, m, MASKED: tl.constexpr, EXP2: tl.constexpr):
    """2 ** (s scale - m) of scores [M, N] and m [M]; MASKED: some scores are -inf."""
    if EXP2 == PTX_PAIRS and not MASKED:
        minus = tl.broadcast_to(-m[:, None], s.shape)
        scales = tl.full(s.shape, 0.0, tl.float32) + scale
        p = tl.inline_asm_elementwise(
            PTX, PTX_CONSTRAINTS, [s, minus, scales], tl.float32, True, PACK
        )
    else:
        x = s * scale - m[:, None]
        p = tl.exp2(x)
        if EXP2 == SHARED and not MASKED:
            last = tl.arange(0, s.shape[1]) % PACK >= PACK - POLYNOMIALS
            p = tl.where(last[None, :], _poly_exp2(x), p)
    return p


def how_to_exp2(tile: tiles.Tile, x: torch.Tensor) -> int:
    """As the tile says, from which it is taken, or MEDGPT_KERNELS_POLY_EXP2 = 0 or 1."""
    said = tile.pop("POLY_EXP2", 0)
    if not int(os.environ.get("MEDGPT_KERNELS_POLY_EXP2", said)):
        return ALL_UNIT.value
    return PTX_PAIRS.value if tiles.card_family(x) == "sm_100" else SHARED.value
