"""Which tokens of a batch take part in attention, and which of them see each other.

B rows of S tokens, N packed sequences, T tokens that take part.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_made = WeakTensorKeyDictionary()  # by anchor tensor: {key: (asker, other, versions, value)}


class Sequences(NamedTuple):
    """Packed sequences in a [B, S] batch, as `attention` takes them."""

    cu_seqlens_q: torch.Tensor  # int32 [N + 1]
    cu_seqlens_k: torch.Tensor  # int32 [N + 1]
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    rows_q: torch.Tensor | None = None  # int64 [T], the queries in the flat batch; None: all
    rows_k: torch.Tensor | None = None  # int64 [T_k], the keys
    holes: bool = False  # a padded token lies between two tokens of one sequence


def once(
    anchor: torch.Tensor, other: torch.Tensor | None, key: tuple, make: Callable, asker: object
):
    """make(), once for these two tensors a forward: every layer of it asks for the same.

    The layer that had the result made has it made anew when it asks again, in the next forward: a
    tensor may have been written to where torch does not count it (NumPy, `.data`). Counted writes
    end it sooner. Inference tensors do not count theirs: each layer makes its own.
    """
    tensors = (anchor,) if other is None else (anchor, other)
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return make()
    versions = [t._version for t in tensors]
    known = _made.setdefault(anchor, {})
    if key in known:
        maker, seen, seen_versions, value = known[key]
        if maker() is not asker and seen is other and seen_versions == versions:
            return value
    value = make()
    known[key] = (weakref.ref(asker), other, versions, value)
    return value


@torch.compiler.disable(reason="reads position_ids; give cu_seq_lens_q and max_length_q instead")
def from_positions(position_ids: torch.Tensor, batch: int, len_q: int, len_k: int, asker: object):
    """Sequences of a batch without padding, or None where each row is one sequence.

    Args:
        position_ids: [1, S] or [B, S], positions of the queries; a sequence starts at each restart.
        batch, len_q, len_k: B, and the lengths of a row of queries and keys.
        asker: the layer; see once.

    Raises:
        ValueError: positions of another shape, with gaps, or restarting behind a KV cache.
    """
    if len_q == 1:
        return None

    def make():
        starts, _ = _starts(None, position_ids, batch, len_q)
        if len(starts) - 1 == batch:
            return None
        if len_q != len_k:
            raise ValueError(
                "medgpt_kernels: expected positions that count on behind a KV cache, got a restart"
            )
        return _packed(starts, None, False, position_ids.device)

    return once(position_ids, None, ("positions", batch, len_q, len_k), make, asker)


@torch.compiler.disable(reason="reads the padding mask; pack and give cu_seq_lens_q instead")
def from_mask(
    mask: torch.Tensor, position_ids, len_q: int, cross: bool, asker: object
) -> Sequences:
    """Sequences of a padded batch.

    Args:
        mask: [B, S_k] or [B, 1, 1, S_k], nonzero where a key takes part. The queries are
            the last len_q columns.
        position_ids: [1, S] or [B, S] or None; where they restart within a row, so does a sequence.
        cross: all queries take part and each sees all keys of its row, but where positions restart
            within one: then padding takes no part, and sequences do not see each other.
        asker: the layer; see once.

    Raises:
        ValueError: as from_positions.
    """
    batch, len_k = mask.shape[0], mask.shape[-1]
    if len_q == 1 or (cross and len_q != len_k):
        position_ids = None

    def make():
        valid = mask.bool().cpu().view(batch, len_k)
        restarts = cross and position_ids is not None and _restarts(valid, position_ids)
        if (restarts or not cross) and len_q == len_k:
            starts, holes = _starts(valid, position_ids, batch, len_q)
            return _packed(starts, _rows(valid), holes, mask.device)
        asking = torch.ones(batch, len_q, dtype=torch.bool) if cross else valid[:, len_k - len_q :]
        starts, _ = _starts(asking, None if cross else position_ids, batch, len_q)
        if not cross and position_ids is not None and len(starts) - 1 > int(asking.any(1).sum()):
            raise ValueError(
                "medgpt_kernels: expected positions that count on behind a KV cache, got a restart"
            )
        _, holes = _starts(valid, None, batch, len_k)
        cu_q, max_q = _lengths(asking.sum(1), mask.device)
        cu_k, max_k = _lengths(valid.sum(1), mask.device)
        rows_q = None if asking.all() else _rows(asking).to(mask.device)
        return Sequences(cu_q, cu_k, max_q, max_k, rows_q, _rows(valid).to(mask.device), holes)

    return once(mask, position_ids, ("mask", len_q, cross), make, asker)


def _restarts(valid: torch.Tensor, position_ids: torch.Tensor) -> bool:
    """Whether positions fall back within the part of a row that takes part."""
    if position_ids.ndim != 2 or position_ids.shape not in ((1, valid.shape[1]), valid.shape):
        return False
    at = position_ids.cpu().expand(valid.shape)
    lowest = torch.iinfo(at.dtype).min
    reached = at.masked_fill(~valid, lowest).cummax(1).values
    return bool(((at[:, 1:] <= reached[:, :-1]) & valid[:, 1:]).any())


def _rows(valid: torch.Tensor) -> torch.Tensor:
    return valid.flatten().nonzero().flatten()


def _lengths(lengths: torch.Tensor, device) -> tuple[torch.Tensor, int]:
    """cu_seqlens and the longest of given lengths: [2, 3] -> [0, 2, 5] and 3."""
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return cu_seqlens.to(device), int(lengths.max()) if len(lengths) else 0


def _packed(starts: torch.Tensor, rows, holes: bool, device) -> Sequences:
    cu_seqlens, longest = _lengths(starts.diff(), device)
    rows = None if rows is None else rows.to(device)
    return Sequences(cu_seqlens, cu_seqlens, longest, longest, rows, rows, holes)


def _starts(valid, position_ids, batch: int, length: int) -> tuple[torch.Tensor, bool]:
    """Where sequences start among the tokens that take part, their number appended; any holes.

    Positions [0, 1, 2, 0, 1] -> [0, 3, 5].
    """
    rows = torch.arange(batch * length) if valid is None else _rows(valid)
    same_row = rows[1:] // max(length, 1) == rows[:-1] // max(length, 1)
    same, apart = same_row, rows.diff()
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape not in ((1, length), (batch, length)):
            raise ValueError(
                f"medgpt_kernels: expected position_ids {[batch, length]}, got "
                f"{list(position_ids.shape)}; give cu_seq_lens_q and max_length_q instead"
            )
        step = position_ids.cpu().expand(batch, length).flatten()[rows].diff()
        same = same_row & (step >= 1)
        gap = same & (step != 1) & (step != apart)
        if gap.any():
            raise ValueError(
                "medgpt_kernels: expected positions that advance by 1 or restart, got a gap, which "
                "may or may not start a sequence; give cu_seq_lens_q and max_length_q instead"
            )
    first = torch.ones(min(len(rows), 1), dtype=torch.bool)
    starts = torch.cat([first, ~same]).nonzero().flatten()
    ends = torch.tensor([len(rows)])
    return torch.cat([starts, ends]), bool((same & (apart > 1)).any())
