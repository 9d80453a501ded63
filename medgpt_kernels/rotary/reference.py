"""Rotary position embedding in eager PyTorch: the specification.

T tokens, B sequences of S tokens, H heads, D head_dim, R rotary_dim <= D.
"""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., H, D] by tables [..., R/2]: the first half of R with the second, the rest as it is.

    Computed in fp32 (fp64 for fp64). The transpose, for gradients, is rotate(x, cos, -sin).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    c, s = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    a, b = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    return torch.cat(
        [(a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), x[..., 2 * half :]], -1
    )


def token_positions(
    x: torch.Tensor, position_ids: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The position of every token of x [T, H, D] or [B, S, H, D]: int64 [T] or [B, S]."""
    if position_ids is not None:
        return position_ids.long()
    if cu_seqlens is None:
        return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    lengths = cu_seqlens.diff().long()
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=x.shape[0])
    return torch.arange(x.shape[0], device=x.device) - starts


def rotary_fwd(q, k, cos, sin, position_ids, cu_seqlens):
    at = token_positions(q, position_ids, cu_seqlens)
    return rotate(q, cos[at], sin[at]), rotate(k, cos[at], sin[at])


def rotary_bwd(d_q, d_k, cos, sin, position_ids, cu_seqlens):
    at = token_positions(d_q, position_ids, cu_seqlens)
    return rotate(d_q, cos[at], -sin[at]), rotate(d_k, cos[at], -sin[at])
