"""Attention on the CPU: launchers of csrc/cpu/attention.cpp and attention_bwd.cpp."""

import torch

from medgpt_kernels import native
from medgpt_kernels.native import DTYPE_CODES, fp32, pointer, rows
from medgpt_kernels.registry import Unsupported
from medgpt_kernels.rotary.cpu import narrow_positions

native.cpu()


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Elements from one batch entry, token and head to the next; packed tensors have one batch."""
    return (x.stride(0) if x.ndim == 4 else 0, x.stride(-3), x.stride(-2))


def _integers(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _problem(q, k, cos, sin, position_ids, cu_q, cu_k, window_left, window_right, softmax_scale):
    """The C++ description of one call; its tensors must stay alive while it is used."""
    if q.dtype not in DTYPE_CODES:
        raise Unsupported(f"q of {q.dtype}")
    return native.problem(
        "AttentionProblem",
        sequences=q.shape[0] if cu_q is None else cu_q.shape[0] - 1,
        heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        tokens_q=q.shape[-3],
        tokens_k=k.shape[-3],
        cu_q=pointer(cu_q),
        cu_k=pointer(cu_k),
        cos=pointer(cos),
        sin=pointer(sin),
        half=0 if cos is None else cos.shape[1],
        table_length=0 if cos is None else cos.shape[0],
        position_ids=pointer(position_ids),
        window_left=window_left,
        window_right=window_right,
        scale=softmax_scale,
    )


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
    library = native.cpu()
    q, k, v = rows(q), rows(k), rows(v)
    sinks, cos, sin = fp32(sinks), fp32(cos), fp32(sin)
    position_ids = narrow_positions(position_ids)
    cu_q, cu_k = _integers(cu_seqlens_q), _integers(cu_seqlens_k)
    problem = _problem(
        q, k, cos, sin, position_ids, cu_q, cu_k, window_left, window_right, softmax_scale
    )
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    library.attention_fwd(
        problem=problem,
        dtype=DTYPE_CODES[q.dtype],
        q=pointer(q),
        k=pointer(k),
        v=pointer(v),
        q_strides=strides(q),
        k_strides=strides(k),
        v_strides=strides(v),
        out_strides=strides(out),
        sinks=pointer(sinks),
        out=pointer(out),
        lse=pointer(lse),
    )
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
    library = native.cpu()
    q, k, v, out, d_out = map(rows, (q, k, v, out, d_out))
    wide_sinks, cos, sin, d_lse = map(fp32, (sinks, cos, sin, d_lse))
    lse = lse.contiguous()
    position_ids = narrow_positions(position_ids)
    cu_q, cu_k = _integers(cu_seqlens_q), _integers(cu_seqlens_k)
    problem = _problem(
        q, k, cos, sin, position_ids, cu_q, cu_k, window_left, window_right, softmax_scale
    )
    d_q, d_k, d_v, d_sinks = (
        torch.empty(t.shape, dtype=t.dtype) if need else None
        for t, need in zip((q, k, v, wide_sinks), wanted, strict=True)
    )
    library.attention_bwd(
        problem=problem,
        dtype=DTYPE_CODES[q.dtype],
        d_out=pointer(d_out),
        q=pointer(q),
        k=pointer(k),
        v=pointer(v),
        out=pointer(out),
        d_out_strides=strides(d_out),
        q_strides=strides(q),
        k_strides=strides(k),
        v_strides=strides(v),
        out_strides=strides(out),
        d_lse=pointer(d_lse),
        lse=pointer(lse),
        sinks=pointer(wide_sinks),
        d_q=pointer(d_q),
        d_k=pointer(d_k),
        d_v=pointer(d_v),
        d_sinks=pointer(d_sinks),
    )
    if d_sinks is not None:
        d_sinks = d_sinks.to(sinks.dtype)
    return tuple(q.new_empty(0) if g is None else g for g in (d_q, d_k, d_v, d_sinks))
