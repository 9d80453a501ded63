"""The experts in Triton: the backward pass, gathers and ordered sums, no atomics.

T tokens, K experts a token, S = T K rows sorted by expert, E experts, H hidden, I intermediate,
R rank. The activation is recomputed from pre_activation [S, 2I] where d_hidden leaves its product.
d_topk_weights are d_hidden . hidden, in parts of a tile of columns that are added in order, and
d_y . bias: the rows of the forward are neither kept nor computed again.
"""

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.experts.triton_bwd_weight import Operand, bias_gradient, weight_gradient
from medgpt_kernels.experts.triton_fwd import Call, activate, gate_and_sigmoid
from medgpt_kernels.experts.triton_gemm import (
    experts_block,
    find_rows,
    find_tile,
    product,
    weight,
)
from medgpt_kernels.rotary.triton import index_dtype, rows

SORT_BLOCK = 1024


@triton.jit
def _activate_bwd(d_hidden, gate, up, alpha, limit, PLAIN: tl.constexpr):
    """d_gate and d_up of `activate`; nothing flows where it clamped."""
    if PLAIN:
        gate, sigmoid = gate_and_sigmoid(gate, 1.0)
        d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up = d_hidden * (gate * sigmoid)
    else:
        clamped, sigmoid = gate_and_sigmoid(tl.where(gate > limit, limit, gate), alpha)
        clamped_up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        slope = sigmoid * (1 + alpha * clamped * (1 - sigmoid))
        d_gate = tl.where(gate <= limit, d_hidden * (clamped_up + 1) * slope, 0.0)
        d_up = tl.where(tl.abs(up) <= limit, d_hidden * (clamped * sigmoid), 0.0)
    return d_gate, d_up


@triton.jit(do_not_specialize=["slots"])
def _experts_bwd_sort_kernel(
    SortedWeights, TopkWeights, ScatterIndices, slots, BLOCK: tl.constexpr
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ScatterIndices + slot, mask=slot < slots, other=0)
    value = tl.load(TopkWeights + slot, mask=slot < slots)
    tl.store(SortedWeights + row, value, mask=slot < slots)


