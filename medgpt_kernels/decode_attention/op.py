"""Attention of new tokens over a dense or paged KV cache, appended in place.

B sequences of S new tokens, H query heads, G key and value heads, D head_dim, R rotary_dim;
caches [B, S_max, G, D], or [pages, page, G, D] with max_pages table entries a sequence.
"""

import torch

from medgpt_kernels import native, registry
from medgpt_kernels.attention.op import MAX_HEAD_DIM, MAX_WINDOW, is_size
from medgpt_kernels.decode_attention.reference import FP8
from medgpt_kernels.rotary.op import check_tables
from medgpt_kernels.rotary.tables import Rotary


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    sinks: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    rotary: Rotary | None = None,
) -> torch.Tensor:
    """Append k and v to the caches, then attend to what they hold, causal among the new tokens.

    The call of flash-attention's flash_attn_with_kvcache, with gpt-oss's sinks. Keys are split
    among threads or blocks and joined in a second stage (Flash-Decoding); the sink is counted once.

    Args:
        q: [B, S, H, D], any S >= 1; D at most 256. Query i stands at position
            cache_seqlens + i, or without k at cache_seqlens - S + i: its last query is aligned with
            the last cached key.
        k_cache, v_cache: [B, S_max, G, D] or paged [pages, page, G, D], in q's dtype or
            float8_e4m3fn; G a divisor of H. Any strides, the last one 1. Written in place; keys in
            it are rotated.
        cache_seqlens: int32 [B], keys cached before the append; it is not changed. -1: the row is
            skipped, its output is 0.
        block_table: int32 [B, max_pages], pages of each sequence in order. Entries past a
            sequence's keys, or before its window, are never read.
        k, v: [B, S, G, D] in q's dtype, the new tokens' keys (before rotation) and values. None:
            attend to what is cached, which cache_seqlens then counts in full.
        k_scale, v_scale: fp32 [G] for an fp8 cache, which holds x / scale, saturated at 448. None:
            1.
        window_size: (left, right) keys visible besides the query's own, -1 for no limit; right is
            0 or -1. gpt-oss's sliding window of 128 is (127, 0).
        sinks: [H] logits, any float dtype, less than infinite.
        softmax_scale: None is D ** -0.5.
        rotary: rotates q, and k as it is appended, the first R of D, at their positions; needs k.

    Returns:
        out in q's shape and dtype. A query that sees no key gives 0. Under autocast q, k and v are
        cast. There is no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a required gradient; on the CPU also
            lengths beyond the cache or the tables, and pages out of range.
    """
    if not torch.compiler.is_compiling():
        done = native.direct().decode_attention_direct(
            q, k_cache, v_cache, cache_seqlens, block_table, k, v, k_scale, v_scale, window_size,
            sinks, softmax_scale, rotary,
        )  # fmt: skip
        if done is not None:
            return done[0]
    if k is not None and v is not None:
        q, k, v = registry.autocast(q, k, v)
    else:
        (q,) = registry.autocast(q)
    _check_shapes(q, k_cache, v_cache, k, v)
    _check_lengths(q, k_cache, cache_seqlens, block_table, k, rotary)
    _check_others(q, k_cache, k, k_scale, v_scale, sinks, rotary)
    cos, sin = (None, None) if rotary is None else rotary
    tensors = (q, k_cache, v_cache, k, v, k_scale, v_scale, sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "decode_attention: expected inputs that require no gradient, got one that does (it "
            "appends in place and has no gradient: use torch.no_grad())"
        )
    return _decode_attention(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        k,
        v,
        k_scale,
        v_scale,
        sinks,
        cos,
        sin,
        _left(window_size),
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
    )


def _left(window_size) -> int:
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not pair or not all(is_size(side) and side >= -1 for side in window_size):
        raise ValueError(
            f"decode_attention: expected window_size (left, right) of keys >= 0, or -1 for no "
            f"limit, got {window_size}"
        )
    if window_size[1] > 0:
        raise ValueError(f"decode_attention: expected a right window of 0 or -1, got {window_size}")
    return min(window_size[0], MAX_WINDOW)


def _refuse(expected: str, got) -> None:
    raise ValueError(f"decode_attention: expected {expected}, got {got}")


