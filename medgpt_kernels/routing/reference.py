"""Routing of tokens to experts in eager PyTorch: the specification.

T tokens, H hidden, E experts, K topk.
"""

import torch


def router_logits(x, weight, bias):
    """[T, E] in fp32 (fp64 for fp64) whatever the inputs' dtype: near ties decide who computes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ weight.to(wide).T
    return logits if bias is None else logits + bias.to(wide)


def choose(logits, correction_bias, topk, scoring):
    """int64 [T, K], largest first, ties to the lower id.

    Softmax and sigmoid rise with the logit, so only a correction bias needs the scores themselves.
    """
    choice = logits
    if correction_bias is not None:
        choice = logits.sigmoid() + correction_bias.to(logits.dtype)
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :topk]


def chosen_weights(logits, topk_ids, scoring, renormalize):
    """[T, K] in logits' dtype, in the order of topk_ids."""
    if scoring == "topk_softmax":
        return logits.gather(1, topk_ids).softmax(-1)
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    weights = scores.gather(1, topk_ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if scoring == "sigmoid" else 0))
    return weights


def narrow(topk_ids):
    """Ids as int32; what int32 cannot hold stays out of range, where the CPU looks at values."""
    if topk_ids.dtype != torch.int32 and topk_ids.device.type == "cpu":
        topk_ids = topk_ids.clamp(-(2**31), 2**31 - 1)
    return topk_ids.to(torch.int32)


def check_ids(topk_ids, num_experts):
    """Values, where reading them waits for no device."""
    if topk_ids.device.type == "cpu" and topk_ids.numel():
        low, high = topk_ids.aminmax()
        if low < 0 or high >= num_experts:
            raise ValueError(
                f"routing: expected topk_ids in 0 ... {num_experts - 1}, got {low} ... {high}"
            )


def routing_sort(topk_ids, num_experts):
    """hist [E], offs = [0] + cumsum(hist), and the stable order by expert with its inverse."""
    check_ids(topk_ids, num_experts)
    flat = topk_ids.flatten().long()
    hist = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    offs = torch.cat([hist.new_zeros(1), hist.cumsum(0)])
    order = flat.argsort(stable=True)
    gather, scatter = order // max(topk_ids.shape[1], 1), order.argsort()
    return tuple(t.to(torch.int32) for t in (hist, offs, gather, scatter))


def routing_logits_fwd(logits, correction_bias, topk_ids, topk, scoring, renormalize):
    if logits.device.type == "cpu":
        if logits.isnan().any():
            raise ValueError("routing: expected logits without NaN, got NaN")
        if correction_bias is not None and correction_bias.isnan().any():
            raise ValueError("routing: expected a correction_bias without NaN, got NaN")
    if topk_ids is None:
        topk_ids = choose(logits, correction_bias, topk, scoring)
    check_ids(topk_ids, logits.shape[1])
    topk_ids = topk_ids.long()
    weights = chosen_weights(logits, topk_ids, scoring, renormalize)
    return weights, topk_ids.to(torch.int32), *routing_sort(topk_ids, logits.shape[1])


def routing_fwd(x, weight, bias, correction_bias, topk_ids, topk, scoring, renormalize):
    logits = router_logits(x, weight, bias)
    routed = routing_logits_fwd(logits, correction_bias, topk_ids, topk, scoring, renormalize)
    return *routed, logits


def routing_logits_bwd(d_topk_weights, topk_weights, topk_ids, logits, scoring, renormalize):
    """d_logits [T, E]; an expert that was given twice receives both gradients."""
    ids, w, d_w = topk_ids.long(), topk_weights, d_topk_weights
    if scoring == "softmax_topk" and not renormalize:
        mean = (w * d_w).sum(-1, keepdim=True)
        return (-mean * logits.softmax(-1)).scatter_add(1, ids, w * d_w)
    if scoring == "sigmoid":
        scores = logits.gather(1, ids).sigmoid()
        d_w = d_w * (1 - scores)
        shared = (w * d_topk_weights).sum(-1, keepdim=True) * (1 - scores) if renormalize else 0
    else:
        shared = (w * d_w).sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_add(1, ids, w * (d_w - shared))


def routing_bwd(
    d_topk_weights, d_logits, x, weight, bias, topk_weights, topk_ids, logits, scoring, renormalize,
    wanted,
):  # fmt: skip
    d = torch.zeros_like(logits) if d_logits is None else d_logits
    if d_topk_weights is not None:
        d = d + routing_logits_bwd(
            d_topk_weights, topk_weights, topk_ids, logits, scoring, renormalize
        )
    empty = x.new_empty(0)
    return (
        (d @ weight.to(d.dtype)).to(x.dtype) if wanted[0] else empty,
        (d.T @ x.to(d.dtype)).to(weight.dtype) if wanted[1] else empty,
        d.sum(0).to(bias.dtype) if wanted[2] else empty,
    )
