"""MXFP4 in Triton, for CUDA and ROCm: pack and unpack, a launch each.

R blocks of 32 values in all.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from medgpt_kernels import aot, tiles
from medgpt_kernels.mxfp4.reference import BLOCK
from medgpt_kernels.registry import Unsupported

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _code_of(x, inverse):
    """Nearest E2M1 code, ties to the even one."""
    bits = x.to(tl.int32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * inverse
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    return code + (a > 5.0).to(tl.int32) | (bits >> 28) & 8


@triton.jit
def _value_of(code, scale):
    """code's value times 2^(scale - 127); a scale of 255 is NaN."""
    m = code & 7
    normal = (((m >> 1) + 126) << 23) | ((m & 1) << 22)
    bits = tl.where(m > 1, normal, tl.where(m == 1, 0x3F000000, 0)) | ((code & 8) << 28)
    power = tl.where(scale == 0, 0x00400000, scale << 23)  # 2^-127 is subnormal
    power = tl.where(scale == 255, 0x7FC00000, power)
    return bits.to(tl.float32, bitcast=True) * power.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count"])
def _mxfp4_quantize_kernel(Words, Scales, W, count, BLOCK_R: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    word, j = tl.arange(0, 4), tl.arange(0, 8)
    i = word[None, :, None] * 8 + j[None, None, :]
    inside = r < count
    x = tl.load(W + r[:, None, None] * 32 + i, mask=inside[:, None, None], other=0)
    x = x.to(tl.float32)  # [R, 4, 8]
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of the floats
    largest = tl.max(tl.max(magnitude, 2), 1)
    nan = largest > 0x7F800000
    scale = tl.where(nan, 255, tl.maximum((largest >> 23) - 2, 0))
    inverse = ((254 - tl.where(nan, 0, scale)) << 23).to(tl.float32, bitcast=True)
    code = _code_of(x, inverse[:, None, None])
    packed = tl.sum(code << (4 * j)[None, None, :], 2)  # bits apart, so a sum is an or
    packed = tl.where(nan[:, None], 0, packed)
    tl.store(Words + r[:, None] * 4 + word[None, :], packed, mask=inside[:, None])
    tl.store(Scales + r, scale.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _mxfp4_dequantize_kernel(Out, Blocks, Scales, count, BLOCK_R: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i, b = tl.arange(0, 32), tl.arange(0, 16)
    inside = (r < count)[:, None]
    byte = tl.load(Blocks + r[:, None] * 16 + b[None, :], mask=inside, other=0).to(tl.int32)
    scale = tl.load(Scales + r, mask=r < count, other=0).to(tl.int32)[:, None]
    pair = tl.join(_value_of(byte & 15, scale), _value_of(byte >> 4, scale))  # [R, 16, 2]
    value = tl.reshape(pair, [BLOCK_R, 32]).to(Out.dtype.element_ty)
    tl.store(Out + r[:, None] * 32 + i[None, :], value, mask=inside)


INTERPRETED = not isinstance(_mxfp4_quantize_kernel, triton.JITFunction)


def _check_supported(t: torch.Tensor, dtype: torch.dtype) -> None:
    if t.device.type == "cpu" and not INTERPRETED:
        raise Unsupported("Triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if dtype not in DTYPES:
        raise Unsupported(f"values of {dtype} in Triton")


def mxfp4_quantize(w):
    _check_supported(w, w.dtype)
    w = w.contiguous()
    shape = (*w.shape[:-1], w.shape[-1] // BLOCK)
    scales = torch.empty(shape, dtype=torch.uint8, device=w.device)
    blocks = torch.empty(*shape, BLOCK // 2, dtype=torch.uint8, device=w.device)
    count = scales.numel()
    if count > 0:
        config = tiles.choose("mxfp4_quantize", w)
        with torch.cuda.device_of(w):
            _mxfp4_quantize_kernel[(triton.cdiv(count, config["BLOCK_R"]),)](
                Words=blocks.view(torch.int32), Scales=scales, W=w, count=count, **config
            )
    return blocks, scales


def mxfp4_dequantize(blocks, scales, dtype):
    _check_supported(blocks, dtype)
    blocks, scales = blocks.contiguous(), scales.contiguous()
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
    out = torch.empty(shape, dtype=dtype, device=blocks.device)
    count = scales.numel()
    if count > 0:
        config = tiles.choose("mxfp4_dequantize", blocks)
        with torch.cuda.device_of(blocks):
            _mxfp4_dequantize_kernel[(triton.cdiv(count, config["BLOCK_R"]),)](
                Out=out, Blocks=blocks, Scales=scales, count=count, **config
            )
    return out


def _launch_meta(dtype: torch.dtype) -> None:
    w = torch.empty(32, 5760, 2880, dtype=dtype, device="meta")
    mxfp4_dequantize(*mxfp4_quantize(w), dtype)


def aot_kernels() -> Iterator[aot.AotKernel]:
    """Both kernels for gpt-oss's up-projection."""
    for dtype in DTYPES:
        for family, cards in tiles.each_family():
            yield from aot.record(
                f"{str(dtype).removeprefix('torch.')}-{family}",
                functools.partial(_launch_meta, dtype),
                products={},
                quick=dtype == torch.bfloat16,
                cards=cards,
            )
