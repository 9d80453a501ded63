"""Packed patch embedding in Triton, for CUDA and ROCm: the launchers and what they compile."""

from medgpt_kernels.patch_embed.triton_bwd import patch_embed_bwd
from medgpt_kernels.patch_embed.triton_fwd import patch_embed_fwd

__all__ = ["patch_embed_bwd", "patch_embed_fwd"]
