"""Rotary position embedding of q and k in one launch, forward and backward.

T tokens, B sequences of S tokens, H heads, D head_dim, R rotary_dim <= D.
"""

import itertools

import torch

from medgpt_kernels import registry
from medgpt_kernels.rotary.tables import Rotary


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    rotary: Rotary,
    *,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by their positions (RoFormer, arXiv 2104.09864; half-split as in GPT-NeoX).

    Args:
        q: [T, H, D] packed or [B, S, H, D], any strides.
        k: the same tokens with its own head count, q's dtype.
        rotary: tables of R <= D; dimensions past R stay as they are.
        position_ids: int32 or int64 [T], or [S] or [B, S]. None counts from 0 within each sequence.
        cu_seqlens: int32 [N + 1], where each packed sequence starts; with position_ids these
            count, and cu_seqlens is checked only.

    Returns:
        New contiguous q and k. Gradients flow to q and k; the tables are constants.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, positions beyond the tables (where
            they can be read without waiting for a device).
    """
    q, k = registry.autocast(q, k)
    _check(q, k, rotary, position_ids, cu_seqlens)
    packed = q.ndim == 3
    if packed and (position_ids is not None or cu_seqlens is None):
        cu_seqlens = None  # one sequence whose positions are given or count from 0
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    if position_ids is not None:
        position_ids = position_ids.expand(q.shape[:2])
    q_out, k_out = _rotary_fwd(q, k, *rotary, position_ids, cu_seqlens)
    if packed and q.ndim == 4:
        return q_out.squeeze(0), k_out.squeeze(0)
    return q_out, k_out


def check_tables(op: str, rotary: Rotary, head_dim: int, device: torch.device) -> None:
    """Tables of one shape, fp32, constant, no wider than the head and on the same device."""
    cos, sin = rotary
    if cos.ndim != 2 or cos.shape != sin.shape or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(
            f"{op}: expected rotary cos and sin float32 [max_seqlen, rotary_dim / 2], got "
            f"{cos.dtype} {list(cos.shape)} and {sin.dtype} {list(sin.shape)}"
        )
    if not 2 <= 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"{op}: expected a rotary_dim of at most head_dim {head_dim}, got {2 * cos.shape[1]}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"{op}: expected rotary tables without gradient, got requires_grad=True")
    if cos.device != device or sin.device != device:
        raise ValueError(f"{op}: expected rotary tables on {device}, got {cos.device}")


def check_positions(
    op: str, position_ids: torch.Tensor, shape: tuple, table_length: int, device: torch.device
) -> None:
    """Whole positions that broadcast to the tokens; their values only where that waits for none."""
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: expected position_ids int32 or int64, got {position_ids.dtype}")
    fits = position_ids.ndim in (1, len(shape)) and position_ids.shape[-1] == shape[-1]
    if not fits or (position_ids.ndim == 2 and position_ids.shape[0] not in (1, shape[0])):
        raise ValueError(
            f"{op}: expected position_ids {list(shape)}, got {list(position_ids.shape)}"
        )
    if position_ids.device != device:
        raise ValueError(f"{op}: expected position_ids on {device}, got {position_ids.device}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.numel():
        low, high = position_ids.aminmax()
        if low < 0 or high >= table_length:
            raise ValueError(
                f"{op}: expected positions in 0 ... {table_length - 1}, got {low} ... {high}"
            )


def check_cu_seqlens(
    op: str, name: str, cu_seqlens: torch.Tensor, total: int, device, longest: int | None = None
) -> None:
    """int32 [N + 1] that climbs from 0 to the token count, where its values can be read.

    longest: the longest sequence allowed, None for any.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: expected {name} int32 [N + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{op}: expected {name} on {device}, got {cu_seqlens.device}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != total or values != sorted(values):
            shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
            raise ValueError(f"{op}: expected {name} rising from 0 to {total}, got {shown}")
        most = max((b - a for a, b in itertools.pairwise(values)), default=0)
        if longest is not None and most > longest:
            raise ValueError(
                f"{op}: expected sequences of at most {longest} tokens, got {most} in {name}"
            )


def _check(q, k, rotary, position_ids, cu_seqlens) -> None:
    if q.ndim not in (3, 4) or q.ndim != k.ndim or q.shape[:-2] != k.shape[:-2]:
        raise ValueError(
            f"apply_rotary: expected q and k [T, H, D] or [B, S, H, D] of the same tokens, got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    if q.shape[-1] != k.shape[-1] or q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            f"apply_rotary: expected q and k of one head_dim and float dtype, got {q.dtype} "
            f"{q.shape[-1]} and {k.dtype} {k.shape[-1]}"
        )
    if q.device != k.device:
        raise ValueError(f"apply_rotary: expected k on q's {q.device}, got {k.device}")
    check_tables("apply_rotary", rotary, q.shape[-1], q.device)
    length = rotary[0].shape[0]
    if position_ids is not None:
        check_positions("apply_rotary", position_ids, q.shape[:-2], length, q.device)
    if cu_seqlens is not None:
        if q.ndim != 3:
            raise ValueError(
                f"apply_rotary: expected packed q [T, H, D] with cu_seqlens, got {list(q.shape)}"
            )
        longest = length if position_ids is None else None
        check_cu_seqlens("apply_rotary", "cu_seqlens", cu_seqlens, q.shape[0], q.device, longest)
    elif position_ids is None and q.shape[-3] > length:
        raise ValueError(
            f"apply_rotary: expected tables of at least {q.shape[-3]} positions, got {length}"
        )


def _fwd_fake(q, k, cos, sin, position_ids, cu_seqlens):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, d_q, d_k):
    d_q, d_k = _rotary_bwd(d_q, d_k, *ctx.saved_tensors)
    need_q, need_k = ctx.needs_input_grad[:2]
    return d_q if need_q else None, d_k if need_k else None, None, None, None, None


_BACKENDS = ("reference", "cpu", "triton", "cuda")
_TABLES = "Tensor cos, Tensor sin, Tensor? position_ids, Tensor? cu_seqlens"

_rotary_fwd = registry.register(
    f"rotary_fwd(Tensor q, Tensor k, {_TABLES}) -> (Tensor q_out, Tensor k_out)",
    package=__package__,
    fake=_fwd_fake,
    backends=_BACKENDS,
    setup_context=_setup_context,
    backward=_backward,
)
_rotary_bwd = registry.register(
    f"rotary_bwd(Tensor d_q, Tensor d_k, {_TABLES}) -> (Tensor d_q_out, Tensor d_k_out)",
    package=__package__,
    fake=_fwd_fake,
    backends=_BACKENDS,
)
