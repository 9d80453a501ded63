"""Attention with sinks, sliding windows, grouped heads and packed sequences, forward and backward.

B sequences of S tokens or packed ones of total tokens, H query heads, G key and value heads,
D head_dim, R rotary_dim, N packed sequences.
"""

import torch

from medgpt_kernels import registry
from medgpt_kernels.rotary.op import check_cu_seqlens, check_positions, check_tables
from medgpt_kernels.rotary.tables import Rotary

MAX_HEAD_DIM = 256
MAX_WINDOW = 2**31 - 1  # no sequence is longer; sums with positions stay far from int64's end


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    sinks: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    rotary: Rotary | None = None,
    position_ids: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T scale, and one sink logit per head in the denominator) v.

    Blocked online softmax after FlashAttention (arXiv 2205.14135); sinks as in gpt-oss
    (arXiv 2508.10925, and StreamingLLM, arXiv 2309.17453).

    Args:
        q: [total, H, D] packed or [B, S, H, D]; D at most 256. Any strides; those of the last
            dimension should be 1, or a copy is made.
        k, v: [total_k, G, D] or [B, S_k, G, D] in q's dtype, G a divisor of H. Query head h reads
            key head h // (H / G).
        cu_seqlens_q: int32 [N + 1], where each packed sequence starts. None with packed tensors:
            one sequence.
        cu_seqlens_k: the same for keys; None: cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: longest sequence; None: the token count, an upper bound that
            costs a GPU empty blocks.
        causal: no key after the query; the last query is aligned with the last key. The right
            window is then 0 or -1.
        window_size: (left, right) keys visible besides the query's own, -1 for no limit. gpt-oss's
            sliding window of 128 is (127, 0).
        sinks: [H] logits, any float dtype, less than infinite.
        softmax_scale: None is D ** -0.5.
        rotary: rotates q and k on load, the first R of D; gradients are those of the unrotated.
            Keys count from 0 within their sequence and queries from len_k - len_q, so no sequence
            may have more queries than keys.
        position_ids: with rotary, positions of the keys, int32 or int64 [total_k], or [S_k] or
            [B, S_k]; queries take the last len_q of their sequence.
        deterministic: gradients that are bitwise repeatable (on the CPU they always are, for a
            given number of threads).
        return_lse: also return the log of the denominator.

    Returns:
        out in q's shape and dtype; with return_lse also lse, fp32 [H, total] or [B, H, S], the
        sink included, differentiable. A query that sees no key gives 0, and as lse its sink (or
        -inf). Gradients flow to q, k, v and sinks. Under autocast q, k and v are cast.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit.
    """
    q, k, v = registry.autocast(q, k, v)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    _check_tensors(q, k, v, sinks)
    _check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_rotary(q, k, rotary, position_ids, cu_seqlens_q, cu_seqlens_k)
    left, right = _window(window_size, causal)
    one_sequence = q.ndim == 3 and cu_seqlens_q is None
    if one_sequence:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if position_ids is not None:
        position_ids = position_ids.expand(k.shape[:-2])
    cos, sin = (None, None) if rotary is None else rotary
    out, lse = _attention_fwd(
        q,
        k,
        v,
        sinks,
        cos,
        sin,
        position_ids,
        cu_seqlens_q,
        cu_seqlens_k,
        q.shape[-3] if max_seqlen_q is None else max_seqlen_q,
        k.shape[-3] if max_seqlen_k is None else max_seqlen_k,
        left,
        right,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        deterministic,
    )
    if one_sequence:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over two disjoint sets of keys (ring or context parallelism, split KV).

    Args:
        out_a, out_b: [total, H, D] or [B, S, H, D].
        lse_a, lse_b: fp32 [H, total] or [B, H, S]. Sinks must be in one of the two only.

    Returns:
        out and lse over the keys of both, differentiable.

    Raises:
        ValueError: shapes that do not fit.
    """
    expected = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3]) if out_a.ndim >= 3 else None
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != expected:
        raise ValueError(
            f"merge_attention: expected outs [total, H, D] and lses [H, total] (or with a batch "
            f"first) of equal shapes, got {list(out_a.shape)}, {list(lse_a.shape)}, "
            f"{list(out_b.shape)}, {list(lse_b.shape)}"
        )
    highest = torch.maximum(lse_a, lse_b).detach()
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    a, b = (lse_a - highest).exp(), (lse_b - highest).exp()
    total = a + b
    none = total == 0
    lse = total.masked_fill(none, 1.0).log().add(highest).masked_fill(none, float("-inf"))
    total = total.masked_fill(none, 1.0)
    a, b = ((x / total).transpose(-1, -2).unsqueeze(-1) for x in (a, b))
    return (out_a * a + out_b * b).to(out_a.dtype), lse


def is_size(x) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def _window(window_size, causal: bool) -> tuple[int, int]:
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not pair or not all(is_size(side) and side >= -1 for side in window_size):
        raise ValueError(
            f"attention: expected window_size (left, right) of keys >= 0, or -1 for no limit, got "
            f"{window_size}"
        )
    left, right = (min(side, MAX_WINDOW) for side in window_size)
    if causal and right > 0:
        raise ValueError(
            f"attention: expected a right window of 0 or -1 where causal, got {window_size}"
        )
    return left, 0 if causal else right


