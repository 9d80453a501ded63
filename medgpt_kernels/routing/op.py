"""Routing of tokens to experts: router product, top-k, weights, and the sort by expert.

T tokens, H hidden, E experts, K topk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from medgpt_kernels import native, registry
from medgpt_kernels.routing.reference import narrow

SCORINGS = ("topk_softmax", "softmax_topk", "sigmoid")


class RoutingData(NamedTuple):
    """Who computes what, and where each expert's rows lie.

    Example, T = 2, K = 2, E = 3, topk_ids = [[2, 0], [2, 1]]: expert_hist = [1, 1, 2],
    expert_offs = [0, 1, 2, 4], gather_indices = [0, 1, 0, 1], scatter_indices = [2, 0, 3, 1].
    """

    topk_weights: torch.Tensor  # [T, K] fp32
    topk_ids: torch.Tensor  # [T, K] int32
    expert_hist: torch.Tensor  # [E] int32, rows of each expert
    expert_offs: torch.Tensor  # [E + 1] int32 = [0] + cumsum(expert_hist)
    gather_indices: torch.Tensor  # [T K] int32, token of each expert-sorted row
    scatter_indices: torch.Tensor  # [T K] int32, sorted row of each token slot t K + k
    logits: torch.Tensor | None  # [T, E] fp32; None from routing_from_topk


def routing(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    *,
    scoring: str = "topk_softmax",
    renormalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
) -> RoutingData:
    """Choose each token's experts and sort the token slots by expert.

    Logits are x weight^T + bias, accumulated and kept in fp32. The K experts of the largest score
    are chosen, largest first, ties to the lower id; an expert's sorted rows keep token order.

    Args:
        x: [T, H] fp32, bf16 or fp16.
        weight: [E, H] in x's dtype.
        bias: [E] in x's dtype or fp32, or None.
        topk: K, experts a token.
        scoring: "topk_softmax" (gpt-oss: softmax over the chosen), "softmax_topk" (Mixtral, Qwen:
            softmax over all E, then the K largest) or "sigmoid" (DeepSeek-V3).
        renormalize: divide the chosen scores by their sum. Always so for "topk_softmax".
        correction_bias: [E] float, added to the sigmoid scores for the choice only; no gradient.
        topk_ids: int32 or int64 [T, K], decisions to follow instead of choosing.

    Returns:
        RoutingData. Gradients flow to x, weight and bias through topk_weights and through logits.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit, topk > E; on the CPU also ids
            out of range and logits that are NaN (on a GPU their tokens' weights are NaN).
    """
    if not torch.compiler.is_compiling():
        routed = native.direct().routing_direct(
            x, weight, bias, topk, scoring, renormalize, correction_bias, topk_ids
        )
        if routed is not None:
            return RoutingData._make(routed)
    if registry.autocast_dtype(x.device.type) is not None:
        x, weight = registry.autocast(x, weight)
        if bias is not None and bias.dtype != torch.float32:
            (bias,) = registry.autocast(bias)
    _check_router(x, weight, bias)
    _check_choice(x, weight.shape[0], topk, scoring, renormalize, correction_bias, topk_ids)
    return RoutingData(
        *_routing_direct(x, weight, bias, correction_bias, topk_ids, topk, scoring, renormalize)
    )


def routing_from_logits(
    logits: torch.Tensor,
    topk: int,
    *,
    scoring: str = "topk_softmax",
    renormalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
) -> RoutingData:
    """`routing` for models that compute their own logits.

    Args:
        logits: [T, E] float; widened to fp32. The others are as in `routing`.

    Returns:
        RoutingData whose `logits` are the given ones in fp32; gradients flow to them.

    Raises:
        ValueError: as `routing`.
    """
    if logits.ndim != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"routing: expected float logits [T, E], got {logits.dtype} {list(logits.shape)}"
        )
    _check_choice(logits, logits.shape[1], topk, scoring, renormalize, correction_bias, topk_ids)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    routed = _routing_logits_fwd(logits, correction_bias, topk_ids, topk, scoring, renormalize)
    return RoutingData(*routed, logits)


def routing_from_topk(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int
) -> RoutingData:
    """Sort the token slots of models that hand over ids and weights.

    Args:
        topk_ids: int32 or int64 [T, K].
        topk_weights: float [T, K].
        num_experts: E.

    Returns:
        RoutingData without logits; topk_weights are the given ones in fp32 and carry gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also ids out of range.
    """
    if not topk_weights.dtype.is_floating_point or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"routing: expected float topk_weights {list(topk_ids.shape)} as topk_ids, got "
            f"{topk_weights.dtype} {list(topk_weights.shape)}"
        )
    if topk_weights.device != topk_ids.device:
        raise ValueError(
            f"routing: expected topk_weights on {topk_ids.device}, got {topk_weights.device}"
        )
    if num_experts < 1:
        raise ValueError(f"routing: expected num_experts >= 1, got {num_experts}")
    _check_ids(topk_ids, topk_ids.shape, num_experts, topk_weights.device)
    if topk_ids.shape[1] < 1:
        raise ValueError(
            f"routing: expected topk_ids [T, K] with K >= 1, got {list(topk_ids.shape)}"
        )
    _check_slots(*topk_ids.shape)
    wide = torch.promote_types(topk_weights.dtype, torch.float32)
    ids = narrow(topk_ids)
    return RoutingData(topk_weights.to(wide), ids, *_routing_sort(ids, num_experts), None)


def load_balancing_loss(
    data: RoutingData | Sequence[RoutingData], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """E sum_e f_e p_e over the tokens of all layers (Switch, arXiv 2101.03961, equations 4 to 6).

    f_e counts the chosen slots of expert e a token, p_e is the mean of softmax(logits): what
    transformers' load_balancing_loss_func computes, with the decisions that were taken.

    Args:
        data: one RoutingData with logits, or one a layer.
        attention_mask: [T], or of any shape of T elements; tokens at 0 do not count.

    Returns:
        A scalar, differentiable in the logits.

    Raises:
        ValueError: no logits, no layers, or a mask of another size.
    """
    layers = _layers("load_balancing_loss", data, attention_mask)
    num_experts = layers[0].logits.shape[1]
    count = probability = total = 0
    for layer in layers:
        p = layer.logits.softmax(-1)
        if attention_mask is None:
            count = count + layer.expert_hist.to(p.dtype)
            probability = probability + p.sum(0)
            total = total + p.shape[0]
        else:
            mask = attention_mask.reshape(-1).to(p)
            ids = layer.topk_ids.long()
            slots = mask[:, None].expand(ids.shape).reshape(-1)
            count = count + p.new_zeros(num_experts).scatter_add(0, ids.reshape(-1), slots)
            probability = probability + (p * mask[:, None]).sum(0)
            total = total + mask.sum()
    return num_experts * (count / total * (probability / total)).sum()


def router_z_loss(
    data: RoutingData | Sequence[RoutingData], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5).

    Args, Returns, Raises: as `load_balancing_loss`.
    """
    layers = _layers("router_z_loss", data, attention_mask)
    z = torch.cat([layer.logits.logsumexp(-1) for layer in layers]).square()
    if attention_mask is None:
        return z.mean()
    mask = attention_mask.reshape(-1).to(z).repeat(len(layers))
    return (z * mask).sum() / mask.sum()


def _layers(op: str, data, attention_mask) -> Sequence[RoutingData]:
    layers = [data] if isinstance(data, RoutingData) else data
    if not isinstance(layers, Sequence) or not all(isinstance(d, RoutingData) for d in layers):
        raise ValueError(
            f"{op}: expected RoutingData, one or a sequence, got {type(data).__name__}"
        )
    if not layers or any(layer.logits is None for layer in layers):
        raise ValueError(
            f"{op}: expected RoutingData with logits, got "
            + ("logits None (routing_from_topk)" if layers else "an empty sequence")
        )
    experts = [layer.logits.shape[1] for layer in layers]
    if any(n != experts[0] for n in experts):
        raise ValueError(f"{op}: expected layers of as many experts each, got {experts}")
    for layer in layers:
        tokens = layer.logits.shape[0]
        if attention_mask is not None and attention_mask.numel() != tokens:
            raise ValueError(
                f"{op}: expected an attention_mask of {tokens} tokens, got "
                f"{list(attention_mask.shape)}"
            )
    return layers


def _check_router(x, weight, bias) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.shape[1] < 1:
        raise ValueError(
            f"routing: expected x [T, H] and weight [E, H], H >= 1, got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    if not x.dtype.is_floating_point or weight.dtype != x.dtype:
        raise ValueError(
            f"routing: expected x and weight of one float dtype, got {x.dtype} and {weight.dtype}"
        )
    if weight.device != x.device:
        raise ValueError(f"routing: expected weight on x's {x.device}, got {weight.device}")
    if bias is None:
        return
    if bias.shape != (weight.shape[0],) or bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"routing: expected bias {x.dtype} or float32 [{weight.shape[0]}], got {bias.dtype} "
            f"{list(bias.shape)}"
        )
    if bias.device != x.device:
        raise ValueError(f"routing: expected bias on x's {x.device}, got {bias.device}")


def _check_choice(x, num_experts, topk, scoring, renormalize, correction_bias, topk_ids) -> None:
    """x: the tokens, or their logits."""
    if scoring not in SCORINGS:
        raise ValueError(f"routing: expected scoring one of {', '.join(SCORINGS)}, got {scoring!r}")
    if not isinstance(topk, (int, torch.SymInt)) or not 1 <= topk <= num_experts:
        raise ValueError(f"routing: expected topk in 1 ... {num_experts} (experts), got {topk!r}")
    _check_slots(x.shape[0], topk)
    if scoring == "topk_softmax" and not renormalize:
        raise ValueError(
            "routing: expected renormalize=True with scoring topk_softmax, whose weights sum to "
            "one, got False"
        )
    if correction_bias is not None:
        if scoring != "sigmoid":
            raise ValueError(
                f"routing: expected scoring sigmoid with correction_bias, got {scoring}"
            )
        if correction_bias.shape != (num_experts,) or not correction_bias.dtype.is_floating_point:
            raise ValueError(
                f"routing: expected a float correction_bias [{num_experts}], got "
                f"{correction_bias.dtype} {list(correction_bias.shape)}"
            )
        if correction_bias.device != x.device:
            raise ValueError(
                f"routing: expected correction_bias on {x.device}, got {correction_bias.device}"
            )
    if topk_ids is not None:
        _check_ids(topk_ids, (x.shape[0], topk), num_experts, x.device)


def _check_slots(tokens, topk) -> None:
    if tokens * topk >= 2**31:
        raise ValueError(f"routing: expected T K below 2^31 (int32 indices), got {tokens} {topk}")


def _check_ids(topk_ids, shape, num_experts, device) -> None:
    if (
        topk_ids.dtype not in (torch.int32, torch.int64)
        or topk_ids.ndim != 2
        or topk_ids.shape != shape
    ):
        raise ValueError(
            f"routing: expected topk_ids int32 or int64 {list(shape)}, got {topk_ids.dtype} "
            f"{list(topk_ids.shape)}"
        )
    if topk_ids.device != device:
        raise ValueError(f"routing: expected topk_ids on {device}, got {topk_ids.device}")


def _sorted_fake(like, slots, num_experts):
    sizes = (num_experts, num_experts + 1, slots, slots)
    return tuple(like.new_empty(n, dtype=torch.int32) for n in sizes)


def _sort_fake(topk_ids, num_experts):
    return _sorted_fake(topk_ids, topk_ids.numel(), num_experts)


def _logits_fwd_fake(logits, correction_bias, topk_ids, topk, scoring, renormalize):
    tokens, num_experts = logits.shape
    weights = logits.new_empty(tokens, topk)
    ids = logits.new_empty(tokens, topk, dtype=torch.int32)
    return weights, ids, *_sorted_fake(logits, tokens * topk, num_experts)


def _fwd_fake(x, weight, bias, *rest):
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.new_empty(x.shape[0], weight.shape[0], dtype=wide)
    return *_logits_fwd_fake(logits, *rest), logits


def _logits_bwd_fake(d_topk_weights, topk_weights, topk_ids, logits, scoring, renormalize):
    return logits.new_empty(logits.shape)


def _bwd_fake(d_topk_weights, d_logits, x, weight, bias, *rest):
    wanted = rest[-1]
    return tuple(
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip((x, weight, bias), wanted, strict=True)
    )


def _logits_setup(ctx, inputs, output):
    ctx.scoring, ctx.renormalize = inputs[-2:]
    ctx.save_for_backward(output[0], output[1], inputs[0])
    ctx.set_materialize_grads(False)


def _logits_backward(ctx, d_topk_weights, *rest):
    if d_topk_weights is None:
        return (None,) * 6
    d_logits = _routing_logits_bwd(d_topk_weights, *ctx.saved_tensors, ctx.scoring, ctx.renormalize)
    return d_logits, *[None] * 5


def _setup(ctx, inputs, output):
    ctx.scoring, ctx.renormalize = inputs[-2:]
    ctx.save_for_backward(*inputs[:3], output[0], output[1], output[6])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_topk_weights, *rest):
    d_logits, wanted = rest[-1], list(ctx.needs_input_grad[:3])
    if d_topk_weights is None and d_logits is None:
        return (None,) * 8
    grads = _routing_bwd(
        d_topk_weights, d_logits, *ctx.saved_tensors, ctx.scoring, ctx.renormalize, wanted
    )
    return *(g if need else None for g, need in zip(grads, wanted, strict=True)), *[None] * 5


