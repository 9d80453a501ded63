"""Attention in Triton: the forward pass, and what both passes share.

N sequences (B of [B, S, H, D], or packed), H query heads, G key heads, P = H / G query heads of one
key head, D head_dim, M and N rows and columns of a tile of scores. The rows of a tile are the P
query heads of one key head at M / P queries: row r is query r // P of head g P + r % P. A head_dim
between powers of two is two tiles, D = 72 being 64 + 16.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.attention.triton_exp2 import exp2_scores, how_to_exp2
from medgpt_kernels.registry import Unsupported
from medgpt_kernels.rotary.triton import (
    check_supported,
    index_dtype,
    rotate,
    rows,
    stride_unit,
    strides,
)

LOG2_E = 1.4426950408889634
NO_SCORE = tl.constexpr(-1.0e30)  # a maximum before any key, in units of log 2
PRECISION = {"INPUT_PRECISION": "ieee"}
MAX_WINDOW = 2**29  # beyond any sequence, and far from the end of int32


def head_tiles(head_dim: int) -> dict[str, int]:
    """BLOCK_D, a power of two, and BLOCK_REST for the dimensions past it (0 where none)."""
    block = max(16, 2 ** (head_dim.bit_length() - 1))
    rest = head_dim - block
    return {
        "BLOCK_D": block,
        "BLOCK_REST": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0,
    }


@triton.jit
def _elements(stride_b, stride_t, stride_h, UNIT: tl.constexpr):
    return stride_b * UNIT, stride_t * UNIT, stride_h * UNIT


@triton.jit
def _sequence(n, CuSeqlens, tokens):
    """Where sequence n starts among the tokens of its batch entry, and its length."""
    if CuSeqlens is None:
        start = n * 0
        length = tokens
    else:
        start = tl.load(CuSeqlens + n)
        length = tl.load(CuSeqlens + n + 1) - start
    return start, length


@triton.jit
def _key_range(
    first, last, shift, len_k, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Keys [begin, end) that some query of first ... last sees, [inner, inner_end) that all see."""
    begin = first * 0
    inner = begin
    end = len_k
    inner_end = end
    if HAS_LEFT:
        begin = tl.maximum(first + shift - window_left, 0)
        inner = tl.maximum(last + shift - window_left, 0)
    if HAS_RIGHT:
        end = tl.minimum(last + shift + window_right + 1, len_k)
        inner_end = tl.minimum(first + shift + window_right + 1, len_k)
    return begin, inner, inner_end, end


