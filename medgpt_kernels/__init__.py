"""Fused kernels, forward and backward, for gpt-oss-style vision-language models."""

from medgpt_kernels.attention.op import attention, merge_attention
from medgpt_kernels.patch_embed.op import PackedImages, PatchData, pack_images, patch_embed
from medgpt_kernels.registry import backend
from medgpt_kernels.rotary.op import apply_rotary
from medgpt_kernels.rotary.tables import (
    Rotary,
    rotary_from_config,
    rotary_from_inv_freq,
    yarn_rotary,
)

__version__ = "0.1.0"

__all__ = [
    "PackedImages",
    "PatchData",
    "Rotary",
    "__version__",
    "apply_rotary",
    "attention",
    "backend",
    "merge_attention",
    "pack_images",
    "patch_embed",
    "rotary_from_config",
    "rotary_from_inv_freq",
    "yarn_rotary",
]
