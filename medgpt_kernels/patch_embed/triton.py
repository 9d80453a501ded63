"""Packed patch embedding in Triton, for CUDA and ROCm: the launchers and what they compile."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from medgpt_kernels import aot, tiles
from medgpt_kernels.patch_embed.triton_bwd import patch_embed_bwd
from medgpt_kernels.patch_embed.triton_fwd import patch_embed_fwd

__all__ = ["aot_kernels", "patch_embed_bwd", "patch_embed_fwd"]


class Variant(NamedTuple):
    """One call that the gate compiles; what is not named is SigLIP 2's."""

    weight: torch.dtype
    pixels: torch.dtype = torch.uint8
    table: torch.dtype | None = None  # default: the weight's
    layout: str = "linear"
    patch_size: int = 16
    interpolation: str = "bilinear_antialias"
    side: int = 16
    images: int = 16  # of 64 patches


CLIP = {"layout": "conv", "patch_size": 14, "interpolation": "bicubic", "side": 24}
LARGE = {"images": 2**17}  # offsets pass 32 bits
VARIANTS = (
    Variant(torch.bfloat16),
    Variant(torch.float32),
    Variant(torch.bfloat16, **CLIP),
    Variant(torch.float16, layout="conv", interpolation="bicubic_antialias"),
    Variant(torch.bfloat16, torch.bfloat16, **CLIP | {"interpolation": "bilinear_align_corners"}),
    Variant(torch.bfloat16, torch.float32, torch.float32),
    Variant(torch.float32, torch.float32, **CLIP),
    Variant(torch.bfloat16, **CLIP | LARGE),
    Variant(torch.bfloat16, torch.bfloat16, patch_size=14, **LARGE),
    Variant(torch.float32, torch.float32, **CLIP | LARGE),
)
QUICK = VARIANTS[:2]


def _launch(variant: Variant) -> None:
    """The forward and backward launchers on meta tensors."""
    width, rows, patches = 1152, 1, 64 * variant.images
    depth = 3 * variant.patch_size**2
    shape = (width, depth)
    if variant.layout == "conv":
        shape = (width, 3, variant.patch_size, variant.patch_size)

    def meta(*size, dtype=variant.weight):
        return torch.empty(size, dtype=dtype, device="meta")

    arguments = (
        meta(patches * depth, dtype=variant.pixels),
        meta(variant.images, 2, dtype=torch.int32),
        meta(*shape),
        meta(width),
        meta(variant.side, variant.side, width, dtype=variant.table or variant.weight),
        meta(rows, width),
        variant.patch_size,
        variant.layout,
        variant.interpolation,
        [0.5] * 3,
        [0.5] * 3,
    )
    patch_embed_fwd(*arguments)
    wanted = [True] * 4 + [variant.pixels.is_floating_point]
    patch_embed_bwd(meta(patches + rows * variant.images, width), *arguments, wanted)


def aot_kernels() -> Iterator[aot.AotKernel]:
    """Every kernel of this op as its launchers would launch it on each family of cards."""
    for variant in VARIANTS:
        products = "ieee" if variant.weight == torch.float32 else "half"
        name = "-".join(str(value).removeprefix("torch.") for value in variant if value is not None)
        for family, cards in tiles.each_family():
            yield from aot.record(
                f"{name}-{family}",
                functools.partial(_launch, variant),
                products={
                    "_patch_embed_fwd_kernel": products,
                    "_patch_embed_bwd_weight_kernel": products,
                    "_patch_embed_bwd_pixels_kernel": products,
                    "_patch_embed_bwd_position_kernel": "ieee",
                },
                quick=variant in QUICK,
                cards=cards,
            )
