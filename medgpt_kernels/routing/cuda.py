"""Routing in CUDA C++: launchers of csrc/cuda/routing.cu, for tokens that one launch can sort.

T tokens, H hidden, E experts, K topk. The product is computed for up to 16 tokens, given logits and
ids are served up to 4,096; more tokens and the backward are Triton's.
"""

import torch

from medgpt_kernels import native
from medgpt_kernels.native import DTYPE_CODES, fp32, pointer
from medgpt_kernels.registry import PassedOn, Unsupported
from medgpt_kernels.routing.reference import narrow

native.cuda()
SCORING_CODES = {"topk_softmax": 0, "softmax_topk": 1, "sigmoid": 2}
MAX_EXPERTS, MAX_TOPK, MAX_TOKENS, PRODUCT_TOKENS, TILE = 256, 32, 4096, 16, 32


def _check(tokens: int, num_experts: int, topk: int, most: int) -> None:
    if tokens > most or num_experts > MAX_EXPERTS or topk > MAX_TOPK:
        raise PassedOn(f"{tokens} tokens, {num_experts} experts, topk {topk}: more than one launch")


def _launch(
    x, weight, bias, logits, correction_bias, topk_ids, tokens, num_experts, topk, scoring,
    renormalize,
):  # fmt: skip
    """weights, ids and the order; without logits ids are sorted alone."""
    device = (topk_ids if logits is None else logits).device
    bias, correction_bias = fp32(bias), fp32(correction_bias)
    given = None if topk_ids is None else narrow(topk_ids).contiguous()

    def integers(*shape):
        return torch.empty(shape, dtype=torch.int32, device=device)

    weights = ids = None
    if logits is not None:
        weights, ids = (
            torch.empty(tokens, topk, dtype=torch.float32, device=device),
            integers(tokens, topk),
        )
    slots = tokens * topk
    order = (integers(num_experts), integers(num_experts + 1), integers(slots), integers(slots))
    scratch = integers(1 + num_experts * max(1, -(-tokens // TILE)))
    ordinal, stream = native.place(scratch)
    native.cuda(ordinal).routing(
        device=ordinal,
        stream=stream,
        tokens=tokens,
        hidden=0 if x is None else x.shape[1],
        experts=num_experts,
        topk=topk,
        scoring=SCORING_CODES[scoring],
        renormalize=renormalize,
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
        **{
            n: pointer(t) for n, t in zip(("hist", "offs", "gather", "scatter"), order, strict=True)
        },
        scratch=pointer(scratch),
    )
    return weights, ids, *order


def routing_fwd(x, weight, bias, correction_bias, topk_ids, topk, scoring, renormalize):
    (tokens, _), num_experts = x.shape, weight.shape[0]
    if x.dtype not in DTYPE_CODES:
        raise Unsupported(f"x of {x.dtype}")
    _check(tokens, num_experts, topk, PRODUCT_TOKENS)
    x = x if x.stride(-1) == 1 and x.stride(0) * x.itemsize % 16 == 0 else x.contiguous()
    weight = weight.contiguous()
    native.check_rows(x, weight)
    logits = torch.empty(tokens, num_experts, dtype=torch.float32, device=x.device)
    routed = _launch(
        x, weight, bias, logits, correction_bias, topk_ids, tokens, num_experts, topk,
        scoring, renormalize,
    )  # fmt: skip
    return *routed, logits


def routing_logits_fwd(logits, correction_bias, topk_ids, topk, scoring, renormalize):
    if logits.dtype != torch.float32:
        raise Unsupported(f"logits of {logits.dtype}")
    tokens, num_experts = logits.shape
    _check(tokens, num_experts, topk, MAX_TOKENS)
    return _launch(
        None, None, None, logits.contiguous(), correction_bias, topk_ids, tokens, num_experts, topk,
        scoring, renormalize,
    )  # fmt: skip


def routing_sort(topk_ids, num_experts):
    tokens, topk = topk_ids.shape
    _check(tokens, num_experts, topk, MAX_TOKENS)
    routed = _launch(
        None, None, None, None, None, topk_ids, tokens, num_experts, topk, "topk_softmax", True
    )
    return routed[2:]


def routing_logits_bwd(d_topk_weights, topk_weights, topk_ids, logits, scoring, renormalize):
    raise PassedOn("no backward in CUDA C++")


def routing_bwd(
    d_topk_weights, d_logits, x, weight, bias, topk_weights, topk_ids, logits, scoring, renormalize,
    wanted,
):  # fmt: skip
    raise PassedOn("no backward in CUDA C++")
