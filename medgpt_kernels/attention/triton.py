"""Attention in Triton, for CUDA and ROCm: the launchers and what they compile."""

from medgpt_kernels.attention.triton_bwd import attention_bwd
from medgpt_kernels.attention.triton_fwd import attention_fwd

__all__ = ["attention_bwd", "attention_fwd"]
