"""Attention in Triton: the backward pass, without atomics and therefore bitwise repeatable.

Dimensions as in triton_fwd.py. With rotary, d_q's memory holds the rotated q until d_q is there:
the block of queries that reads it is the one that overwrites it.
"""

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.attention.triton_exp2 import exp2_scores, how_to_exp2
from medgpt_kernels.attention.triton_fwd import (
    LOG2_E,
    PRECISION,
    Window,
    _elements,
    _key_range,
    _load_rest,
    _load_rotated,
    _load_table,
    _load_tile,
    _positions,
    _scores,
    _sequence,
    _store_tile,
    _visible,
    check_call,
    choose,
    dense,
    dense_positions,
    problem,
)
from medgpt_kernels.rotary.triton import index_dtype, rotate, rows, stride_unit, strides

SINK_SPLITS = 128  # at most so many partial sums, a number that depends on shapes alone


@triton.jit
def _partner(
    x, x_rest, OFFSET: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """For columns OFFSET ... of a head in registers, those half a rotation away."""
    d = OFFSET + tl.arange(0, BLOCK)
    index = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    index = tl.broadcast_to(index[None, :], [x.shape[0], BLOCK])
    y = tl.gather(x, tl.minimum(index, BLOCK_D - 1), 1)
    if BLOCK_REST > 0:
        y_rest = tl.gather(x_rest, tl.maximum(index - BLOCK_D, 0), 1)
        y = tl.where(index < BLOCK_D, y, y_rest)
    return y


@triton.jit
def _store_unrotated_tile(
    x_rows, x, y, Cos, Sin, position, inside, table_length, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    d = OFFSET + tl.arange(0, BLOCK)
    lower = d < HALF
    i = tl.where(lower, d, d - HALF)
    cos = _load_table(Cos, position, i, inside, table_length, HALF)
    sin = _load_table(Sin, position, i, inside, table_length, HALF)
    turned = x * cos + tl.where(lower, 1.0, -1.0)[None, :] * y * sin
    x = tl.where((d < 2 * HALF)[None, :], turned, x)
    _store_tile(x_rows, x, inside, OFFSET, BLOCK, HEAD_DIM)


@triton.jit
def _store_unrotated(
    x_rows, x, x_rest, Cos, Sin, position, inside, table_length, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradients of rotated rows, turned back where there are tables."""
    if Cos is None:
        _store_tile(x_rows, x, inside, 0, BLOCK_D, HEAD_DIM)
        if BLOCK_REST > 0:
            _store_tile(x_rows, x_rest, inside, BLOCK_D, BLOCK_REST, HEAD_DIM)
    elif 2 * HALF == BLOCK_D and HEAD_DIM == BLOCK_D:
        i = tl.arange(0, BLOCK_D // 2)
        pairs = tl.permute(tl.reshape(x, [x.shape[0], 2, BLOCK_D // 2]), [0, 2, 1])
        a, b = tl.split(pairs)
        cos = _load_table(Cos, position, i, inside, table_length, HALF)
        sin = _load_table(Sin, position, i, inside, table_length, HALF)
        _store_tile(x_rows, a * cos + b * sin, inside, 0, BLOCK_D // 2, HEAD_DIM)
        _store_tile(x_rows, b * cos - a * sin, inside, BLOCK_D // 2, BLOCK_D // 2, HEAD_DIM)
    else:
        y = _partner(x, x_rest, 0, BLOCK_D, BLOCK_D, BLOCK_REST, HALF)
        _store_unrotated_tile(
            x_rows, x, y, Cos, Sin, position, inside, table_length, 0, BLOCK_D, HEAD_DIM, HALF
        )
        if BLOCK_REST > 0:
            y = _partner(x, x_rest, BLOCK_D, BLOCK_REST, BLOCK_D, BLOCK_REST, HALF)
            _store_unrotated_tile(
                x_rows, x_rest, y, Cos, Sin, position, inside, table_length, BLOCK_D, BLOCK_REST,
                HEAD_DIM, HALF,
            )  # fmt: skip


@triton.jit
def _dot_rows(a_rows, b_rows, inside, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
              HEAD_DIM: tl.constexpr):  # fmt: skip
    a = _load_tile(a_rows, inside, OFFSET, BLOCK, HEAD_DIM, True).to(tl.float32)
    b = _load_tile(b_rows, inside, OFFSET, BLOCK, HEAD_DIM, True).to(tl.float32)
    return tl.sum(a * b, 1)


@triton.jit(do_not_specialize=["sequences", "tokens_q", "tokens_k", "table_length"])
def _attention_bwd_rows_kernel(
    RowLse,
    Delta,
    RotatedQ,
    Q,
    DOut,
    Out,
    Lse,
    DLse,
    Cos,
    Sin,
    PositionIds,
    CuSeqlensQ,
    CuSeqlensK,
    stride_rotated_b,
    stride_rotated_t,
    stride_rotated_h,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_d_out_b,
    stride_d_out_t,
    stride_d_out_h,
    stride_out_b,
    stride_out_t,
    stride_out_h,
    stride_d_lse_b,
    stride_d_lse_h,
    stride_d_lse_t,
    stride_position_b,
    sequences,
    tokens_q,
    tokens_k,
    table_length,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Of each query and head: lse in units of log 2, sum(d_out out) - d_lse, and q rotated."""
    stride_rotated_b, stride_rotated_t, stride_rotated_h = (
        stride_rotated_b * UNIT,
        stride_rotated_t * UNIT,
        stride_rotated_h * UNIT,
    )
    stride_q_b, stride_q_t, stride_q_h = _elements(stride_q_b, stride_q_t, stride_q_h, UNIT)
    stride_d_out_b, stride_d_out_t, stride_d_out_h = (
        stride_d_out_b * UNIT,
        stride_d_out_t * UNIT,
        stride_d_out_h * UNIT,
    )
    stride_out_b, stride_out_t, stride_out_h = (
        stride_out_b * UNIT,
        stride_out_t * UNIT,
        stride_out_h * UNIT,
    )
    HEADS: tl.constexpr = KV_HEADS * GROUP
    n = tl.program_id(0) % sequences
    block = tl.program_id(0) // sequences
    start_q, len_q = _sequence(n, CuSeqlensQ, tokens_q)
    start_k, len_k = _sequence(n, CuSeqlensK, tokens_k)
    if block * BLOCK_M >= len_q * HEADS:
        return
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = r // HEADS
    head = (r % HEADS).to(INDEX)
    inside = query < len_q
    n_wide, start_wide, query_wide = n.to(tl.int64), start_q.to(tl.int64), query.to(INDEX)
    DOut += n_wide * stride_d_out_b + start_wide * stride_d_out_t
    Out += n_wide * stride_out_b + start_wide * stride_out_t
    d_out_rows = DOut + query_wide * stride_d_out_t + head * stride_d_out_h
    out_rows = Out + query_wide * stride_out_t + head * stride_out_h
    delta = _dot_rows(d_out_rows, out_rows, inside, 0, BLOCK_D, HEAD_DIM)
    if BLOCK_REST > 0:
        delta += _dot_rows(d_out_rows, out_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM)
    if DLse is not None:
        DLse += n_wide * stride_d_lse_b + start_wide * stride_d_lse_t
        where = DLse + head * stride_d_lse_h + query_wide * stride_d_lse_t
        delta -= tl.load(where, mask=inside, other=0).to(tl.float32)
    batch = n_wide * 0
    if CuSeqlensQ is None:
        batch = n_wide * tokens_q
    Lse += batch * HEADS + start_q
    lse = tl.load(Lse + head * tokens_q + query, mask=inside, other=0)
    # a query without keys: 2 ** (s - inf) = 0 wherever it is read
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    RowLse += (batch + start_q) * HEADS
    Delta += (batch + start_q) * HEADS
    tl.store(RowLse + r.to(INDEX), lse, mask=inside)
    tl.store(Delta + r.to(INDEX), delta, mask=inside)
    if RotatedQ is not None:
        at = query + len_k - len_q
        position = _positions(PositionIds, n, stride_position_b, start_k, at, inside)
        Q += n_wide * stride_q_b + start_wide * stride_q_t
        RotatedQ += n_wide * stride_rotated_b + start_wide * stride_rotated_t
        q, q_rest = _load_rotated(
            Q + query_wide * stride_q_t + head * stride_q_h, Cos, Sin, position, inside,
            table_length, BLOCK_D, BLOCK_REST, HEAD_DIM, HALF,
        )  # fmt: skip
        rotated = RotatedQ + query_wide * stride_rotated_t + head * stride_rotated_h
        _store_tile(rotated, q, inside, 0, BLOCK_D, HEAD_DIM)
        if BLOCK_REST > 0:
            _store_tile(rotated, q_rest, inside, BLOCK_D, BLOCK_REST, HEAD_DIM)


@triton.jit(do_not_specialize=["tokens", "split_tokens"])
def _attention_bwd_sinks_kernel(
    Partial, RowLse, Delta, Sinks, tokens, split_tokens, HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[None, :]
    sink = tl.load(Sinks + h, mask=h < HEADS, other=0).to(tl.float32) * 1.4426950408889634
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, tokens)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)[:, None]
        where = t.to(tl.int64) * HEADS + h
        inside = (t < end) & (h < HEADS)
        lse = tl.load(RowLse + where, mask=inside, other=float("inf"))
        acc -= tl.exp2(sink - lse) * tl.load(Delta + where, mask=inside, other=0)
    h = tl.arange(0, BLOCK_H)
    tl.store(Partial + split * HEADS + h, tl.sum(acc, 0), mask=h < HEADS)


@triton.jit
def _kv_span(
    d_k, d_k_rest, d_v, d_v_rest, k, k_rest, v, v_rest, Q, DOut, RowLse, Delta, stride_q_t,
    stride_q_h, stride_d_out_t, stride_d_out_h, j, begin, end, len_q, len_k, window_left,
    window_right, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr, INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rows begin ... end (query and head of the group) of one block of keys."""
    for r0 in range(begin, end, BLOCK_M):
        r = r0 + tl.arange(0, BLOCK_M)
        query = r // GROUP
        sub = (r % GROUP).to(INDEX)
        inside = query < len_q
        query_wide = query.to(INDEX)
        q_rows = Q + query_wide * stride_q_t + sub * stride_q_h
        q = _load_tile(q_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
        q_rest = _load_rest(q_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, True)
        lse = tl.load(RowLse + query_wide * HEADS + sub, mask=inside, other=float("inf"))
        s = _scores(k, k_rest, q, q_rest, BLOCK_REST, INPUT_PRECISION)  # [N, M]
        p = tl.exp2(s * scale - lse[None, :])
        if MASKED:
            at = (query + len_k - len_q)[None, :]
            keep = _visible(at, j[:, None], len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(keep, p, 0.0)
        d_out_rows = DOut + query_wide * stride_d_out_t + sub * stride_d_out_h
        d_out = _load_tile(d_out_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
        d_out_rest = _load_rest(d_out_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, True)
        p_in = p.to(d_out.dtype)
        d_v = tl.dot(p_in, d_out, d_v, input_precision=INPUT_PRECISION)
        if BLOCK_REST > 0:
            d_v_rest = tl.dot(p_in, d_out_rest, d_v_rest, input_precision=INPUT_PRECISION)
        delta = tl.load(Delta + query_wide * HEADS + sub, mask=inside, other=0)
        d_p = _scores(v, v_rest, d_out, d_out_rest, BLOCK_REST, INPUT_PRECISION)
        d_s = (p * (d_p - delta[None, :])).to(q.dtype)
        d_k = tl.dot(d_s, q, d_k, input_precision=INPUT_PRECISION)
        if BLOCK_REST > 0:
            d_k_rest = tl.dot(d_s, q_rest, d_k_rest, input_precision=INPUT_PRECISION)
    return d_k, d_k_rest, d_v, d_v_rest


@triton.jit(
    do_not_specialize=[
        "sequences", "tokens_q", "tokens_k", "table_length", "window_left", "window_right",
    ]
)  # fmt: skip
def _attention_bwd_kv_kernel(
    DK,
    DV,
    DOut,
    Q,
    K,
    V,
    RowLse,
    Delta,
    Cos,
    Sin,
    PositionIds,
    CuSeqlensQ,
    CuSeqlensK,
    stride_d_k_b,
    stride_d_k_t,
    stride_d_k_h,
    stride_d_out_b,
    stride_d_out_t,
    stride_d_out_h,
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
    softmax_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    NARROW: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    stride_d_k_b, stride_d_k_t, stride_d_k_h = (
        stride_d_k_b * UNIT,
        stride_d_k_t * UNIT,
        stride_d_k_h * UNIT,
    )
    stride_d_out_b, stride_d_out_t, stride_d_out_h = (
        stride_d_out_b * UNIT,
        stride_d_out_t * UNIT,
        stride_d_out_h * UNIT,
    )
    stride_q_b, stride_q_t, stride_q_h = _elements(stride_q_b, stride_q_t, stride_q_h, UNIT)
    stride_k_b, stride_k_t, stride_k_h = _elements(stride_k_b, stride_k_t, stride_k_h, UNIT)
    stride_v_b, stride_v_t, stride_v_h = _elements(stride_v_b, stride_v_t, stride_v_h, UNIT)
    HEADS: tl.constexpr = KV_HEADS * GROUP
    g = tl.program_id(0) % KV_HEADS
    n = tl.program_id(0) // KV_HEADS % sequences
    n0 = tl.program_id(0) // KV_HEADS // sequences * BLOCK_N
    start_q, len_q = _sequence(n, CuSeqlensQ, tokens_q)
    start_k, len_k = _sequence(n, CuSeqlensK, tokens_k)
    if n0 >= len_k:
        return
    shift = len_k - len_q
    j = n0 + tl.arange(0, BLOCK_N)
    inside = j < len_k
    n_wide, g_wide = n.to(tl.int64), g.to(tl.int64)
    start_q_wide, start_k_wide = start_q.to(tl.int64), start_k.to(tl.int64)
    Q += n_wide * stride_q_b + start_q_wide * stride_q_t + g_wide * GROUP * stride_q_h
    DOut += n_wide * stride_d_out_b + start_q_wide * stride_d_out_t
    DOut += g_wide * GROUP * stride_d_out_h
    row = start_q_wide
    if CuSeqlensQ is None:
        row += n_wide * tokens_q
    RowLse += row * HEADS + g * GROUP
    Delta += row * HEADS + g * GROUP
    K += n_wide * stride_k_b + start_k_wide * stride_k_t + g_wide * stride_k_h
    V += n_wide * stride_v_b + start_k_wide * stride_v_t + g_wide * stride_v_h
    k_rows = K + j.to(INDEX) * stride_k_t
    v_rows = V + j.to(INDEX) * stride_v_t
    k = _load_tile(k_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
    k_rest = _load_rest(k_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, True)
    v = _load_tile(v_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
    v_rest = _load_rest(v_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, True)
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_k_rest = inside if BLOCK_REST == 0 else tl.zeros([BLOCK_N, max(BLOCK_REST, 1)], tl.float32)
    d_v_rest = d_k_rest

    # queries that see some key of the block, and those that see all
    key_last = tl.minimum(n0 + BLOCK_N, len_k) - 1
    begin = n0 * 0
    inner = begin
    end = len_q
    inner_end = end
    if HAS_RIGHT:
        begin = tl.maximum(n0 - window_right - shift, 0)
        inner = tl.maximum(key_last - window_right - shift, 0)
    if HAS_LEFT:
        end = tl.minimum(key_last + window_left - shift + 1, len_q)
        inner_end = tl.minimum(n0 + window_left - shift + 1, len_q)
    begin, inner, inner_end, end = begin * GROUP, inner * GROUP, inner_end * GROUP, end * GROUP
    if NARROW:
        right_begin = begin
    else:
        left_end = begin + tl.cdiv(inner - begin, BLOCK_M) * BLOCK_M
        right_begin = left_end + tl.maximum(inner_end - left_end, 0) // BLOCK_M * BLOCK_M
        if not HAS_LEFT:  # rows past the last weigh nothing: no edge there
            right_begin = tl.maximum(left_end, end)
        if HAS_RIGHT:
            d_k, d_k_rest, d_v, d_v_rest = _kv_span(
                d_k, d_k_rest, d_v, d_v_rest, k, k_rest, v, v_rest, Q, DOut, RowLse, Delta,
                stride_q_t, stride_q_h, stride_d_out_t, stride_d_out_h, j, begin,
                tl.minimum(left_end, end), len_q, len_k, window_left, window_right, scale, HEADS,
                GROUP, HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, INDEX, INPUT_PRECISION, BLOCK_M,
                BLOCK_D, BLOCK_REST,
            )  # fmt: skip
        d_k, d_k_rest, d_v, d_v_rest = _kv_span(
            d_k, d_k_rest, d_v, d_v_rest, k, k_rest, v, v_rest, Q, DOut, RowLse, Delta, stride_q_t,
            stride_q_h, stride_d_out_t, stride_d_out_h, j, left_end, right_begin, len_q, len_k,
            window_left, window_right, scale, HEADS, GROUP, HEAD_DIM, HAS_LEFT, HAS_RIGHT, False,
            INDEX, INPUT_PRECISION, BLOCK_M, BLOCK_D, BLOCK_REST,
        )  # fmt: skip
    if HAS_LEFT:
        d_k, d_k_rest, d_v, d_v_rest = _kv_span(
            d_k, d_k_rest, d_v, d_v_rest, k, k_rest, v, v_rest, Q, DOut, RowLse, Delta, stride_q_t,
            stride_q_h, stride_d_out_t, stride_d_out_h, j, right_begin, end, len_q, len_k,
            window_left, window_right, scale, HEADS, GROUP, HEAD_DIM, HAS_LEFT, HAS_RIGHT, True,
            INDEX, INPUT_PRECISION, BLOCK_M, BLOCK_D, BLOCK_REST,
        )  # fmt: skip

    out = n_wide * stride_d_k_b + start_k_wide * stride_d_k_t + g_wide * stride_d_k_h
    d_v_rows = DV + out + j.to(INDEX) * stride_d_k_t
    _store_tile(d_v_rows, d_v, inside, 0, BLOCK_D, HEAD_DIM)
    if BLOCK_REST > 0:
        _store_tile(d_v_rows, d_v_rest, inside, BLOCK_D, BLOCK_REST, HEAD_DIM)
        d_k_rest = d_k_rest * softmax_scale
    position = j
    if Cos is not None:
        position = _positions(PositionIds, n, stride_position_b, start_k, j, inside)
    _store_unrotated(
        DK + out + j.to(INDEX) * stride_d_k_t, d_k * softmax_scale, d_k_rest, Cos, Sin, position,
        inside, table_length, BLOCK_D, BLOCK_REST, HEAD_DIM, HALF,
    )  # fmt: skip


@triton.jit
def _q_span(
    d_q, d_q_rest, q, q_rest, d_out, d_out_rest, lse, delta, K, V, stride_k_t, stride_v_t, at,
    begin, end, len_k, window_left, window_right, scale, HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr, EXP2: tl.constexpr,
    INDEX: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Keys begin ... end of one block of queries."""
    for n0 in range(begin, end, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        inside = j < len_k
        k_rows = K + j.to(INDEX) * stride_k_t
        k = _load_tile(k_rows, inside, 0, BLOCK_D, HEAD_DIM, MASKED)
        k_rest = _load_rest(k_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, MASKED)
        v_rows = V + j.to(INDEX) * stride_v_t
        v = _load_tile(v_rows, inside, 0, BLOCK_D, HEAD_DIM, MASKED)
        v_rest = _load_rest(v_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, MASKED)
        s = _scores(q, q_rest, k, k_rest, BLOCK_REST, INPUT_PRECISION)  # [M, N]
        p = exp2_scores(s, scale, lse, MASKED, EXP2)
        if MASKED:
            keep = _visible(
                at[:, None], j[None, :], len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            p = tl.where(keep, p, 0.0)
        d_p = _scores(d_out, d_out_rest, v, v_rest, BLOCK_REST, INPUT_PRECISION)
        d_s = (p * (d_p - delta[:, None])).to(k.dtype)
        d_q = tl.dot(d_s, k, d_q, input_precision=INPUT_PRECISION)
        if BLOCK_REST > 0:
            d_q_rest = tl.dot(d_s, k_rest, d_q_rest, input_precision=INPUT_PRECISION)
    return d_q, d_q_rest


@triton.jit(
    do_not_specialize=[
        "sequences", "tokens_q", "tokens_k", "table_length", "window_left", "window_right",
    ]
)  # fmt: skip
def _attention_bwd_q_kernel(
    DQ,
    DOut,
    Q,
    K,
    V,
    RowLse,
    Delta,
    Cos,
    Sin,
    PositionIds,
    CuSeqlensQ,
    CuSeqlensK,
    stride_d_q_b,
    stride_d_q_t,
    stride_d_q_h,
    stride_d_out_b,
    stride_d_out_t,
    stride_d_out_h,
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
    softmax_scale,
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
    stride_d_q_b, stride_d_q_t, stride_d_q_h = (
        stride_d_q_b * UNIT,
        stride_d_q_t * UNIT,
        stride_d_q_h * UNIT,
    )
    stride_d_out_b, stride_d_out_t, stride_d_out_h = (
        stride_d_out_b * UNIT,
        stride_d_out_t * UNIT,
        stride_d_out_h * UNIT,
    )
    stride_q_b, stride_q_t, stride_q_h = _elements(stride_q_b, stride_q_t, stride_q_h, UNIT)
    stride_k_b, stride_k_t, stride_k_h = _elements(stride_k_b, stride_k_t, stride_k_h, UNIT)
    stride_v_b, stride_v_t, stride_v_h = _elements(stride_v_b, stride_v_t, stride_v_h, UNIT)
    HEADS: tl.constexpr = KV_HEADS * GROUP
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
    head = (g * GROUP + r % GROUP).to(INDEX)
    inside = query < len_q
    at = query + shift
    query_wide = query.to(INDEX)
    n_wide, start_q_wide, start_k_wide = n.to(tl.int64), start_q.to(tl.int64), start_k.to(tl.int64)
    Q += n_wide * stride_q_b + start_q_wide * stride_q_t
    DQ += n_wide * stride_d_q_b + start_q_wide * stride_d_q_t
    DOut += n_wide * stride_d_out_b + start_q_wide * stride_d_out_t
    K += n_wide * stride_k_b + start_k_wide * stride_k_t + g.to(tl.int64) * stride_k_h
    V += n_wide * stride_v_b + start_k_wide * stride_v_t + g.to(tl.int64) * stride_v_h
    row = start_q_wide
    if CuSeqlensQ is None:
        row += n_wide * tokens_q
    RowLse += row * HEADS
    Delta += row * HEADS
    q_rows = Q + query_wide * stride_q_t + head * stride_q_h
    d_out_rows = DOut + query_wide * stride_d_out_t + head * stride_d_out_h
    q = _load_tile(q_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
    q_rest = _load_rest(q_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, True)
    d_out = _load_tile(d_out_rows, inside, 0, BLOCK_D, HEAD_DIM, True)
    d_out_rest = _load_rest(d_out_rows, inside, BLOCK_D, BLOCK_REST, HEAD_DIM, True)
    lse = tl.load(RowLse + query_wide * HEADS + head, mask=inside, other=float("inf"))
    delta = tl.load(Delta + query_wide * HEADS + head, mask=inside, other=0)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_q_rest = inside if BLOCK_REST == 0 else tl.zeros([BLOCK_M, max(BLOCK_REST, 1)], tl.float32)

    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, len_q - 1)
    begin, inner, inner_end, end = _key_range(
        first, last, shift, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    if NARROW:
        right_begin = begin
    else:
        left_end = begin + tl.cdiv(inner - begin, BLOCK_N) * BLOCK_N
        right_begin = left_end + tl.maximum(inner_end - left_end, 0) // BLOCK_N * BLOCK_N
        if HAS_LEFT:
            d_q, d_q_rest = _q_span(
                d_q, d_q_rest, q, q_rest, d_out, d_out_rest, lse, delta, K, V, stride_k_t,
                stride_v_t, at, begin, tl.minimum(left_end, end), len_k, window_left, window_right,
                scale, HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, EXP2, INDEX, INPUT_PRECISION, BLOCK_N,
                BLOCK_D, BLOCK_REST,
            )  # fmt: skip
        d_q, d_q_rest = _q_span(
            d_q, d_q_rest, q, q_rest, d_out, d_out_rest, lse, delta, K, V, stride_k_t, stride_v_t,
            at, left_end, right_begin, len_k, window_left, window_right, scale, HEAD_DIM, HAS_LEFT,
            HAS_RIGHT, False, EXP2, INDEX, INPUT_PRECISION, BLOCK_N, BLOCK_D, BLOCK_REST,
        )  # fmt: skip
    d_q, d_q_rest = _q_span(
        d_q, d_q_rest, q, q_rest, d_out, d_out_rest, lse, delta, K, V, stride_k_t, stride_v_t, at,
        right_begin, end, len_k, window_left, window_right, scale, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
        True, EXP2, INDEX, INPUT_PRECISION, BLOCK_N, BLOCK_D, BLOCK_REST,
    )  # fmt: skip

    if BLOCK_REST > 0:
        d_q_rest = d_q_rest * softmax_scale
    position = at
    if Cos is not None:
        position = _positions(PositionIds, n, stride_position_b, start_k, at, inside)
    _store_unrotated(
        DQ + query_wide * stride_d_q_t + head * stride_d_q_h, d_q * softmax_scale, d_q_rest, Cos,
        Sin, position, inside, table_length, BLOCK_D, BLOCK_REST, HEAD_DIM, HALF,
    )  # fmt: skip


def _sinks_gradient(sinks, row_lse, delta) -> torch.Tensor:
    heads = sinks.shape[0]
    tokens = row_lse.numel() // heads
    split = max(triton.cdiv(tokens, SINK_SPLITS), 256)
    splits = triton.cdiv(tokens, split)
    partial = torch.empty(splits, heads, dtype=torch.float32, device=sinks.device)
    _attention_bwd_sinks_kernel[(splits,)](
        Partial=partial,
        RowLse=row_lse,
        Delta=delta,
        Sinks=sinks.contiguous(),
        tokens=tokens,
        split_tokens=split,
        HEADS=heads,
        BLOCK_H=triton.next_power_of_2(heads),
        **tiles.choose("attention_bwd_sinks", sinks),
    )
    return partial.sum(0).to(sinks.dtype)


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
    check_call(q, softmax_scale)
    d_out, q, k, v, out = map(rows, (d_out, q, k, v, out))
    lse, cos, sin, position_ids = dense(lse), dense(cos), dense(sin), dense_positions(position_ids)
    window = Window(window_left, window_right)
    shared = problem(q, k, cos, position_ids, cu_seqlens_q)
    sequences, heads = shared["sequences"], q.shape[-2]
    want_q, want_k, want_v, want_sinks = wanted
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    row_lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    delta = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    d_sinks = None
    d_k, d_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    unit = stride_unit(d_out, q, k, v, out, d_q)
    common = {
        "Cos": cos,
        "Sin": sin,
        "PositionIds": position_ids,
        "CuSeqlensQ": cu_seqlens_q,
        "CuSeqlensK": cu_seqlens_k,
        "UNIT": unit,
        "INDEX": index_dtype(d_out, q, k, v, out, d_q, d_k, row_lse),
        **strides("d_out", d_out, unit),
        **shared,
    }
    with torch.cuda.device_of(q):
        rotated = None if cos is None else d_q
        lse_strides = (0, 0, 0) if d_lse is None else (0, *d_lse.stride())[-3:]
        tile = tiles.choose("attention_bwd_rows", q)
        blocks = triton.cdiv(max_seqlen_q * heads, tile["BLOCK_M"])
        _attention_bwd_rows_kernel[(blocks * sequences,)](
            RowLse=row_lse,
            Delta=delta,
            RotatedQ=rotated,
            Q=q,
            DOut=d_out,
            Out=out,
            Lse=lse,
            DLse=d_lse,
            **strides("rotated", rotated, unit),
            **strides("q", q, unit),
            **strides("out", out, unit),
            **{f"stride_d_lse_{a}": s for a, s in zip("bht", lse_strides, strict=True)},
            **common,
            **tile,
        )
        if want_sinks:
            d_sinks = _sinks_gradient(sinks, row_lse, delta)
        if cos is not None:
            q = d_q
            k, _ = rotate(k, None, cos, sin, position_ids, cu_seqlens_k)
        common |= {
            "DOut": d_out,
            "Q": q,
            "K": k,
            "V": v,
            "RowLse": row_lse,
            "Delta": delta,
            **strides("q", q, unit),
            **strides("k", k, unit),
            **strides("v", v, unit),
            **window.arguments(),
            **PRECISION,
            "scale": softmax_scale * LOG2_E,
            "softmax_scale": softmax_scale,
            "NARROW": window.narrow(256),
        }
        if want_k or want_v:
            tile = choose("attention_bwd_kv", q, window.narrow(256))
            blocks = triton.cdiv(max_seqlen_k, tile["BLOCK_N"])
            _attention_bwd_kv_kernel[(blocks * sequences * k.shape[-2],)](
                DK=d_k, DV=d_v, **strides("d_k", d_k, unit), **common, **tile
            )
        if want_q:
            tile = choose("attention_bwd_q", q, window.narrow(256))
            exp2 = how_to_exp2(tile, q)
            blocks = triton.cdiv(max_seqlen_q * shared["GROUP"], tile["BLOCK_M"])
            _attention_bwd_q_kernel[(blocks * sequences * k.shape[-2],)](
                DQ=d_q, EXP2=exp2, **strides("d_q", d_q, unit), **common, **tile
            )
    grads = (d_q, d_k, d_v, d_sinks)
    return tuple(g if need else q.new_empty(0) for g, need in zip(grads, wanted, strict=True))
