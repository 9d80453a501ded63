"""A layer of experts in eager PyTorch: the specification.

T tokens, K experts a token, S = T K rows sorted by expert, E experts, H hidden, I intermediate,
R rank of a LoRA pair. Row s belongs to expert e where expert_offs[e] <= s < expert_offs[e + 1].

topk_weights [T, K]         routing weight of each of a token's slots
expert_offs [E + 1]         [0] + cumsum(rows of each expert)
gather_indices [S]          token of each sorted row
scatter_indices [S]         sorted row of each slot; slot k of token t is slot t K + k
gate_up_proj                in_out [E, H, 2I], out_in [E, 2I, H]; MXFP4 blocks [E, 2I, H/32, 16]
down_proj                   in_out [E, I, H], out_in [E, H, I]; MXFP4 blocks [E, H, I/32, 16]
*_scales                    uint8 [E, 2I, H/32] and [E, H, I/32] with MXFP4 blocks, else None
*_bias                      [E, 2I] and [E, H], or None
gate_up_lora_a, _b          [E, R, H] and [E, 2I, R], or None; adds lora_scaling (x A^T) B^T
down_lora_a, _b             [E, R, I] and [E, H, R], or None
pre_activation [S, 2I]      x W + b of each sorted row, before any clamp, columns as gate_up_proj's

Gate and up are columns 0, 2, 4 ... and 1, 3, 5 ... (interleaved) or the two halves (concatenated).
"""

import torch

from medgpt_kernels.mxfp4.op import Mxfp4Tensor


def rows_of_experts(expert_offs: torch.Tensor):
    """Yields (expert, its sorted rows as a slice) of experts that have any."""
    offs = expert_offs.tolist()
    for e in range(len(offs) - 1):
        if offs[e] < offs[e + 1]:
            yield e, slice(offs[e], offs[e + 1])