@triton.jit
def _visible(
    at, j, len_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Whether a query aligned with key `at` sees key j; shapes broadcast."""
    limit = at * 0 + len_k - 1
    if HAS_RIGHT:
        limit = tl.minimum(at + window_right, limit)
    keep = j <= limit
    if HAS_LEFT:
        keep = keep & (j >= at - window_left)
    return keep


@triton.jit
def _load_tile(
    x_rows, inside, OFFSET: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Columns OFFSET ... OFFSET + BLOCK of rows [M], zeros outside; MASKED: of the rows as well."""
    d = OFFSET + tl.arange(0, BLOCK)
    where = x_rows[:, None] + d[None, :]
    if MASKED and OFFSET + BLOCK > HEAD_DIM:
        x = tl.load(where, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0)
    elif MASKED:
        x = tl.load(where, mask=inside[:, None], other=0)
    elif OFFSET + BLOCK > HEAD_DIM:
        x = tl.load(where, mask=(d < HEAD_DIM)[None, :], other=0)
    else:
        x = tl.load(where)
    return x


@triton.jit
def _load_rest(
    x_rows, inside, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    if BLOCK_REST > 0:
        x = _load_tile(x_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, MASKED)
    else:
        x = inside
    return x


@triton.jit
def _load_table(Table, position, i, inside, table_length, HALF: tl.constexpr):
    """Table rows [M, I]; NaN beyond the table, which is loud where it would be wrong."""
    position = tl.where(inside, position, 0)
    known = (position >= 0) & (position < table_length)
    where = position.to(tl.int64)[:, None] * HALF + i[None, :]
    return tl.load(Table + where, mask=known[:, None] & (i < HALF)[None, :], other=float("nan"))


@triton.jit
def _load_rotated_tile(
    x_rows, Cos, Sin, position, inside, table_length, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """As _load_tile, rotated: x cos + partner sin, the partner being half a rotation away."""
    d = OFFSET + tl.arange(0, BLOCK)
    lower = d < HALF
    turns = d < 2 * HALF
    partner = tl.where(lower, d + HALF, tl.where(turns, d - HALF, d))
    i = tl.where(lower, d, d - HALF)
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(x_rows[:, None] + d[None, :], mask=mask, other=0)
    y = tl.load(x_rows[:, None] + partner[None, :], mask=mask, other=0).to(tl.float32)
    cos = _load_table(Cos, position, i, inside, table_length, HALF)
    sin = _load_table(Sin, position, i, inside, table_length, HALF)
    turned = x.to(tl.float32) * cos + tl.where(lower, -1.0, 1.0)[None, :] * y * sin
    return tl.where(turns[None, :], turned.to(x.dtype), x)


@triton.jit
def _load_rotated(
    x_rows, Cos, Sin, position, inside, table_length, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rows [M, D] and their rest, rotated on load where there are tables."""
    if Cos is None:
        x = _load_tile(x_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
        rest = _load_rest(x_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, True)
    elif 2 * HALF == BLOCK_D and HEAD_DIM == BLOCK_D:
        i = tl.arange(0, BLOCK_D // 2)
        where = x_rows[:, None] + i[None, :]
        first = tl.load(where, mask=inside[:, None], other=0)
        second = tl.load(where + HALF, mask=inside[:, None], other=0).to(tl.float32)
        cos = _load_table(Cos, position, i, inside, table_length, HALF)
        sin = _load_table(Sin, position, i, inside, table_length, HALF)
        a = first.to(tl.float32) * cos - second * sin
        b = second * cos + first.to(tl.float32) * sin
        pairs = tl.join(a.to(first.dtype), b.to(first.dtype))
        x = tl.reshape(tl.permute(pairs, [0, 2, 1]), [x_rows.shape[0], BLOCK_D])
        rest = inside
    else:
        x = _load_rotated_tile(
            x_rows, Cos, Sin, position, inside, table_length, 0, BLOCK_D, HEAD_DIM, HALF
        )
        rest = inside
        if BLOCK_REST > 0:
            rest = _load_rotated_tile(
                x_rows, Cos, Sin, position, inside, table_length, BLOCK_D, BLOCK_REST, HEAD_DIM,
                HALF,
            )  # fmt: skip
    return x, rest


@triton.jit
def _positions(PositionIds, n, stride_position_b, start_k, index, inside):
    """Rotary position of the keys at `index` of sequence n: given, or the index itself."""
    if PositionIds is not None:
        where = PositionIds + n.to(tl.int64) * stride_position_b + start_k + index
        index = tl.load(where, mask=inside & (index >= 0), other=-1)
    return index


@triton.jit
def _store_tile(
    x_rows, x, inside, OFFSET: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    d = OFFSET + tl.arange(0, BLOCK)
    mask = inside[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(x_rows[:, None] + d[None, :], x.to(x_rows.dtype.element_ty), mask=mask)


@triton.jit
def _scores(a, a_rest, b, b_rest, BLOCK_REST: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """a b^T over the whole head."""
    s = tl.dot(a, tl.trans(b), input_precision=INPUT_PRECISION)
    if BLOCK_REST > 0:
        s = tl.dot(a_rest, tl.trans(b_rest), s, input_precision=INPUT_PRECISION)
    return s


@triton.jit
def _fwd_span(
    m, l, acc, acc_rest, q, q_rest, K, V, stride_k_t, stride_v_t, at, begin, end, len_k,
    window_left, window_right, scale, HEAD_DIM: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr, EXP2: tl.constexpr,
    INDEX: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Keys begin ... end of one block of queries; MASKED: some are seen by some queries only."""
    for n0 in range(begin, end, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        inside = j < len_k
        k_rows = K + j.to(INDEX) * stride_k_t
        k = _load_tile(k_rows, inside, 0, BLOCK_D, HEAD_DIM, MASKED)
        k_rest = _load_rest(k_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, MASKED)
        s = _scores(q, q_rest, k, k_rest, BLOCK_REST, INPUT_PRECISION)  # [M, N]
        if MASKED:
            keep = _visible(
                at[:, None], j[None, :], len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = exp2_scores(s, scale, m_new, MASKED, EXP2)
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        v_rows = V + j.to(INDEX) * stride_v_t
        v = _load_tile(v_rows, inside, 0, BLOCK_D, HEAD_DIM, MASKED)
        v_rest = _load_rest(v_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, MASKED)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision=INPUT_PRECISION)
        if BLOCK_REST > 0:
            acc_rest = tl.dot(p, v_rest, acc_rest * alpha[:, None], input_precision=INPUT_PRECISION)
    return m, l, acc, acc_rest


@triton.jit(
    do_not_specialize=[
        "sequences", "tokens_q", "tokens_k", "table_length", "window_left", "window_right",
    ]
)  # fmt: skip
def _attention_fwd_kernel(
    Out,
    Lse,
    Q,
    K,
    V,
    Sinks,
    Cos,
    Sin,
    PositionIds,
    CuSeqlensQ,
    CuSeqlensK,
    stride_out_b,
    stride_out_t,
    stride_out_h,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_position_b,
    sequences,
    tokens_q,
    tokens_k,
    table_length,
    window_left,
    window_right,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    NARROW: tl.constexpr,
    EXP2: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    stride_out_b, stride_out_t, stride_out_h = (
        stride_out_b * UNIT,
        stride_out_t * UNIT,
        stride_out_h * UNIT,
    )
    stride_q_b, stride_q_t, stride_q_h = _elements(stride_q_b, stride_q_t, stride_q_h, UNIT)
    stride_k_b, stride_k_t, stride_k_h = _elements(stride_k_b, stride_k_t, stride_k_h, UNIT)
    stride_v_b, stride_v_t, stride_v_h = _elements(stride_v_b, stride_v_t, stride_v_h, UNIT)
    g = tl.program_id(0) % KV_HEADS
    n = tl.program_id(0) // KV_HEADS % sequences
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS // sequences  # longest first
    start_q, len_q = _sequence(n, CuSeqlensQ, tokens_q)
    start_k, len_k = _sequence(n, CuSeqlensK, tokens_k)
    if block * BLOCK_M >= len_q * GROUP:
        return
    shift = len_k - len_q
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = r // GROUP
    head = g * GROUP + r % GROUP
    inside = query < len_q
    at = query + shift
    n_wide, start_q_wide, start_k_wide = n.to(tl.int64), start_q.to(tl.int64), start_k.to(tl.int64)
    Q += n_wide * stride_q_b + start_q_wide * stride_q_t
    K += n_wide * stride_k_b + start_k_wide * stride_k_t + g.to(tl.int64) * stride_k_h
    V += n_wide * stride_v_b + start_k_wide * stride_v_t + g.to(tl.int64) * stride_v_h
    Out += n_wide * stride_out_b + start_q_wide * stride_out_t
    position = at
    if Cos is not None:
        position = _positions(PositionIds, n, stride_position_b, start_k, at, inside)
    q, q_rest = _load_rotated(
        Q + query.to(INDEX) * stride_q_t + head.to(INDEX) * stride_q_h, Cos, Sin, position, inside,
        table_length, BLOCK_D, BLOCK_REST, HEAD_DIM, HALF,
    )  # fmt: skip

    m = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if Sinks is not None:
        sink = tl.load(Sinks + head).to(tl.float32) * 1.4426950408889634
        none = sink <= NO_SCORE  # a sink that is not a number stays one
        m = tl.where(none, NO_SCORE, sink)
        l = tl.where(none, 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_rest = m if BLOCK_REST == 0 else tl.zeros([BLOCK_M, max(BLOCK_REST, 1)], tl.float32)

    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, len_q - 1)
    begin, inner, inner_end, end = _key_range(
        first, last, shift, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    if NARROW:
        left_end = begin
        right_begin = begin
    else:
        left_end = begin + tl.cdiv(inner - begin, BLOCK_N) * BLOCK_N
        right_begin = left_end + tl.maximum(inner_end - left_end, 0) // BLOCK_N * BLOCK_N
        if HAS_LEFT:
            m, l, acc, acc_rest = _fwd_span(
                m, l, acc, acc_rest, q, q_rest, K, V, stride_k_t, stride_v_t, at, begin,
                tl.minimum(left_end, end), len_k, window_left, window_right, scale, HEAD_DIM,
                HAS_LEFT, HAS_RIGHT, True, EXP2, INDEX, INPUT_PRECISION, BLOCK_N, BLOCK_D,
                BLOCK_REST,
            )  # fmt: skip
        m, l, acc, acc_rest = _fwd_span(
            m, l, acc, acc_rest, q, q_rest, K, V, stride_k_t, stride_v_t, at, left_end, right_begin,
            len_k, window_left, window_right, scale, HEAD_DIM, HAS_LEFT, HAS_RIGHT, False,
            EXP2, INDEX, INPUT_PRECISION, BLOCK_N, BLOCK_D, BLOCK_REST,
        )  # fmt: skip
    m, l, acc, acc_rest = _fwd_span(
        m, l, acc, acc_rest, q, q_rest, K, V, stride_k_t, stride_v_t, at, right_begin, end, len_k,
        window_left, window_right, scale, HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, EXP2,
        INDEX, INPUT_PRECISION, BLOCK_N, BLOCK_D, BLOCK_REST,
    )  # fmt: skip

    total = tl.where(l == 0, 1.0, l)
    lse = tl.where(l == 0, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453)
    if CuSeqlensQ is None:
        Lse += n_wide * tokens_q * (KV_HEADS * GROUP)
    tl.store(Lse + head.to(INDEX) * tokens_q + start_q + query, lse, mask=inside)
    out_rows = Out + query.to(INDEX) * stride_out_t + head.to(INDEX) * stride_out_h
    _store_tile(out_rows, acc / total[:, None], inside, 0, BLOCK_D, HEAD_DIM)
    if BLOCK_REST > 0:
        _store_tile(out_rows, acc_rest / total[:, None], inside, BLOCK_D, BLOCK_REST, HEAD_DIM)


def choose(kernel: str, x: torch.Tensor, narrow: bool) -> tiles.Tile:
    """The tile for x's dtype and head_dim; windows without one of their own take the general."""
    key = f"{tiles.bits(x)}-{tiles.head_limit(x.shape[-1])}"
    return tiles.choose(kernel, x, *((f"{key}-narrow",) if narrow else ()), key)


class Window(NamedTuple):
    """(left, right) keys visible besides the query's own, -1 where open."""

    left: int
    right: int

    def arguments(self) -> dict:
        return {
            "window_left": min(self.left, MAX_WINDOW),
            "window_right": min(self.right, MAX_WINDOW),
            "HAS_LEFT": self.left >= 0,
            "HAS_RIGHT": self.right >= 0,
        }

    def narrow(self, columns: int) -> bool:
        """Whether a window is so short that edges are all there is."""
        return self.left >= 0 and self.right >= 0 and self.left + self.right < columns


def check_call(q: torch.Tensor, softmax_scale: float) -> None:
    check_supported(q)
    if softmax_scale <= 0:
        raise Unsupported(f"softmax_scale {softmax_scale} in Triton")


def problem(q, k, cos, position_ids, cu_seqlens_q) -> dict:
    """The arguments that every kernel of one call shares."""
    kv_heads = k.shape[-2]
    return {
        "sequences": q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        "tokens_q": q.shape[-3],
        "tokens_k": k.shape[-3],
        "table_length": 0 if cos is None else cos.shape[0],
        "stride_position_b": (
            position_ids.stride(0) if position_ids is not None and position_ids.ndim == 2 else 0
        ),
        "KV_HEADS": kv_heads,
        "GROUP": q.shape[-2] // kv_heads,
        "HEAD_DIM": q.shape[-1],
        "HALF": 0 if cos is None else cos.shape[1],
        **head_tiles(q.shape[-1]),
    }


def dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def dense_positions(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Positions with consecutive tokens side by side; one row may still serve all sequences."""
    if position_ids is None or position_ids.stride(-1) == 1:
        return position_ids
    return position_ids.contiguous()


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
    check_call(q, softmax_scale)
    q, k, v, cos, sin = rows(q), rows(k), rows(v), dense(cos), dense(sin)
    position_ids = dense_positions(position_ids)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    if cos is not None:
        k, _ = rotate(k, None, cos, sin, position_ids, cu_seqlens_k)
    window = Window(window_left, window_right)
    tile = choose("attention_fwd", q, window.narrow(256))
    exp2 = how_to_exp2(tile, q)
    shared = problem(q, k, cos, position_ids, cu_seqlens_q)
    unit = stride_unit(q, k, v, out)
    blocks = triton.cdiv(max_seqlen_q * shared["GROUP"], tile["BLOCK_M"])
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[(blocks * shared["sequences"] * shared["KV_HEADS"],)](
            Out=out,
            Lse=lse,
            Q=q,
            K=k,
            V=v,
            Sinks=dense(sinks),
            Cos=cos,
            Sin=sin,
            PositionIds=position_ids,
            CuSeqlensQ=cu_seqlens_q,
            CuSeqlensK=cu_seqlens_k,
            **strides("out", out, unit),
            **strides("q", q, unit),
            **strides("k", k, unit),
            **strides("v", v, unit),
            **window.arguments(),
            **shared,
            UNIT=unit,
            scale=softmax_scale * LOG2_E,
            NARROW=window.narrow(256),
            EXP2=exp2,
            INDEX=index_dtype(q, k, v, out, lse),
            **PRECISION,
            **tile,
        )
    return out, lse
