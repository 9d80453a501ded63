"""Routing on the CPU: launchers of csrc/cpu/routing.cpp and routing_bwd.cpp."""

import torch

from medgpt_kernels import native
from medgpt_kernels.native import DTYPE_CODES, fp32, pointer, rows
from medgpt_kernels.registry import Unsupported
from medgpt_kernels.routing.reference import narrow

native.cpu()
SCORING_CODES = {"topk_softmax": 0, "softmax_topk": 1, "sigmoid": 2}


def _problem(logits, hidden, topk, scoring, renormalize):
    return native.problem(
        "RoutingProblem",
        tokens=logits.shape[0],
        hidden=hidden,
        experts=logits.shape[1],
        topk=topk,
        scoring=SCORING_CODES[scoring],
        renormalize=renormalize,
    )


def _order(slots, num_experts):
    """hist, offs, gather and scatter. Spelled out: a loop shows in a single token's routing."""
    return (
        torch.empty(num_experts, dtype=torch.int32),
        torch.empty(num_experts + 1, dtype=torch.int32),
        torch.empty(slots, dtype=torch.int32),
        torch.empty(slots, dtype=torch.int32),
    )


def _forward(x, weight, bias, logits, correction_bias, topk_ids, topk, scoring, renormalize):
    bias, correction_bias = fp32(bias), fp32(correction_bias)
    given = None if topk_ids is None else narrow(topk_ids).contiguous()
    tokens = logits.shape[0]
    weights = torch.empty(tokens, topk, dtype=torch.float32)
    ids = torch.empty(tokens, topk, dtype=torch.int32)
    hist, offs, gather, scatter = _order(tokens * topk, logits.shape[1])
    native.cpu().routing_fwd(
        problem=_problem(logits, 0 if x is None else x.shape[1], topk, scoring, renormalize),
        dtype=0 if x is None else DTYPE_CODES[x.dtype],
        x=pointer(x),
        weight=pointer(weight),
        x_stride=0 if x is None else x.stride(0),
        bias=pointer(bias),
        correction_bias=pointer(correction_bias),
        given_ids=pointer(given),
        logits=pointer(logits),
        topk_weights=pointer(weights),
        topk_ids=pointer(ids),
        hist=pointer(hist),
        offs=pointer(offs),
        gather=pointer(gather),
        scatter=pointer(scatter),
    )
    return weights, ids, hist, offs, gather, scatter


def routing_fwd(x, weight, bias, correction_bias, topk_ids, topk, scoring, renormalize):
    if x.dtype not in DTYPE_CODES:
        raise Unsupported(f"x of {x.dtype}")
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    routed = _forward(
        rows(x), weight.contiguous(), bias, logits, correction_bias, topk_ids, topk, scoring,
        renormalize,
    )  # fmt: skip
    return *routed, logits


def routing_logits_fwd(logits, correction_bias, topk_ids, topk, scoring, renormalize):
    if logits.dtype != torch.float32:
        raise Unsupported(f"logits of {logits.dtype}")
    return _forward(
        None, None, None, logits.contiguous(), correction_bias, topk_ids, topk, scoring,
        renormalize,
    )  # fmt: skip


def routing_sort(topk_ids, num_experts):
    topk_ids = topk_ids.contiguous()
    hist, offs, gather, scatter = _order(topk_ids.numel(), num_experts)
    native.cpu().routing_sort(
        ids=pointer(topk_ids),
        tokens=topk_ids.shape[0],
        topk=topk_ids.shape[1],
        experts=num_experts,
        hist=pointer(hist),
        offs=pointer(offs),
        gather=pointer(gather),
        scatter=pointer(scatter),
    )
    return hist, offs, gather, scatter


def routing_logits_bwd(d_topk_weights, topk_weights, topk_ids, logits, scoring, renormalize):
    if logits.dtype != torch.float32:
        raise Unsupported(f"logits of {logits.dtype}")
    d_topk_weights, logits = d_topk_weights.contiguous(), logits.contiguous()
    d_logits = torch.empty(logits.shape, dtype=torch.float32)
    native.cpu().routing_logits_bwd(
        problem=_problem(logits, 0, topk_ids.shape[1], scoring, renormalize),
        d_topk_weights=pointer(d_topk_weights),
        topk_weights=pointer(topk_weights),
        logits=pointer(logits),
        topk_ids=pointer(topk_ids),
        d_logits=pointer(d_logits),
    )
    return d_logits


def routing_bwd(
    d_topk_weights, d_logits, x, weight, bias, topk_weights, topk_ids, logits, scoring, renormalize,
    wanted,
):  # fmt: skip
    if x.dtype not in DTYPE_CODES:
        raise Unsupported(f"x of {x.dtype}")
    x, weight = rows(x), weight.contiguous()
    d_topk_weights, d_logits = fp32(d_topk_weights), fp32(d_logits)
    d_x, d_weight = (
        torch.empty(t.shape, dtype=t.dtype) if need else None
        for t, need in zip((x, weight), wanted, strict=False)
    )
    d_bias = torch.empty(weight.shape[0], dtype=torch.float32) if wanted[2] else None
    native.cpu().routing_bwd(
        problem=_problem(logits, x.shape[1], topk_ids.shape[1], scoring, renormalize),
        dtype=DTYPE_CODES[x.dtype],
        x=pointer(x),
        weight=pointer(weight),
        x_stride=x.stride(0),
        d_topk_weights=pointer(d_topk_weights),
        d_logits=pointer(d_logits),
        topk_weights=pointer(topk_weights),
        logits=pointer(logits),
        topk_ids=pointer(topk_ids),
        d_x=pointer(d_x),
        d_weight=pointer(d_weight),
        d_bias=pointer(d_bias),
    )
    if d_bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return tuple(x.new_empty(0) if g is None else g for g in (d_x, d_weight, d_bias))