_CHOICE = "Tensor? correction_bias, Tensor? topk_ids, SymInt topk, str scoring, bool renormalize"
_SORTED = "Tensor expert_hist, Tensor expert_offs, Tensor gather_indices, Tensor scatter_indices"
_SAVED = "Tensor topk_weights, Tensor topk_ids, Tensor logits, str scoring, bool renormalize"

_BACKENDS = ("reference", "cpu", "triton", "cuda")

_routing_fwd = registry.register(
    f"routing_fwd(Tensor x, Tensor weight, Tensor? bias, {_CHOICE}) -> "
    f"(Tensor topk_weights, Tensor ids, {_SORTED}, Tensor logits)",
    package=__package__,
    fake=_fwd_fake,
    backends=_BACKENDS,
    setup_context=_setup,
    backward=_backward,
)
_routing_direct = registry.direct(_routing_fwd)
_routing_bwd = registry.register(
    "routing_bwd(Tensor? d_topk_weights, Tensor? d_logits, Tensor x, Tensor weight, Tensor? bias, "
    f"{_SAVED}, bool[] wanted) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    package=__package__,
    fake=_bwd_fake,
    backends=_BACKENDS,
)
_routing_logits_fwd = registry.register(
    f"routing_logits_fwd(Tensor logits, {_CHOICE}) -> (Tensor topk_weights, Tensor ids, {_SORTED})",
    package=__package__,
    fake=_logits_fwd_fake,
    backends=_BACKENDS,
    setup_context=_logits_setup,
    backward=_logits_backward,
)
_routing_logits_bwd = registry.register(
    f"routing_logits_bwd(Tensor d_topk_weights, {_SAVED}) -> Tensor d_logits",
    package=__package__,
    fake=_logits_bwd_fake,
    backends=_BACKENDS,
)
_routing_sort = registry.register(
    f"routing_sort(Tensor topk_ids, SymInt num_experts) -> ({_SORTED})",
    package=__package__,
    fake=_sort_fake,
    backends=_BACKENDS,
)