@triton.jit
def _halves(x):
    """[M, N] -> its left and right [M, N / 2], each column in its own thread."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _leave(
    d_hidden, n0, row, inside, weights, DPreActivation, Hidden, Partial, PreActivation, width,
    alpha, limit, PLAIN: tl.constexpr, INTERLEAVED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """What becomes of d_hidden [M, N] from column n0 on; gives its dot [M] with hidden."""
    BLOCK_M: tl.constexpr = d_hidden.shape[0]
    BLOCK_N: tl.constexpr = d_hidden.shape[1]
    n = n0 + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (n < width)[None, :]
    where = row.to(INDEX)[:, None] * (2 * width)
    both = 2 * n0 + tl.arange(0, 2 * BLOCK_N)
    mask_both = inside[:, None] & (both < 2 * width)[None, :]
    if INTERLEAVED:
        pre = tl.load(PreActivation + where + both[None, :], mask=mask_both, other=0)
        gate, up = tl.split(tl.reshape(pre, [BLOCK_M, BLOCK_N, 2]))
    else:
        gate = tl.load(PreActivation + where + n[None, :], mask=mask, other=0)
        up = tl.load(PreActivation + where + width + n[None, :], mask=mask, other=0)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    dot = weights
    if Hidden is not None or Partial is not None:
        hidden = activate(gate, up, alpha, limit, PLAIN)
        dot = tl.sum(tl.where(mask, d_hidden * hidden, 0.0), 1)
        if Hidden is not None:
            tl.store(
                Hidden + row.to(INDEX)[:, None] * width + n[None, :],
                hidden.to(Hidden.dtype.element_ty),
                mask=mask,
            )
    if DPreActivation is not None:
        d_gate, d_up = _activate_bwd(d_hidden * weights[:, None], gate, up, alpha, limit, PLAIN)
        d_gate = d_gate.to(DPreActivation.dtype.element_ty)
        d_up = d_up.to(DPreActivation.dtype.element_ty)
        if INTERLEAVED:
            d_pre = tl.reshape(tl.join(d_gate, d_up), [BLOCK_M, 2 * BLOCK_N])
            tl.store(DPreActivation + where + both[None, :], d_pre, mask=mask_both)
        else:
            tl.store(DPreActivation + where + n[None, :], d_gate, mask=mask)
            tl.store(DPreActivation + where + width + n[None, :], d_up, mask=mask)
    return dot


@triton.jit(do_not_specialize=["slots"])
def _experts_bwd_hidden_kernel(
    DPreActivation,
    Hidden,
    Partial,
    PreActivation,
    SortedWeights,
    X,
    W,
    Scales,
    Bias,
    LowRank,
    Expand,
    ExpertOffs,
    GatherIndices,
    stride_x_t,
    stride_w_e,
    stride_w_k,
    stride_w_n,
    stride_scales_e,
    stride_scales_row,
    stride_expand_e,
    stride_expand_r,
    stride_expand_n,
    num_experts,
    slots,
    depth,
    width,
    rank,
    scaling,
    alpha,
    limit,
    PLAIN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PACKED: tl.constexpr,
    UNPACK: tl.constexpr,
    EVEN_K: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(width, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    expert, first, end = find_tile(
        tl.program_id(0) // tiles_n, ExpertOffs, num_experts, BLOCK_E, BLOCK_M
    )
    if expert >= num_experts:
        return
    row, token, inside = find_rows(first, end, GatherIndices, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    e = expert.to(tl.int64)
    low_rank_rows = row
    if LowRank is not None:
        low_rank_rows = LowRank + row.to(INDEX) * rank
        Expand += e * stride_expand_e
    if Scales is not None:
        Scales += e * stride_scales_e
    d_hidden = product(
        X + token.to(INDEX) * stride_x_t, W + e * stride_w_e, Scales, tile_n * BLOCK_N, n, width,
        depth, stride_w_k, stride_w_n, stride_scales_row, low_rank_rows, Expand, rank, scaling,
        stride_expand_r, stride_expand_n, PACKED, UNPACK, EVEN_K, INPUT_PRECISION, BLOCK_K,
        BLOCK_R,
    )  # fmt: skip
    weights = tl.load(SortedWeights + row)
    n0 = tile_n * BLOCK_N
    left, right = _halves(d_hidden)
    quarters = _halves(left) + _halves(right)  # at once they would not fit the registers
    dot = tl.zeros([BLOCK_M], tl.float32)
    for q in tl.static_range(4):
        dot += _leave(
            quarters[q], n0 + q * (BLOCK_N // 4), row, inside, weights, DPreActivation, Hidden,
            Partial, PreActivation, width, alpha, limit, PLAIN, INTERLEAVED, INDEX,
        )  # fmt: skip
    if Partial is not None:
        tl.store(Partial + tile_n.to(tl.int64) * slots + row, dot, mask=inside)


@triton.jit(do_not_specialize=["slots", "tiles"])
def _experts_bwd_topk_kernel(
    DTopkWeights,
    Partial,
    DY,
    Bias,
    ExpertOffs,
    ScatterIndices,
    stride_d_y_t,
    num_experts,
    slots,
    tiles,
    hidden,
    TOPK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = slot < slots
    row = tl.load(ScatterIndices + slot, mask=inside, other=0)
    total = tl.zeros([BLOCK_S], tl.float32)
    part = Partial + row
    for _ in range(tiles):
        total += tl.load(part)
        part += slots
    if Bias is not None:
        e = tl.arange(0, BLOCK_E)
        until = tl.load(ExpertOffs + e + 1, mask=e < num_experts, other=2147483647)
        expert = tl.sum((until[None, :] <= row[:, None]).to(tl.int32), 1).to(tl.int64)
        d_y_rows = DY + (slot // TOPK).to(tl.int64) * stride_d_y_t
        bias_rows = Bias + expert * hidden
        acc = tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
        for h0 in range(0, hidden, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            mask = inside[:, None] & (h < hidden)[None, :]
            d_y = tl.load(d_y_rows[:, None] + h[None, :], mask=mask, other=0)
            bias = tl.load(bias_rows[:, None] + h[None, :], mask=mask, other=0)
            acc += d_y.to(tl.float32) * bias.to(tl.float32)
        total += tl.sum(acc, 1)
    tl.store(DTopkWeights + slot, total, mask=inside)


def _sorted_weights(call: Call) -> torch.Tensor:
    """The routing weight of each sorted row, [S]."""
    out = call.empty(call.rows, dtype=torch.float32)
    _experts_bwd_sort_kernel[(triton.cdiv(call.rows, SORT_BLOCK),)](
        SortedWeights=out,
        TopkWeights=call.topk_weights,
        ScatterIndices=call.scatter,
        slots=call.rows,
        BLOCK=SORT_BLOCK,
        num_warps=4,
    )
    return out


def _hidden_gradient(call, d_y, d_low, pre_activation, sorted_weights, wanted):
    """d_pre_activation [S, 2I], hidden [S, I] and parts of d_topk_weights; None where not wanted.

    The parts [tiles, S] are sums over a tile of columns each.
    """
    if not any(wanted):
        return None, None, None
    weights = weight(call.down, call.down_scales, call.in_out, transposed=True)
    packed = call.down_scales is not None
    marks = ("lora",) if d_low is not None else ("odd",) if call.intermediate % 16 else ()
    index = index_dtype(d_y, pre_activation)
    if index == tl.int64:
        marks = ("long", *marks)
    tile = call.tile("experts_bwd_hidden", packed, *marks)
    parts = triton.cdiv(call.intermediate, tile["BLOCK_N"])
    d_pre = call.empty(*pre_activation.shape) if wanted[0] else None
    hidden = call.empty(call.rows, call.intermediate) if wanted[1] else None
    partial = call.empty(parts, call.rows, dtype=torch.float32) if wanted[2] else None
    call.launch(
        _experts_bwd_hidden_kernel,
        d_y,
        weights,
        call.low_rank(d_low, call.down_a, False),
        gathered=True,
        tile=tile,
        DPreActivation=d_pre,
        Hidden=hidden,
        Partial=partial,
        PreActivation=pre_activation.contiguous(),
        SortedWeights=sorted_weights,
        slots=call.rows,
        INTERLEAVED=call.interleaved,
        INDEX=index,
        **call.activation,
    )
    return d_pre, hidden, partial


def _topk_gradient(call: Call, d_y, partial) -> torch.Tensor:
    out = call.empty(*call.topk_weights.shape, dtype=torch.float32)
    config = tiles.choose("experts_bwd_topk", out)
    _experts_bwd_topk_kernel[(triton.cdiv(call.rows, config["BLOCK_S"]),)](
        DTopkWeights=out,
        Partial=partial,
        DY=d_y,
        Bias=call.down_bias,
        ExpertOffs=call.expert_offs,
        ScatterIndices=call.scatter,
        stride_d_y_t=d_y.stride(0),
        num_experts=call.num_experts,
        slots=call.rows,
        tiles=partial.shape[0],
        hidden=call.hidden,
        TOPK=call.topk,
        BLOCK_E=experts_block(call.num_experts),
        **config,
    )
    return out


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
    call = Call(
        x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj,
        gate_up_scales, gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a,
        gate_up_lora_b, down_lora_a, down_lora_b, activation, gate_up_layout, weight_layout, alpha,
        limit, lora_scaling,
    )  # fmt: skip
    (
        want_x, want_topk, want_gate_up, want_gate_up_bias, want_down, want_down_bias,
        want_gate_up_a, want_gate_up_b, want_down_a, want_down_b,
    ) = wanted  # fmt: skip
    made = [None] * len(wanted)
    d_y = rows(d_y)
    with torch.cuda.device_of(x):
        weights = _sorted_weights(call)
        d_low = call.shrink(d_y, call.down_b, True, gathered=True)
        want_pre = want_x or want_gate_up or want_gate_up_bias or want_gate_up_a or want_gate_up_b
        want_hidden = want_down or want_down_a or want_down_b
        d_pre, hidden, partial = _hidden_gradient(
            call, d_y, d_low, pre_activation, weights, (want_pre, want_hidden, want_topk)
        )
        inputs, d_rows = Operand(call.x, call.gather), Operand(d_y, call.gather, weights)
        if want_topk:
            made[1] = _topk_gradient(call, d_y, partial)
        if want_down:
            made[4] = weight_gradient(call, Operand(hidden), d_rows, out_in=not call.in_out)
        if want_down_bias:
            made[5] = bias_gradient(call, d_rows)
        pair = {"out_in": True, "scale": call.scaling}
        if want_down_a:
            made[8] = weight_gradient(call, Operand(hidden), Operand(d_low, None, weights), **pair)
        if want_down_b:
            low = call.shrink(hidden, call.down_a, False, gathered=False)
            made[9] = weight_gradient(call, Operand(low), d_rows, **pair)
        if want_pre:
            d_low = call.shrink(d_pre, call.gate_up_b, True, gathered=False)
        if want_gate_up:
            made[2] = weight_gradient(call, inputs, Operand(d_pre), out_in=not call.in_out)
        if want_gate_up_bias:
            made[3] = bias_gradient(call, Operand(d_pre))
        if want_gate_up_a:
            made[6] = weight_gradient(call, inputs, Operand(d_low), **pair)
        if want_gate_up_b:
            low = call.shrink(call.x, call.gate_up_a, False, gathered=True)
            made[7] = weight_gradient(call, Operand(low), Operand(d_pre), **pair)
        if want_x:
            d_gathered = call.multiply(
                d_pre,
                weight(call.gate_up, call.gate_up_scales, call.in_out, transposed=True),
                gathered=False,
                low_rank=call.low_rank(d_low, call.gate_up_a, False),
            )
            made[0] = call.combine(d_gathered)
    return tuple(x.new_empty(0) if g is None else g for g in made)
