"""Attention with sinks, windows and packed sequences in eager PyTorch: the specification.

B sequences of S tokens or N packed ones, H query heads, G key and value heads, D head_dim,
Lq and Lk the lengths of one sequence's queries and keys. Scores take the place of [Lq, Lk] here.
"""

from collections.abc import Iterator

import torch

from medgpt_kernels.rotary.reference import rotate


def sequences(q, k, cu_seqlens_q, cu_seqlens_k) -> Iterator[tuple]:
    """Index pairs (where one sequence's queries lie, where its keys lie)."""
    if cu_seqlens_q is None:
        yield from ((b, b) for b in range(q.shape[0]))
        return
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        yield slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])


def visible(len_q: int, len_k: int, left: int, right: int, device=None) -> torch.Tensor:
    """bool [Lq, Lk]: the last query is aligned with the last key; -1 leaves a side open."""
    at = torch.arange(len_q, device=device)[:, None] + len_k - len_q
    j = torch.arange(len_k, device=device)[None, :]
    keep = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if left >= 0:
        keep &= j >= at - left
    if right >= 0:
        keep &= j <= at + right
    return keep


def _tables(cos, sin, position_ids, at_k, len_q: int, len_k: int):
    """cos, sin of the keys [Lk, R/2] and of the queries, which are the last Lq positions."""
    if position_ids is None:
        at = torch.arange(len_k, device=cos.device)
    else:
        at = position_ids[at_k].long()
    at_q = at[len_k - len_q :] if len_q <= len_k else None
    if at_q is None:
        raise ValueError(f"attention: expected len_q <= len_k with rotary, got {len_q} > {len_k}")
    return (cos[at_q], sin[at_q]), (cos[at], sin[at])


def probabilities(q, k, keep, sinks, softmax_scale, lse=None):
    """P [H, Lq, Lk] and lse [H, Lq] of one sequence, in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    scores = scores.to(wide).masked_fill(~keep, float("-inf"))
    if lse is None:
        columns = scores
        if sinks is not None:
            sink = sinks.to(wide)[:, None, None].expand(-1, scores.shape[1], 1)
            columns = torch.cat([scores, sink], dim=-1)
        lse = columns.logsumexp(-1)
    nothing = lse == float("-inf")
    return (scores - lse.masked_fill(nothing, 0.0)[..., None]).exp(), lse


def attention_fwd(
    q,
    k,
    v,
    sinks,
    cos,
    sin,
    position_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    window_left,
    window_right,
    softmax_scale,
    deterministic,
):
    out = q.new_empty(q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=wide)
    heads_first = lse if cu_seqlens_q is None else lse.T  # indexed by sequence or by token
    for at_q, at_k in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        qn, kn, vn = q[at_q], k[at_k], v[at_k]
        if cos is not None:
            table_q, table_k = _tables(cos, sin, position_ids, at_k, len(qn), len(kn))
            qn, kn = rotate(qn, *table_q), rotate(kn, *table_k)
        keep = visible(len(qn), len(kn), window_left, window_right, q.device)
        p, lse_n = probabilities(qn, kn, keep, sinks, softmax_scale)
        vn = vn.repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)
        out[at_q] = torch.einsum("hqk,khd->qhd", p.to(v.dtype), vn)
        heads_first[at_q] = lse_n if cu_seqlens_q is None else lse_n.T
    return out, lse


def attention_bwd(
    d_out,
    d_lse,
    q,
    k,
    v,
    out,
    lse,
    sinks,
    cos,
    sin,
    position_ids,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    window_left,
    window_right,
    softmax_scale,
    deterministic,
    wanted,
):
    groups, kv_heads = q.shape[-2] // k.shape[-2], k.shape[-2]
    wide = lse.dtype
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    d_sinks = None if sinks is None else torch.zeros(sinks.shape, dtype=wide, device=q.device)
    packed = cu_seqlens_q is not None
    for at_q, at_k in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        qn, kn, vn, d_out_n = q[at_q], k[at_k], v[at_k], d_out[at_q]
        if cos is not None:
            table_q, table_k = _tables(cos, sin, position_ids, at_k, len(qn), len(kn))
            qn, kn = rotate(qn, *table_q), rotate(kn, *table_k)
        keep = visible(len(qn), len(kn), window_left, window_right, q.device)
        lse_n = lse[:, at_q] if packed else lse[at_q]  # [H, Lq]
        p, _ = probabilities(qn, kn, keep, sinks, softmax_scale, lse_n)
        delta = (d_out_n.to(wide) * out[at_q].to(wide)).sum(-1).T  # [H, Lq]
        if d_lse is not None:
            delta = delta - (d_lse[:, at_q] if packed else d_lse[at_q])
        d_p = torch.einsum("qhd,khd->hqk", d_out_n, vn.repeat_interleave(groups, dim=1)).to(wide)
        d_s = (p * (d_p - delta[..., None]) * softmax_scale).to(q.dtype)

        def per_kv_head(x):  # [Lk, H, D] -> [Lk, G, D]
            return x.unflatten(1, (kv_heads, groups)).sum(2)

        d_qn = torch.einsum("hqk,khd->qhd", d_s, kn.repeat_interleave(groups, dim=1))
        d_kn = per_kv_head(torch.einsum("hqk,qhd->khd", d_s, qn))
        d_v[at_k] = per_kv_head(torch.einsum("hqk,qhd->khd", p.to(q.dtype), d_out_n))
        if cos is not None:
            d_qn = rotate(d_qn, table_q[0], -table_q[1])
            d_kn = rotate(d_kn, table_k[0], -table_k[1])
        d_q[at_q], d_k[at_k] = d_qn, d_kn
        if sinks is not None:
            nothing = lse_n == float("-inf")  # a sink of minus infinity and no key
            p_sink = (sinks.to(wide)[:, None] - lse_n).exp().masked_fill(nothing, 0.0)
            d_sinks -= (p_sink * delta).sum(-1)
    grads = (d_q, d_k, d_v, None if sinks is None else d_sinks.to(sinks.dtype))
    return tuple(g if need else q.new_empty(0) for g, need in zip(grads, wanted, strict=True))
