"""Gradients of routing in Triton: of the logits, then of x and of the router's weight.

T tokens, H hidden, E experts, K topk.
"""

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles


@triton.jit(do_not_specialize=["tokens"])
def _routing_d_logits_kernel(
    DOut, DTopkWeights, DLogits, TopkWeights, TopkIds, Logits, tokens, EXPERTS: tl.constexpr,
    TOPK: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k_all = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    known = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    real = (t < tokens)[:, None] & (k_all < TOPK)[None, :]
    at, slot = t[:, None] * EXPERTS + e[None, :], t[:, None] * TOPK + k_all[None, :]
    d = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if DLogits is not None:
        d = tl.load(DLogits + at, mask=known, other=0).to(tl.float32)
    if DTopkWeights is not None:
        d_w = tl.load(DTopkWeights + slot, mask=real, other=0).to(tl.float32)
        w = tl.load(TopkWeights + slot, mask=real, other=0)
        ids = tl.load(TopkIds + slot, mask=real, other=0)
        logits = tl.load(Logits + at, mask=known, other=-float("inf"))
        mean = tl.sum(w * d_w, 1)[:, None]
        if SCORING == 2:
            part = w * (d_w - mean) if RENORMALIZE else w * d_w
        elif RENORMALIZE:
            part = w * (d_w - mean)
        else:
            part = w * d_w
            p = tl.exp(logits - tl.max(logits, 1)[:, None])
            d -= mean * (p / tl.sum(p, 1)[:, None])
        for k in range(TOPK):
            one = (k_all == k)[None, :]
            mine = e[None, :] == tl.sum(tl.where(one, ids, 0), 1)[:, None]
            add = tl.sum(tl.where(one, part, 0.0), 1)[:, None]
            if SCORING == 2:
                add = add / (1 + tl.exp(logits))  # 1 - sigmoid
            d += tl.where(mine, add, 0.0)
    tl.store(DOut + at, d, mask=known)


@triton.jit(do_not_specialize=["tokens"])
def _routing_d_x_kernel(
    DX, D, Weight, tokens, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STEP_E: tl.constexpr,
):  # fmt: skip
    TILES_H: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    t = (tl.program_id(0) // TILES_H).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(0) % TILES_H * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for begin in range(0, EXPERTS, STEP_E):
        e = begin + tl.arange(0, STEP_E)
        d = tl.load(
            D + t[:, None] * EXPERTS + e[None, :],
            mask=(t < tokens)[:, None] & (e < EXPERTS)[None, :], other=0,
        )  # fmt: skip
        weight = tl.load(
            Weight + e[:, None] * HIDDEN + h[None, :],
            mask=(e < EXPERTS)[:, None] & (h < HIDDEN)[None, :], other=0,
        )  # fmt: skip
        acc = tl.dot(d.to(OPERAND), weight.to(OPERAND), acc, input_precision="ieee")
    inside = (t < tokens)[:, None] & (h < HIDDEN)[None, :]
    tl.store(DX + t[:, None] * HIDDEN + h[None, :], acc.to(DX.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "share"])
def _routing_d_weight_kernel(
    Part, D, X, stride_x_t, tokens, share, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    OPERAND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    TILES_H: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    TILES_E: tl.constexpr = (EXPERTS + BLOCK_E - 1) // BLOCK_E
    h = tl.program_id(0) % TILES_H * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.program_id(0) // TILES_H % TILES_E * BLOCK_E + tl.arange(0, BLOCK_E)
    split = (tl.program_id(0) // (TILES_H * TILES_E)).to(tl.int64)
    acc = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
    end = tl.minimum((split + 1) * share, tokens)
    for begin in range(split * share, end, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        d = tl.load(
            D + t[None, :] * EXPERTS + e[:, None],
            mask=(e < EXPERTS)[:, None] & (t < end)[None, :], other=0,
        )  # fmt: skip
        x = tl.load(
            X + t[:, None] * stride_x_t + h[None, :],
            mask=(t < end)[:, None] & (h < HIDDEN)[None, :], other=0,
        )  # fmt: skip
        acc = tl.dot(d.to(OPERAND), x.to(OPERAND), acc, input_precision="ieee")
    inside = (e < EXPERTS)[:, None] & (h < HIDDEN)[None, :]
    out = Part + split * EXPERTS * HIDDEN + e[:, None] * HIDDEN + h[None, :]
    tl.store(out, acc, mask=inside)


def _operand(dtype: torch.dtype):
    """What products multiply: fp16 gradients of a mean over tokens would underflow."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def d_logits_of(
    d_topk_weights, d_logits, topk_weights, topk_ids, logits, scoring: int, renormalize: bool
) -> torch.Tensor:
    """[T, E] fp32: what reaches the logits through the weights and directly."""
    tokens, num_experts = logits.shape
    topk = topk_ids.shape[1]
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_t = max(1, 2048 // block_e)
    out = torch.empty(tokens, num_experts, dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return out
    with torch.cuda.device_of(logits):
        _routing_d_logits_kernel[(triton.cdiv(tokens, block_t),)](
            DOut=out,
            DTopkWeights=d_topk_weights,
            DLogits=d_logits,
            TopkWeights=topk_weights,
            TopkIds=topk_ids,
            Logits=logits,
            tokens=tokens,
            EXPERTS=num_experts,
            TOPK=topk,
            SCORING=scoring,
            RENORMALIZE=renormalize,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(topk),
            **tiles.choose("routing_d_logits", logits),
        )
    return out


def d_x_of(d: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """d weight in x's dtype."""
    (tokens, hidden), num_experts = x.shape, weight.shape[0]
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    tile = tiles.choose("routing_d_x", x)
    programs = triton.cdiv(tokens, tile["BLOCK_T"]) * triton.cdiv(hidden, tile["BLOCK_H"])
    with torch.cuda.device_of(x):
        _routing_d_x_kernel[(programs,)](
            DX=out,
            D=d,
            Weight=weight,
            tokens=tokens,
            HIDDEN=hidden,
            EXPERTS=num_experts,
            OPERAND=_operand(x.dtype),
            STEP_E=32 if num_experts > 16 else 16,
            **tile,
        )
    return out


def d_weight_of(d: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """d^T x in weight's dtype; tokens are summed in shares, each of which fills its own slice."""
    (tokens, hidden), num_experts = x.shape, weight.shape[0]
    block_e, tile = 32 if num_experts > 16 else 16, tiles.choose("routing_d_weight", x)
    block_t, block_h = tile["BLOCK_T"], tile["BLOCK_H"]
    splits = min(max(tokens // 512, 1), 8)
    share = triton.cdiv(triton.cdiv(tokens, splits), block_t) * block_t
    part = torch.empty(splits, num_experts, hidden, dtype=torch.float32, device=x.device)
    grid = triton.cdiv(hidden, block_h) * triton.cdiv(num_experts, block_e) * splits
    with torch.cuda.device_of(x):
        _routing_d_weight_kernel[(grid,)](
            Part=part,
            D=d,
            X=x,
            stride_x_t=x.stride(0),
            tokens=tokens,
            share=share,
            HIDDEN=hidden,
            EXPERTS=num_experts,
            OPERAND=_operand(x.dtype),
            BLOCK_E=block_e,
            **tile,
        )
    return part.sum(0).to(weight.dtype)