def _check_tensors(q, k, v, sinks) -> None:
    def expect(condition, expected, got):
        if not condition:
            raise ValueError(f"attention: expected {expected}, got {got}")

    shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    expect(
        q.ndim in (3, 4) and k.ndim == q.ndim and k.shape == v.shape,
        "q [total, H, D] or [B, S, H, D] with k and v of one shape",
        shapes,
    )
    expect(q.ndim == 3 or q.shape[0] == k.shape[0], "q, k and v of one batch size", shapes)
    expect(
        q.shape[-1] == k.shape[-1] and 1 <= q.shape[-1] <= MAX_HEAD_DIM,
        f"q, k and v of one head_dim of at most {MAX_HEAD_DIM}",
        shapes,
    )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    expect(
        kv_heads >= 1 and heads >= 1 and heads % kv_heads == 0,
        "a number of query heads that key heads divide",
        f"{heads} and {kv_heads}",
    )
    expect(
        q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point,
        "q, k and v of one float dtype",
        f"{q.dtype}, {k.dtype} and {v.dtype}",
    )
    for name, t in (("k", k), ("v", v), ("sinks", sinks)):
        if t is not None:
            expect(t.device == q.device, f"{name} on q's {q.device}", t.device)
    if sinks is not None:
        expect(
            tuple(sinks.shape) == (heads,) and sinks.dtype.is_floating_point,
            f"float sinks [{heads}]",
            f"{sinks.dtype} {list(sinks.shape)}",
        )


def _check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None and not (is_size(longest) and longest >= 0):
            raise ValueError(f"attention: expected {name} an int >= 0, got {longest}")
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("attention: expected cu_seqlens_q with cu_seqlens_k, got None")
        for name, longest, tokens in (
            ("max_seqlen_q", max_seqlen_q, q.shape[-3]),
            ("max_seqlen_k", max_seqlen_k, k.shape[-3]),
        ):
            if longest is not None and longest < tokens:
                raise ValueError(f"attention: expected {name} of at least {tokens}, got {longest}")
        return
    if q.ndim != 3:
        raise ValueError(
            f"attention: expected packed q [total, H, D] with cu_seqlens_q, got {list(q.shape)}"
        )
    for name, cu_seqlens, total, longest in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k),
    ):
        check_cu_seqlens("attention", name, cu_seqlens, total, q.device, longest)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"attention: expected cu_seqlens_k [{cu_seqlens_q.shape[0]}] as cu_seqlens_q, got "
            f"{list(cu_seqlens_k.shape)}"
        )


def _check_rotary(q, k, rotary, position_ids, cu_seqlens_q, cu_seqlens_k) -> None:
    if rotary is None:
        if position_ids is not None:
            raise ValueError("attention: expected rotary with position_ids, got None")
        return
    check_tables("attention", rotary, q.shape[-1], q.device)
    length = rotary[0].shape[0]
    if position_ids is not None:
        check_positions("attention", position_ids, k.shape[:-2], length, q.device)
    if cu_seqlens_q is None:
        if q.shape[-3] > k.shape[-3]:
            raise ValueError(
                f"attention: expected no more queries than keys with rotary, got {q.shape[-3]} "
                f"and {k.shape[-3]}"
            )
        if position_ids is None and k.shape[-3] > length:
            raise ValueError(
                f"attention: expected tables of at least {k.shape[-3]} positions, got {length}"
            )
    elif q.device.type == "cpu" and not torch.compiler.is_compiling():
        len_q, len_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        if (len_q > len_k).any():
            n = int((len_q > len_k).int().argmax())
            raise ValueError(
                f"attention: expected no more queries than keys with rotary, got {len_q[n]} and "
                f"{len_k[n]} in sequence {n}"
            )
        if position_ids is None:
            check_cu_seqlens(
                "attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0], q.device, length
            )


def _fwd_fake(q, k, v, sinks, cos, sin, position_ids, cu_seqlens_q, cu_seqlens_k, *options):
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=lse_dtype)


def _bwd_fake(d_out, d_lse, q, k, v, out, lse, sinks, *rest):
    wanted = rest[-1]
    return tuple(
        t.new_empty(t.shape) if need else q.new_empty(0)
        for t, need in zip((q, k, v, sinks), wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.max_seqlen_q, ctx.max_seqlen_k, ctx.left, ctx.right, ctx.scale, ctx.det = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_lse):
    q, k, v, sinks, cos, sin, position_ids, cu_q, cu_k, out, lse = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    if d_out is None:
        d_out = torch.zeros_like(out)
    grads = _attention_bwd(
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
        cu_q,
        cu_k,
        ctx.max_seqlen_q,
        ctx.max_seqlen_k,
        ctx.left,
        ctx.right,
        ctx.scale,
        ctx.det,
        wanted,
    )
    return *(g if need else None for g, need in zip(grads, wanted, strict=True)), *[None] * 11


_OPTIONS = (
    "Tensor? cos, Tensor? sin, Tensor? position_ids, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt window_left, SymInt window_right, "
    "float softmax_scale, bool deterministic"
)

# The operators see [B, S, H, D], or [total, H, D] with cu_seqlens; causal is window_right = 0;
# position_ids come with the keys' shape ([B, S_k] or [total_k]).
_attention_fwd = registry.register(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_OPTIONS}) -> "
    "(Tensor out, Tensor lse)",
    package=__package__,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_attention_bwd = registry.register(
    "attention_bwd(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, Tensor? sinks, {_OPTIONS}, bool[] wanted) -> "
    "(Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_sinks)",
    package=__package__,
    fake=_bwd_fake,
)
