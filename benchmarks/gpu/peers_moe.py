"""The peers of experts on a card that are packages of their own; each may fail to import or to run.

gpt-oss's layout: dense weights [E, H, 2I] and [E, I, H], gates and ups by turns.
"""

import torch

from gpu.peers import module


def triton_kernels(packed: dict):
    """OpenAI's kernels on the packed weights, called as transformers calls them."""
    hub = module("triton_kernels")
    for part in ("matmul_ogs", "swiglu", "routing", "tensor", "tensor_details.layout"):
        module(f"triton_kernels.{part}")
    from transformers.integrations import mxfp4
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig

    experts, hidden = packed["down_proj_bias"].shape
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_local_experts": experts}
    mxfp4.triton_kernels_hub = hub
    with torch.device("meta"):
        layer = mxfp4.Mxfp4GptOssExperts(GptOssConfig(**sizes))
    ogs = hub.matmul_ogs
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = packed[name]
        flat = blocks.flatten(2).transpose(1, 2)
        weight, scale = mxfp4.swizzle_mxfp4(flat, scales.transpose(1, 2), hub)
        del layer._parameters[name]
        setattr(layer, name, weight)
        context = ogs.FlexCtx(rhs_data=ogs.InFlexData())
        precision = ogs.PrecisionConfig(weight_scale=scale, flex_ctx=context)
        setattr(layer, f"{name}_precision_config", precision)
        bias = packed[f"{name}_bias"].float()
        setattr(layer, f"{name}_bias", torch.nn.Parameter(bias, requires_grad=False))

    def call(x, ids, topk_weights):
        return layer(x, ids, topk_weights.to(x.dtype))

    return call


def scattermoe(dense: dict, alpha: float = 1.702, limit: float = 7.0):
    """ScatterMoE's products with the activation in PyTorch; no biases: less than the op does."""
    parts = module("scattermoe.parallel_experts")
    experts = len(dense["down_proj"])

    def call(x, ids, topk_weights):
        order, scattered, offsets = parts.flatten_sort_count(ids, num_experts=experts)
        about = (order, scattered, offsets)
        pre = parts.parallel_linear(
            x, dense["gate_up_proj"], ids.shape[1], *about, grouped_out=True
        )
        gate, up = pre[:, ::2].clamp(max=limit), pre[:, 1::2].clamp(-limit, limit)
        hidden = (up + 1) * (gate * (gate * alpha).sigmoid())
        return parts.parallel_linear(
            hidden, dense["down_proj"], 1, *about, grouped_in=True, gates=topk_weights
        )

    return call
