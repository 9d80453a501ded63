"""Fused kernels, forward and backward, for gpt-oss-style vision-language models."""

from medgpt_kernels.patch_embed.op import PackedImages, PatchData, pack_images, patch_embed
from medgpt_kernels.registry import backend

__version__ = "0.1.0"

__all__ = [
    "PackedImages",
    "PatchData",
    "__version__",
    "backend",
    "pack_images",
    "patch_embed",
]
