"""Packed patch embedding in Triton, for CUDA and ROCm: the launchers and what they compile."""

from collections.abc import Iterator

import torch

from medgpt_kernels import aot
from medgpt_kernels.patch_embed.triton_bwd import patch_embed_bwd
from medgpt_kernels.patch_embed.triton_fwd import patch_embed_fwd

__all__ = ["aot_kernels", "patch_embed_bwd", "patch_embed_fwd"]

# weight dtype, pixel dtype, weight layout, patch size, interpolation, images of 64 patches (2**17 pass
# 32-bit offsets); the first two are the models
# that this op was made for, SigLIP 2 and CLIP
AOT_VARIANTS = (
    (torch.bfloat16, torch.uint8, "linear", 16, "bilinear_antialias"),
    (torch.float32, torch.uint8, "linear", 16, "bilinear_antialias"),
    (torch.bfloat16, torch.uint8, "conv", 14, "bicubic"),
    (torch.float16, torch.uint8, "conv", 16, "bicubic_antialias"),
    (torch.bfloat16, torch.bfloat16, "conv", 14, "bilinear_align_corners"),
    (torch.bfloat16, torch.float32, "linear", 16, "bilinear_antialias"),
    (torch.float32, torch.float32, "conv", 14, "bicubic"),
    (torch.bfloat16, torch.uint8, "conv", 14, "bicubic", 2**17),
    (torch.bfloat16, torch.bfloat16, "linear", 14, "bicubic", 2**17),
    (torch.float32, torch.float32, "conv", 14, "bicubic", 2**17),
)


def aot_kernels() -> Iterator[aot.AotKernel]:
    """Every kernel of this op as its launchers would launch it."""
    for i, (dtype, pixel_dtype, layout, patch_size, interpolation, *more) in enumerate(
        AOT_VARIANTS
    ):
        images = more[0] if more else 16
        width, side, rows, area = 1152, 16, 1, 64 * patch_size**2
        depth = 3 * patch_size**2
        shape = (width, 3, patch_size, patch_size) if layout == "conv" else (width, depth)
        is_float = pixel_dtype.is_floating_point

        def meta(*size, dtype=dtype):
            return torch.empty(size, dtype=dtype, device="meta")

        arguments = (
            meta(images * area * 3, dtype=pixel_dtype), meta(images, 2, dtype=torch.int32),
            meta(*shape), meta(width), meta(side, side, width), meta(rows, width),
            patch_size, layout, interpolation, [0.5] * 3, [0.5] * 3,
        )  # fmt: skip
        d_tokens = meta(images * (area // patch_size**2 + rows), width)

        def call(arguments=arguments, d_tokens=d_tokens, is_float=is_float):
            patch_embed_fwd(*arguments)
            patch_embed_bwd(d_tokens, *arguments, [True] * 4 + [is_float])

        names = [str(d).split(".")[1] for d in (dtype, pixel_dtype)]
        yield from aot.record(
            "-".join([*names, layout, f"p{patch_size}", interpolation, *["large"] * len(more)]),
            call,
            products={
                "_patch_embed_fwd_kernel": "ieee" if dtype == torch.float32 else "half",
                "_patch_embed_bwd_weight_kernel": "ieee" if dtype == torch.float32 else "half",
                "_patch_embed_bwd_pixels_kernel": "ieee" if dtype == torch.float32 else "half",
                "_patch_embed_bwd_position_kernel": "ieee",
            },
            quick=i < 2,
        )
