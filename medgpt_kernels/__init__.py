"""Fused kernels, forward and backward, for gpt-oss-style vision-language models."""

from medgpt_kernels.attention.op import attention, merge_attention
from medgpt_kernels.decode_attention.op import decode_attention
from medgpt_kernels.experts.op import ExpertLora, experts
from medgpt_kernels.mxfp4.op import Mxfp4Tensor, mxfp4_quantize
from medgpt_kernels.patch_embed.op import PackedImages, PatchData, pack_images, patch_embed
from medgpt_kernels.registry import backend
from medgpt_kernels.rotary.op import apply_rotary
from medgpt_kernels.rotary.tables import (
    Rotary,
    rotary_from_config,
    rotary_from_inv_freq,
    yarn_rotary,
)
from medgpt_kernels.routing.op import (
    RoutingData,
    load_balancing_loss,
    router_z_loss,
    routing,
    routing_from_logits,
    routing_from_topk,
)

__version__ = "0.1.0"

__all__ = [
    "ExpertLora",
    "Mxfp4Tensor",
    "PackedImages",
    "PatchData",
    "Rotary",
    "RoutingData",
    "__version__",
    "apply_rotary",
    "attention",
    "backend",
    "decode_attention",
    "experts",
    "load_balancing_loss",
    "merge_attention",
    "mxfp4_quantize",
    "pack_images",
    "patch_embed",
    "rotary_from_config",
    "rotary_from_inv_freq",
    "router_z_loss",
    "routing",
    "routing_from_logits",
    "routing_from_topk",
    "yarn_rotary",
]
