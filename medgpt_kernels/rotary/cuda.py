"""Rotary position embedding in CUDA C++: launchers of csrc/cuda/rotary.cu."""

import torch

from medgpt_kernels import native
from medgpt_kernels.native import DTYPE_CODES, pointer, rows
from medgpt_kernels.registry import Unsupported

native.cuda()


def _launch(q, k, cos, sin, position_ids, cu_seqlens, direction):
    if q.dtype not in DTYPE_CODES:
        raise Unsupported(f"q of {q.dtype}")
    q, k, cos, sin = rows(q), rows(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    batched = q.ndim == 4
    position_strides = (0, 0)
    if position_ids is not None:
        cu_seqlens = None
        position_strides = (0, *position_ids.stride())[-2:]
    elif cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    device, stream = native.place(q)
    native.cuda(device).rotary(
        device=device,
        stream=stream,
        q=pointer(q),
        k=pointer(k),
        q_out=pointer(q_out),
        k_out=pointer(k_out),
        q_strides=(q.stride(0) if batched else 0, q.stride(-3), q.stride(-2)),
        k_strides=(k.stride(0) if batched else 0, k.stride(-3), k.stride(-2)),
        q_heads=q.shape[-2],
        k_heads=k.shape[-2],
        dtype=DTYPE_CODES[q.dtype],
        batches=q.shape[0] if batched else 1,
        tokens=q.shape[-3],
        head_dim=q.shape[-1],
        half=cos.shape[1],
        cos=pointer(cos),
        sin=pointer(sin),
        table_length=cos.shape[0],
        position_ids=pointer(position_ids),
        wide_positions=position_ids is not None and position_ids.dtype == torch.int64,
        position_b=position_strides[0],
        position_t=position_strides[1],
        cu_seqlens=pointer(cu_seqlens),
        sequences=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        direction=direction,
    )
    return q_out, k_out


def rotary_fwd(q, k, cos, sin, position_ids, cu_seqlens):
    return _launch(q, k, cos, sin, position_ids, cu_seqlens, 1.0)


def rotary_bwd(d_q, d_k, cos, sin, position_ids, cu_seqlens):
    return _launch(d_q, d_k, cos, sin, position_ids, cu_seqlens, -1.0)
