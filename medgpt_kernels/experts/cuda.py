"""The experts in CUDA C++: launchers of csrc/cuda/experts.cu, for the few tokens of decoding.

T tokens, K experts a token. More tokens, LoRA, kept pre-activations and the backward are Triton's.
"""

import torch

from medgpt_kernels import native
from medgpt_kernels.native import DTYPE_CODES, pointer
from medgpt_kernels.registry import PassedOn, Unsupported

native.cuda()
MAX_TOKENS, MAX_ROWS = 16, 512


def _check(x, topk_weights, low_rank, keep_pre_activation) -> None:
    if x.dtype not in DTYPE_CODES or topk_weights.dtype != torch.float32:
        raise Unsupported(f"x of {x.dtype} with topk_weights of {topk_weights.dtype}")
    if x.shape[0] > MAX_TOKENS or topk_weights.numel() > MAX_ROWS:
        raise PassedOn(f"{x.shape[0]} tokens, {topk_weights.numel()} rows: not few")
    if keep_pre_activation:
        raise PassedOn("a gradient will be asked for")
    if any(t is not None for t in low_rank):
        raise PassedOn("LoRA")


def experts_fwd(
    x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj, gate_up_scales,
    gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a, gate_up_lora_b,
    down_lora_a, down_lora_b, activation, gate_up_layout, weight_layout, alpha, limit, lora_scaling,
    keep_pre_activation,
):  # fmt: skip
    low_rank = (gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    _check(x, topk_weights, low_rank, keep_pre_activation)
    tensors = {
        "x": x,
        "topk_weights": topk_weights,
        "expert_offs": expert_offs,
        "gather": gather_indices,
        "scatter": scatter_indices,
        "gate_up": gate_up_proj,
        "down": down_proj,
        "gate_up_scales": gate_up_scales,
        "down_scales": down_scales,
        "gate_up_bias": gate_up_proj_bias,
        "down_bias": down_proj_bias,
    }
    tensors = {n: None if t is None else t.contiguous() for n, t in tensors.items()}
    if down_scales is not None:
        intermediate = down_scales.shape[2] * 32
    else:
        intermediate = down_proj.shape[1 if weight_layout == "in_out" else 2]
    rows = x.new_empty(topk_weights.numel(), intermediate)
    native.check_rows(tensors["x"], tensors["gate_up"], tensors["down"], rows)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    device, stream = native.place(x)
    native.cuda(device).experts(
        device=device,
        stream=stream,
        tokens=x.shape[0],
        topk=topk_weights.shape[1],
        experts=gate_up_proj.shape[0],
        hidden=x.shape[1],
        intermediate=intermediate,
        dtype=DTYPE_CODES[x.dtype],
        in_out=weight_layout == "in_out",
        interleaved=gate_up_layout == "interleaved",
        plain=activation == "swiglu",
        alpha=alpha,
        limit=limit,
        rows=pointer(rows),
        y=pointer(y),
        **{n: pointer(t) for n, t in tensors.items()},
    )
    return y, x.new_empty(0, 2 * intermediate)


def experts_bwd(
    d_y, pre_activation, x, topk_weights, expert_offs, gather_indices, scatter_indices,
    gate_up_proj, gate_up_scales, gate_up_proj_bias, down_proj, down_scales, down_proj_bias,
    gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b, activation, gate_up_layout,
    weight_layout, alpha, limit, lora_scaling, wanted,
):  # fmt: skip
    raise PassedOn("no backward in CUDA C++")
