"""The peers of the experts: transformers' implementations, and products on weights turned over.

T tokens, E experts, H hidden, I intermediate; gpt-oss's layout, weights [E, H, 2I] and [E, I, H].
"""

import torch
import torch.nn.functional as F


def gpt_oss(weights: dict[str, torch.Tensor], implementation: str):
    """transformers' GptOssExperts on these very tensors, by "eager" or "grouped_mm"."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    experts, hidden, width = weights["gate_up_proj"].shape
    config = GptOssConfig(
        hidden_size=hidden, intermediate_size=width // 2, num_local_experts=experts
    )
    with torch.device("meta"):
        module = GptOssExperts(config)
    for name, value in weights.items():
        trained = isinstance(value, torch.nn.Parameter)
        setattr(module, name, value if trained else torch.nn.Parameter(value, requires_grad=False))
    module.config._experts_implementation = implementation

    def call(x, topk_ids, topk_weights):
        return module(x, topk_ids, topk_weights)

    return call


def linear_out_in(weights: dict[str, torch.Tensor], alpha: float = 1.702, limit: float = 7.0):
    """One F.linear an expert on weights stored (out, in), torch's fastest product in bf16."""
    turned = {n: weights[n].mT.contiguous() for n in ("gate_up_proj", "down_proj")}

    def call(x, topk_ids, topk_weights):
        order = topk_ids.flatten().argsort(stable=True)
        counts = topk_ids.flatten().bincount(minlength=len(turned["down_proj"])).tolist()
        tokens = order // topk_ids.shape[1]
        scale = topk_weights.flatten()[order, None].to(x.dtype)
        rows, y, begin = x[tokens], torch.zeros_like(x), 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            at = slice(begin, begin + count)
            begin += count
            pre = F.linear(rows[at], turned["gate_up_proj"][e], weights["gate_up_proj_bias"][e])
            gate, up = pre[:, ::2].clamp(max=limit), pre[:, 1::2].clamp(-limit, limit)
            hidden = (up + 1) * (gate * (gate * alpha).sigmoid())
            out = F.linear(hidden, turned["down_proj"][e], weights["down_proj_bias"][e])
            y.index_add_(0, tokens[at], out.mul_(scale[at]))
        return y

    return call
