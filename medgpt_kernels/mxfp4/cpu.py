"""MXFP4 on the CPU: launchers of csrc/cpu/mxfp4.cpp."""

import torch

from medgpt_kernels import native
from medgpt_kernels.mxfp4.reference import BLOCK
from medgpt_kernels.native import DTYPE_CODES, pointer
from medgpt_kernels.registry import Unsupported

native.cpu()


def mxfp4_quantize(w):
    if w.dtype not in DTYPE_CODES:
        raise Unsupported(f"w of {w.dtype}")
    w = w.contiguous()
    scales = torch.empty(*w.shape[:-1], w.shape[-1] // BLOCK, dtype=torch.uint8)
    blocks = torch.empty(*scales.shape, BLOCK // 2, dtype=torch.uint8)
    native.cpu().mxfp4_quantize(
        dtype=DTYPE_CODES[w.dtype],
        w=pointer(w),
        count=scales.numel(),
        blocks=pointer(blocks),
        scales=pointer(scales),
    )
    return blocks, scales


def mxfp4_dequantize(blocks, scales, dtype):
    if dtype not in DTYPE_CODES:
        raise Unsupported(f"values of {dtype}")
    blocks, scales = blocks.contiguous(), scales.contiguous()
    out = torch.empty(*scales.shape[:-1], scales.shape[-1] * BLOCK, dtype=dtype)
    native.cpu().mxfp4_dequantize(
        dtype=DTYPE_CODES[dtype],
        blocks=pointer(blocks),
        scales=pointer(scales),
        count=scales.numel(),
        out=pointer(out),
    )
    return out
