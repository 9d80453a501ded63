"""MXFP4 quantisation in eager PyTorch: the specification.

K values along the last dimension, blocks of 32.
"""

import torch

BLOCK = 32
# OCP Microscaling v1.0, E2M1: the magnitudes of codes 0 ... 7; bit 3 is the sign
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def code_of(magnitude):
    """The nearest E2M1 code of magnitudes >= 0; ties to the even code; from 5 on it is 7 (6.0)."""
    return sum(
        [
            (magnitude > 0.25).to(torch.uint8),
            magnitude >= 0.75,
            magnitude > 1.25,
            magnitude >= 1.75,
            magnitude > 2.5,
            magnitude >= 3.5,
            magnitude > 5.0,
        ]
    )


def mxfp4_quantize(w):
    wide = w.to(torch.promote_types(w.dtype, torch.float32)).unflatten(-1, (-1, BLOCK))
    largest = wide.abs().amax(-1)  # NaN where the block holds one
    exponent = largest.frexp().exponent.long() - 1  # floor(log2), -1 for 0
    scales = torch.where(largest > 0, exponent - 2 + 127, 0)
    scales = torch.where(largest.isinf(), 253, scales.clamp(0, 254))
    scaled = torch.ldexp(wide, (127 - scales).unsqueeze(-1).to(wide.dtype))
    codes = code_of(scaled.abs()) | wide.signbit().to(torch.uint8) << 3
    nan = largest.isnan()
    codes = codes.masked_fill(nan.unsqueeze(-1), 0)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, scales.masked_fill(nan, 255).to(torch.uint8)


def mxfp4_dequantize(blocks, scales, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=wide, device=blocks.device)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    scale = torch.ldexp(torch.ones_like(scales, dtype=wide), scales.to(wide) - 127)
    scale = scale.masked_fill(scales == 255, float("nan"))
    return (table[codes] * scale.unsqueeze(-1)).flatten(-2).to(dtype)
