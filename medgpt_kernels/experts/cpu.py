"""The experts on the CPU: launchers of csrc/cpu/experts.cpp and experts_bwd.cpp."""

import torch

from medgpt_kernels import native
from medgpt_kernels.native import DTYPE_CODES, pointer
from medgpt_kernels.registry import Unsupported

native.cpu()


def _problem(
    x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj, gate_up_scales,
    gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a, gate_up_lora_b,
    down_lora_a, down_lora_b, activation, gate_up_layout, weight_layout, alpha, limit, lora_scaling,
):  # fmt: skip
    """The C++ description of one call; its tensors, which are contiguous, must stay alive."""
    if x.dtype not in DTYPE_CODES or topk_weights.dtype != torch.float32:
        raise Unsupported(f"x of {x.dtype} with topk_weights of {topk_weights.dtype}")
    if down_scales is not None:
        intermediate = down_scales.shape[2] * 32
    else:
        intermediate = down_proj.shape[1 if weight_layout == "in_out" else 2]
    return native.problem(
        "ExpertsProblem",
        tokens=x.shape[0],
        topk=topk_weights.shape[1],
        experts=gate_up_proj.shape[0],
        hidden=x.shape[1],
        intermediate=intermediate,
        topk_weights=pointer(topk_weights),
        expert_offs=pointer(expert_offs),
        gather=pointer(gather_indices),
        scatter=pointer(scatter_indices),
        dtype=DTYPE_CODES[x.dtype],
        gate_up=pointer(gate_up_proj),
        down=pointer(down_proj),
        gate_up_scales=pointer(gate_up_scales),
        down_scales=pointer(down_scales),
        gate_up_bias=pointer(gate_up_proj_bias),
        down_bias=pointer(down_proj_bias),
        gate_up_a=pointer(gate_up_lora_a),
        gate_up_b=pointer(gate_up_lora_b),
        down_a=pointer(down_lora_a),
        down_b=pointer(down_lora_b),
        gate_up_rank=0 if gate_up_lora_a is None else gate_up_lora_a.shape[1],
        down_rank=0 if down_lora_a is None else down_lora_a.shape[1],
        lora_scaling=lora_scaling,
        in_out=weight_layout == "in_out",
        interleaved=gate_up_layout == "interleaved",
        plain=activation == "swiglu",
        alpha=alpha,
        limit=limit,
    ), 2 * intermediate


def _contiguous(tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def experts_fwd(
    x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj, gate_up_scales,
    gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a, gate_up_lora_b,
    down_lora_a, down_lora_b, activation, gate_up_layout, weight_layout, alpha, limit, lora_scaling,
    keep_pre_activation,
):  # fmt: skip
    library = native.cpu()
    tensors = _contiguous((
        x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj, gate_up_scales,
        gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a, gate_up_lora_b,
        down_lora_a, down_lora_b,
    ))  # fmt: skip
    problem, width = _problem(
        *tensors, activation, gate_up_layout, weight_layout, alpha, limit, lora_scaling
    )
    y = torch.empty(x.shape, dtype=x.dtype)
    rows = gather_indices.shape[0] if keep_pre_activation else 0
    pre_activation = torch.empty(rows, width, dtype=x.dtype)
    library.experts_fwd(
        problem=problem,
        x=pointer(tensors[0]),
        y=pointer(y),
        pre_activation=pointer(pre_activation) if rows else 0,
    )
    return y, pre_activation


def experts_bwd(
    d_y, pre_activation, x, topk_weights, expert_offs, gather_indices, scatter_indices,
    gate_up_proj, gate_up_scales, gate_up_proj_bias, down_proj, down_scales, down_proj_bias,
    gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b, activation, gate_up_layout,
    weight_layout, alpha, limit, lora_scaling, wanted,
):  # fmt: skip
    library = native.cpu()
    d_y, pre_activation, *tensors = _contiguous((
        d_y, pre_activation, x, topk_weights, expert_offs, gather_indices, scatter_indices,
        gate_up_proj, gate_up_scales, gate_up_proj_bias, down_proj, down_scales, down_proj_bias,
        gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b,
    ))  # fmt: skip
    problem, _ = _problem(
        *tensors, activation, gate_up_layout, weight_layout, alpha, limit, lora_scaling
    )
    names = {
        "d_x": x,
        "d_topk_weights": topk_weights,
        "d_gate_up": gate_up_proj,
        "d_gate_up_bias": gate_up_proj_bias,
        "d_down": down_proj,
        "d_down_bias": down_proj_bias,
        "d_gate_up_a": gate_up_lora_a,
        "d_gate_up_b": gate_up_lora_b,
        "d_down_a": down_lora_a,
        "d_down_b": down_lora_b,
    }
    grads = {
        name: torch.empty(t.shape, dtype=t.dtype) if need else None
        for (name, t), need in zip(names.items(), wanted, strict=True)
    }
    library.experts_bwd(
        problem=problem,
        d_y=pointer(d_y),
        pre_activation=pointer(pre_activation),
        x=pointer(tensors[0]),
        **{name: pointer(g) for name, g in grads.items()},
    )
    return tuple(x.new_empty(0) if g is None else g for g in grads.values())
