"""MXFP4: 4-bit floats in blocks of 32 that share a power of two, as gpt-oss's experts are stored.

K values along the last dimension, blocks of 32.
"""

from typing import NamedTuple

import torch

from medgpt_kernels import registry

BLOCK = 32


class Mxfp4Tensor(NamedTuple):
    """Packed values [..., K] along with their shared scales.

    A byte holds two codes, the even index in its low nibble; value = E2M1[code] * 2^(scale - 127),
    and a scale of 255 makes its block NaN (OCP Microscaling v1.0). Constant: no gradient.
    """

    blocks: torch.Tensor  # [..., K/32, 16] uint8
    scales: torch.Tensor  # [..., K/32] uint8

    @property
    def shape(self) -> torch.Size:
        """The logical shape [..., K]."""
        *leading, count = self.scales.shape
        return torch.Size((*leading, count * BLOCK))

    @property
    def ndim(self) -> int:
        return self.scales.ndim

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Mxfp4Tensor":
        """The same bytes on another device."""
        return Mxfp4Tensor(*(t.to(device, non_blocking=non_blocking) for t in self))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The values [..., K] in fp32, bf16, fp16 or fp64.

        Exact in fp32 and bf16 but for overflow to infinity (scale bytes 253 and 254); rounded to
        nearest even where fp16 cannot hold them.

        Raises:
            ValueError: blocks and scales that do not fit, or another dtype.
        """
        check_mxfp4("mxfp4", self)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"mxfp4: expected float32, bfloat16, float16 or float64, got {dtype}")
        return _mxfp4_dequantize(self.blocks, self.scales, dtype)


def mxfp4_quantize(w: torch.Tensor) -> Mxfp4Tensor:
    """Quantise blocks of 32 along the last dimension (OCP Microscaling v1.0, section 6.3).

    A block's scale is 2^(floor(log2(amax)) - 2), so that its largest magnitude lies in [4, 8) after
    scaling: what lies between 6 and 8 clips to 6, by up to a quarter. Values round to nearest, ties
    to the even code. Signs of zeros are kept; a block of zeros has scale byte 0. A NaN makes its
    whole block NaN (scale byte 255, codes 0). An infinity takes scale byte 253 and code 6, which
    dequantises to infinity.

    Args:
        w: [..., K] float, K a multiple of 32, any strides. No gradient flows through.

    Returns:
        Mxfp4Tensor of blocks [..., K/32, 16] and scales [..., K/32].

    Raises:
        ValueError: not a float tensor, or K not a multiple of 32.
    """
    if not w.dtype.is_floating_point or w.dtype.itemsize < 2:
        raise ValueError(
            f"mxfp4_quantize: expected a float tensor of 16 bits or more, got {w.dtype}"
        )
    if w.ndim < 1 or w.shape[-1] % BLOCK:
        raise ValueError(
            f"mxfp4_quantize: expected a last dimension in multiples of {BLOCK}, got "
            f"{list(w.shape)}"
        )
    return Mxfp4Tensor(*_mxfp4_quantize(w.detach()))


def check_mxfp4(op: str, w: Mxfp4Tensor) -> None:
    """uint8 blocks of 16 bytes, a scale each, on one device."""
    blocks, scales = w.blocks, w.scales
    if {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise ValueError(
            f"{op}: expected uint8 blocks and scales, got {blocks.dtype} and {scales.dtype}"
        )
    if scales.ndim < 1 or blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(
            f"{op}: expected blocks [..., K/32, 16] and scales [..., K/32], got "
            f"{list(blocks.shape)} and {list(scales.shape)}"
        )
    if blocks.device != scales.device:
        raise ValueError(f"{op}: expected scales on {blocks.device}, got {scales.device}")


def _quantize_fake(w):
    *leading, width = w.shape
    count = width // BLOCK
    return tuple(
        w.new_empty(shape, dtype=torch.uint8)
        for shape in ((*leading, count, BLOCK // 2), (*leading, count))
    )


def _dequantize_fake(blocks, scales, dtype):
    *leading, count = scales.shape
    return scales.new_empty((*leading, count * BLOCK), dtype=dtype)


_BACKENDS = ("reference", "cpu", "triton")

_mxfp4_quantize = registry.register(
    "mxfp4_quantize(Tensor w) -> (Tensor blocks, Tensor scales)",
    package=__package__,
    fake=_quantize_fake,
    backends=_BACKENDS,
)
_mxfp4_dequantize = registry.register(
    "mxfp4_dequantize(Tensor blocks, Tensor scales, ScalarType dtype) -> Tensor",
    package=__package__,
    fake=_dequantize_fake,
    backends=_BACKENDS,
)