def matrix(weight, scales, e: int, weight_layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Expert e's weight as [in, out] in `dtype`, whatever it is stored as."""
    if scales is not None:
        return Mxfp4Tensor(weight[e], scales[e]).dequantize(dtype).mT
    return weight[e] if weight_layout == "in_out" else weight[e].mT


def low_rank(x, a, b, e: int, scaling: float) -> torch.Tensor:
    """x [S, in] -> scaling (x A^T) B^T [S, out] of expert e; a [E, R, in], b [E, out, R]."""
    return x @ a[e].mT @ b[e].mT * scaling


def split(pre_activation: torch.Tensor, gate_up_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gate's and the up-projection's columns, [S, I] each."""
    if gate_up_layout == "interleaved":
        return pre_activation[..., ::2], pre_activation[..., 1::2]
    return pre_activation.chunk(2, dim=-1)


def activate(pre_activation, activation, gate_up_layout, alpha, limit) -> torch.Tensor:
    """[S, 2I] -> [S, I]: (up + 1) gate sigmoid(alpha gate) of the clamped, or silu(gate) up."""
    gate, up = split(pre_activation, gate_up_layout)
    if activation == "swiglu":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * (gate * alpha).sigmoid())


def activate_bwd(d_hidden, pre_activation, activation, gate_up_layout, alpha, limit):
    """The gradient of `activate`: d_hidden [S, I] -> [S, 2I]."""
    gate, up = split(pre_activation, gate_up_layout)
    d_pre = torch.empty_like(pre_activation)
    d_gate, d_up = split(d_pre, gate_up_layout)
    if activation == "swiglu":
        sigmoid = gate.sigmoid()
        d_gate.copy_(d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)))
        d_up.copy_(d_hidden * (gate * sigmoid))
        return d_pre
    clamped, clamped_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = (clamped * alpha).sigmoid()
    slope = sigmoid * (1 + alpha * clamped * (1 - sigmoid))
    d_gate.copy_((d_hidden * (clamped_up + 1) * slope).where(gate <= limit, 0))
    d_up.copy_((d_hidden * (clamped * sigmoid)).where(up.abs() <= limit, 0))
    return d_pre


def combine(rows: torch.Tensor, scatter_indices: torch.Tensor, topk: int) -> torch.Tensor:
    """Sums the rows of each token: [S, H] -> [T, H]."""
    return rows[scatter_indices.long()].unflatten(0, (-1, topk)).sum(1)


def sorted_weights(topk_weights: torch.Tensor, scatter_indices: torch.Tensor) -> torch.Tensor:
    """The routing weight of each sorted row, [S, 1]."""
    weights = torch.empty_like(topk_weights.flatten())
    weights[scatter_indices.long()] = topk_weights.flatten()
    return weights[:, None]


def experts_fwd(
    x,
    topk_weights,
    expert_offs,
    gather_indices,
    scatter_indices,
    gate_up_proj,
    gate_up_scales,
    gate_up_proj_bias,
    down_proj,
    down_scales,
    down_proj_bias,
    gate_up_lora_a,
    gate_up_lora_b,
    down_lora_a,
    down_lora_b,
    activation,
    gate_up_layout,
    weight_layout,
    alpha,
    limit,
    lora_scaling,
    keep_pre_activation,
):
    gathered = x[gather_indices.long()]
    width = down_proj.shape[1] if weight_layout == "in_out" else down_proj.shape[2]
    intermediate = width if down_scales is None else down_scales.shape[2] * 32
    pre_activation = x.new_empty(len(gathered), 2 * intermediate)
    rows = torch.empty_like(gathered)
    for e, at in rows_of_experts(expert_offs):
        pre = gathered[at] @ matrix(gate_up_proj, gate_up_scales, e, weight_layout, x.dtype)
        if gate_up_proj_bias is not None:
            pre = pre + gate_up_proj_bias[e]
        if gate_up_lora_a is not None:
            pre = pre + low_rank(gathered[at], gate_up_lora_a, gate_up_lora_b, e, lora_scaling)
        hidden = activate(pre, activation, gate_up_layout, alpha, limit)
        out = hidden @ matrix(down_proj, down_scales, e, weight_layout, x.dtype)
        if down_proj_bias is not None:
            out = out + down_proj_bias[e]
        if down_lora_a is not None:
            out = out + low_rank(hidden, down_lora_a, down_lora_b, e, lora_scaling)
        pre_activation[at], rows[at] = pre, out
    weighted = rows * sorted_weights(topk_weights, scatter_indices)
    y = combine(weighted.to(x.dtype), scatter_indices, topk_weights.shape[1])
    return y, pre_activation if keep_pre_activation else pre_activation[:0].clone()


def experts_bwd(
    d_y,
    pre_activation,
    x,
    topk_weights,
    expert_offs,
    gather_indices,
    scatter_indices,
    gate_up_proj,
    gate_up_scales,
    gate_up_proj_bias,
    down_proj,
    down_scales,
    down_proj_bias,
    gate_up_lora_a,
    gate_up_lora_b,
    down_lora_a,
    down_lora_b,
    activation,
    gate_up_layout,
    weight_layout,
    alpha,
    limit,
    lora_scaling,
    wanted,
):
    gathered = x[gather_indices.long()]
    d_rows = d_y[gather_indices.long()]  # [S, H] before the routing weight
    weights = sorted_weights(topk_weights, scatter_indices)
    d_gathered = torch.empty_like(gathered)
    d_weights = torch.empty_like(weights)
    tensors = (
        x, topk_weights, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias,
        gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b,
    )  # fmt: skip
    made = [torch.zeros_like(t) if need else None for t, need in zip(tensors, wanted, strict=True)]
    _, _, d_gate_up, d_gate_up_bias, d_down, d_down_bias, *d_lora = made

    for e, at in rows_of_experts(expert_offs):
        hidden = activate(pre_activation[at], activation, gate_up_layout, alpha, limit)
        d_out = (d_rows[at] * weights[at]).to(x.dtype)
        d_hidden = d_rows[at] @ matrix(down_proj, down_scales, e, weight_layout, x.dtype).mT
        if down_lora_a is not None:
            d_hidden = d_hidden + low_rank(
                d_rows[at], down_lora_b.mT, down_lora_a.mT, e, lora_scaling
            )
        # A row's out = W hidden + b, so d_y . out needs no second product with W.
        d_weights[at] = (d_hidden * hidden).to(weights.dtype).sum(-1, keepdim=True)
        if down_proj_bias is not None:
            d_weights[at] += (
                (d_rows[at] * down_proj_bias[e]).to(weights.dtype).sum(-1, keepdim=True)
            )
        d_hidden = (d_hidden * weights[at]).to(x.dtype)
        d_pre = activate_bwd(d_hidden, pre_activation[at], activation, gate_up_layout, alpha, limit)
        d_gathered[at] = d_pre @ matrix(gate_up_proj, gate_up_scales, e, weight_layout, x.dtype).mT
        if gate_up_lora_a is not None:
            d_gathered[at] += low_rank(d_pre, gate_up_lora_b.mT, gate_up_lora_a.mT, e, lora_scaling)
        for d_weight, inputs, d_outputs in (
            (d_gate_up, gathered[at], d_pre), (d_down, hidden, d_out),
        ):  # fmt: skip
            if d_weight is not None:
                d = inputs.mT @ d_outputs
                d_weight[e] = d if weight_layout == "in_out" else d.mT
        for d_bias, d_outputs in ((d_gate_up_bias, d_pre), (d_down_bias, d_out)):
            if d_bias is not None:
                d_bias[e] = d_outputs.sum(0)
        for (d_a, d_b), a, b, inputs, d_outputs in (
            (d_lora[:2], gate_up_lora_a, gate_up_lora_b, gathered[at], d_pre),
            (d_lora[2:], down_lora_a, down_lora_b, hidden, d_out),
        ):
            if d_a is not None:
                d_a[e] = (d_outputs @ b[e]).mT @ inputs * lora_scaling
            if d_b is not None:
                d_b[e] = d_outputs.mT @ (inputs @ a[e].mT) * lora_scaling
    if wanted[0]:
        made[0] = combine(d_gathered, scatter_indices, topk_weights.shape[1])
    if wanted[1]:
        made[1] = d_weights[scatter_indices.long()].view_as(topk_weights)
    return tuple(x.new_empty(0) if g is None else g for g in made)