def _check_shapes(q, k_cache, v_cache, k, v) -> None:
    if q.ndim != 4 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape or q.shape[1] < 1:
        _refuse(
            "q [B, S, H, D] of S >= 1 and caches of one shape [B, S_max, G, D] or "
            "[pages, page, G, D]",
            f"{list(q.shape)}, {list(k_cache.shape)} and {list(v_cache.shape)}",
        )
    batches, tokens, heads, head_dim = q.shape
    kv_heads, cached_dim = k_cache.shape[2:]
    if head_dim != cached_dim or not 1 <= head_dim <= MAX_HEAD_DIM:
        _refuse(
            f"q and caches of one head_dim of at most {MAX_HEAD_DIM}",
            f"{head_dim} and {cached_dim}",
        )
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        _refuse("a number of query heads that key heads divide", f"{heads} and {kv_heads}")
    if not q.dtype.is_floating_point or q.dtype == FP8:
        _refuse("q of a float dtype", q.dtype)
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, FP8):
        _refuse(f"caches in q's {q.dtype} or {FP8}", f"{k_cache.dtype} and {v_cache.dtype}")
    if k_cache.device != q.device or v_cache.device != q.device:
        _refuse(f"caches on q's {q.device}", f"{k_cache.device} and {v_cache.device}")
    if head_dim > 1 and (k_cache.stride(3) != 1 or v_cache.stride(3) != 1):
        _refuse(
            "caches whose last dimension is contiguous",
            f"strides {k_cache.stride()} and {v_cache.stride()}",
        )
    if (k is None) != (v is None):
        _refuse("both k and v, or neither", "one of them")
    if k is None:
        return
    wanted = (batches, tokens, kv_heads, head_dim)
    if tuple(k.shape) != wanted or tuple(v.shape) != wanted:
        _refuse(f"k and v {list(wanted)}", f"{list(k.shape)} and {list(v.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        _refuse(f"k and v in q's {q.dtype}", f"{k.dtype} and {v.dtype}")
    if k.device != q.device or v.device != q.device:
        _refuse(f"k and v on q's {q.device}", f"{k.device} and {v.device}")


def _check_lengths(q, k_cache, cache_seqlens, block_table, k, rotary) -> None:
    batches, tokens = q.shape[:2]
    if cache_seqlens.dtype != torch.int32 or tuple(cache_seqlens.shape) != (batches,):
        _refuse(
            f"cache_seqlens int32 [{batches}]",
            f"{cache_seqlens.dtype} {list(cache_seqlens.shape)}",
        )
    if cache_seqlens.device != q.device:
        _refuse(f"cache_seqlens on q's {q.device}", cache_seqlens.device)
    if block_table is None:
        capacity = k_cache.shape[1]
        if k_cache.shape[0] != batches:
            _refuse(f"caches of q's {batches} sequences without block_table", k_cache.shape[0])
    else:
        if (
            block_table.dtype != torch.int32
            or block_table.ndim != 2
            or block_table.shape[0] != batches
        ):
            _refuse(
                f"block_table int32 [{batches}, max_pages]",
                f"{block_table.dtype} {list(block_table.shape)}",
            )
        if block_table.device != q.device:
            _refuse(f"block_table on q's {q.device}", block_table.device)
        if k_cache.shape[1] < 1:
            _refuse("pages of at least one token", k_cache.shape[1])
        capacity = block_table.shape[1] * k_cache.shape[1]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        new = 0 if k is None else tokens
        longest = capacity if rotary is None else min(capacity, rotary[0].shape[0])
        for b, length in enumerate(cache_seqlens.tolist()):
            if length < -1 or (length >= 0 and length + new > longest):
                _refuse(f"cache_seqlens of -1 ... {longest - new}", f"{length} in row {b}")


def _check_others(q, k_cache, k, k_scale, v_scale, sinks, rotary) -> None:
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if k_cache.dtype != FP8:
            _refuse(f"no {name} unless the cache is {FP8}", f"a cache of {k_cache.dtype}")
        if scale.dtype != torch.float32 or tuple(scale.shape) != (kv_heads,):
            _refuse(f"{name} float32 [{kv_heads}]", f"{scale.dtype} {list(scale.shape)}")
        if scale.device != q.device:
            _refuse(f"{name} on q's {q.device}", scale.device)
    if sinks is not None:
        if tuple(sinks.shape) != (heads,) or not sinks.dtype.is_floating_point:
            _refuse(f"float sinks [{heads}]", f"{sinks.dtype} {list(sinks.shape)}")
        if sinks.device != q.device:
            _refuse(f"sinks on q's {q.device}", sinks.device)
    if rotary is not None:
        if k is None:
            _refuse("k and v with rotary", "None")
        check_tables("decode_attention", rotary, q.shape[3], q.device)


def _fake(q, *rest):
    return q.new_empty(q.shape)


# window_left is -1 for no limit; nothing after a query is ever visible.
_operator = registry.register(
    "decode_attention(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? k, Tensor? v, Tensor? k_scale, Tensor? v_scale, Tensor? sinks, "
    "Tensor? cos, Tensor? sin, SymInt window_left, float softmax_scale) -> Tensor out",
    package=__package__,
    fake=_fake,
    backends=("reference", "cpu", "triton", "cuda"),
)
_decode_attention = registry.direct(_operator)
