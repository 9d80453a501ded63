"""Routing in Triton, for CUDA and ROCm: two launches at most lengths, one for a single tile.

T tokens, H hidden, E experts, K topk. The first launch computes logits, ids and weights, and how
often each tile of tokens chose each expert; the second gives every slot its row. No atomics: a
tile's place is the sum of the counts before it, read by every program itself for few tiles, and
from a scan (one more launch) for many.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from medgpt_kernels import aot, tiles
from medgpt_kernels.registry import Unsupported
from medgpt_kernels.routing.triton_bwd import d_logits_of, d_weight_of, d_x_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORING_CODES = {"topk_softmax": 0, "softmax_topk": 1, "sigmoid": 2}
FEW_TILES = 256  # more are scanned
WIDE = 128  # more experts than this take tiles of their own
MAX_EXPERTS = 1024


@triton.jit
def _choose(
    logits, choice, GivenIds, t, e, TOKENS_INSIDE, EXPERTS: tl.constexpr, TOPK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ids and their logits [T, K]; ties to the lower id, NaN after minus infinity."""
    LOWEST: tl.constexpr = -2147483648
    k_all = tl.arange(0, BLOCK_K)[None, :]
    value = tl.where(choice == 0, 0.0, choice)  # zeros of both signs are one value
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    key = tl.where(value == value, key, LOWEST + 1)
    key = tl.where((e < EXPERTS)[None, :], key, LOWEST)
    ids = tl.zeros([t.shape[0], BLOCK_K], tl.int32)
    chosen = tl.zeros([t.shape[0], BLOCK_K], tl.float32)
    for k in range(TOPK):
        if GivenIds is not None:
            pick = tl.load(GivenIds + t * TOPK + k, mask=TOKENS_INSIDE, other=0).to(tl.int32)
        else:
            best = tl.max(key, 1)
            pick = tl.min(tl.where(key == best[:, None], e[None, :], EXPERTS), 1)
            key = tl.where(e[None, :] == pick[:, None], LOWEST, key)
        logit = tl.sum(tl.where(e[None, :] == pick[:, None], logits, 0.0), 1)
        ids = tl.where(k_all == k, pick[:, None], ids)
        chosen = tl.where(k_all == k, logit[:, None], chosen)
    return ids, chosen


@triton.jit
def _weigh(
    logits, chosen, e, EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_K: tl.constexpr,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    known = (tl.arange(0, BLOCK_K) < TOPK)[None, :]
    if SCORING == 2:
        weights = 1 / (1 + tl.exp(-chosen))
        if RENORMALIZE:
            weights /= tl.sum(tl.where(known, weights, 0.0), 1)[:, None] + 1e-20
    else:
        if RENORMALIZE:  # over all and then over the chosen is over the chosen
            over = tl.where(known, chosen, -float("inf"))
        else:
            over = tl.where((e < EXPERTS)[None, :], logits, -float("inf"))
        most = tl.max(over, 1)[:, None]
        weights = tl.exp(chosen - most) / tl.sum(tl.exp(over - most), 1)[:, None]
    wrong = tl.max(((logits != logits) & (e < EXPERTS)[None, :]).to(tl.int32), 1)
    return tl.where(wrong[:, None] > 0, float("nan"), weights)


@triton.jit
def _slots(ids, inside, e, TOPK: tl.constexpr, BLOCK_K: tl.constexpr):
    """How often each token chose each expert [T, E]."""
    k_all = tl.arange(0, BLOCK_K)[None, :]
    count = tl.zeros([ids.shape[0], e.shape[0]], tl.int32)
    for k in range(TOPK):
        pick = tl.sum(tl.where(k_all == k, ids, 0), 1)
        count += ((e[None, :] == pick[:, None]) & inside[:, None]).to(tl.int32)
    return count


@triton.jit
def _place(
    GatherIndices, ScatterIndices, ids, count, first, t, inside, e, TOPK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of a tile's slots; first [E]: the tile's first row of each expert."""
    k_all = tl.arange(0, BLOCK_K)[None, :]
    row_of = first[None, :] + tl.cumsum(count, 0) - count
    for k in range(TOPK):
        pick = tl.sum(tl.where(k_all == k, ids, 0), 1)
        mine = e[None, :] == pick[:, None]
        row = tl.sum(tl.where(mine, row_of, 0), 1)
        row_of += mine.to(tl.int32)  # an expert given twice
        tl.store(ScatterIndices + t * TOPK + k, row, mask=inside)
        tl.store(GatherIndices + row, t, mask=inside)


@triton.jit
def _store_hist(ExpertHist, ExpertOffs, total, e, EXPERTS: tl.constexpr):
    through = tl.cumsum(total, 0)
    tl.store(ExpertHist + e, total, mask=e < EXPERTS)
    tl.store(ExpertOffs + e, through - total, mask=e < EXPERTS)
    tl.store(ExpertOffs + 1 + e, through, mask=e == EXPERTS - 1)


@triton.jit(do_not_specialize=["tokens"])
def _routing_fwd_kernel(
    X, Weight, Bias, CorrectionBias, GivenIds, Logits, TopkWeights, TopkIds, TileHist, ExpertHist,
    ExpertOffs, GatherIndices, ScatterIndices, stride_x_t, tokens, HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr,
    SINGLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside, expert = t < tokens, e < EXPERTS
    at = t[:, None] * EXPERTS + e[None, :]
    known = inside[:, None] & expert[None, :]
    if X is not None:
        logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        h = tl.arange(0, BLOCK_H)
        x_rows = X + t[:, None] * stride_x_t
        for begin in range(0, HIDDEN, BLOCK_H):
            x = tl.load(
                x_rows + begin + h[None, :],
                mask=inside[:, None] & (begin + h < HIDDEN)[None, :], other=0,
            )  # fmt: skip
            weight = tl.load(
                Weight + e[None, :] * HIDDEN + begin + h[:, None],
                mask=expert[None, :] & (begin + h < HIDDEN)[:, None], other=0,
            )  # fmt: skip
            logits = tl.dot(x, weight, logits, input_precision="ieee")
        if Bias is not None:
            logits += tl.load(Bias + e, mask=expert, other=0).to(tl.float32)[None, :]
        tl.store(Logits + at, logits, mask=known)
    else:
        logits = tl.load(Logits + at, mask=known, other=0)
    choice = logits
    if CorrectionBias is not None:
        correction = tl.load(CorrectionBias + e, mask=expert, other=0).to(tl.float32)
        choice = 1 / (1 + tl.exp(-logits)) + correction[None, :]
    ids, chosen = _choose(logits, choice, GivenIds, t, e, inside, EXPERTS, TOPK, BLOCK_K)
    weights = _weigh(logits, chosen, e, EXPERTS, TOPK, BLOCK_K, SCORING, RENORMALIZE)
    slot = t[:, None] * TOPK + k[None, :]
    real = inside[:, None] & (k < TOPK)[None, :]
    tl.store(TopkWeights + slot, weights, mask=real)
    tl.store(TopkIds + slot, ids, mask=real)
    count = _slots(ids, inside, e, TOPK, BLOCK_K)
    total = tl.sum(count, 0)
    if SINGLE:
        _store_hist(ExpertHist, ExpertOffs, total, e, EXPERTS)
        first = tl.cumsum(total, 0) - total
        _place(GatherIndices, ScatterIndices, ids, count, first, t, inside, e, TOPK, BLOCK_K)
    else:
        tl.store(TileHist + tile * EXPERTS + e, total, mask=expert)


@triton.jit(do_not_specialize=["tokens"])
def _routing_hist_kernel(
    TopkIds, TileHist, tokens, EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = t < tokens
    real = inside[:, None] & (k < TOPK)[None, :]
    ids = tl.load(TopkIds + t[:, None] * TOPK + k[None, :], mask=real, other=0)
    total = tl.sum(_slots(ids, inside, e, TOPK, BLOCK_K), 0)
    tl.store(TileHist + tile * EXPERTS + e, total, mask=e < EXPERTS)


@triton.jit(do_not_specialize=["tiles"])
def _routing_scan_kernel(TileHist, tiles, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Each tile's count of one expert becomes that of the tiles before; the last row the total."""
    e = tl.program_id(0)
    before = 0
    for begin in range(0, tiles, BLOCK):
        tile = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        count = tl.load(TileHist + tile * EXPERTS + e, mask=tile < tiles, other=0)
        tl.store(
            TileHist + tile * EXPERTS + e, before + tl.cumsum(count, 0) - count, mask=tile < tiles
        )
        before += tl.sum(count, 0)
    tl.store(TileHist + tiles.to(tl.int64) * EXPERTS + e, before)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _routing_order_kernel(
    TopkIds, TileHist, ExpertHist, ExpertOffs, GatherIndices, ScatterIndices, tokens, tiles,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr, SCANNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside, expert = t < tokens, e < EXPERTS
    if SCANNED:
        before = tl.load(TileHist + tile * EXPERTS + e, mask=expert, other=0)
        last = TileHist + tiles.to(tl.int64) * EXPERTS
        total = tl.load(last + e, mask=expert, other=0)
    else:
        before = tl.zeros([BLOCK_E], tl.int32)
        total = tl.zeros([BLOCK_E], tl.int32)
        for begin in range(0, tiles, CHUNK):
            other = begin + tl.arange(0, CHUNK)
            count = tl.load(
                TileHist + other[:, None] * EXPERTS + e[None, :],
                mask=(other < tiles)[:, None] & expert[None, :], other=0,
            )  # fmt: skip
            total += tl.sum(count, 0)
            before += tl.sum(tl.where((other < tile)[:, None], count, 0), 0)
    if tile == 0:
        _store_hist(ExpertHist, ExpertOffs, total, e, EXPERTS)
    real = inside[:, None] & (k < TOPK)[None, :]
    ids = tl.load(TopkIds + t[:, None] * TOPK + k[None, :], mask=real, other=0)
    count = _slots(ids, inside, e, TOPK, BLOCK_K)
    first = tl.cumsum(total, 0) - total + before
    _place(GatherIndices, ScatterIndices, ids, count, first, t, inside, e, TOPK, BLOCK_K)


INTERPRETED = not isinstance(_routing_fwd_kernel, triton.JITFunction)


def check_supported(x: torch.Tensor, num_experts: int) -> None:
    """Raise Unsupported, before any work, for what these kernels cannot do."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise Unsupported("Triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if x.dtype.is_floating_point and x.dtype not in DTYPES:
        raise Unsupported(f"x of {x.dtype} in Triton")
    if num_experts > MAX_EXPERTS:
        raise Unsupported(f"{num_experts} experts in Triton, at most {MAX_EXPERTS}")


def _tile(like: torch.Tensor, tokens: int, num_experts: int, topk: int) -> tiles.Tile:
    """What the launches over tiles of tokens share."""
    block_e = max(16, triton.next_power_of_2(num_experts))
    key = "wide" if block_e > WIDE else "few" if tokens <= 16 * FEW_TILES else "many"
    return {
        **tiles.choose("routing", like, key),
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(topk),
    }


def _order_outputs(slots: int, num_experts: int, device) -> dict[str, torch.Tensor]:
    sizes = {
        "ExpertHist": num_experts,
        "ExpertOffs": num_experts + 1,
        "GatherIndices": slots,
        "ScatterIndices": slots,
    }
    return {n: torch.empty(s, dtype=torch.int32, device=device) for n, s in sizes.items()}


def _sort_tiles(topk_ids, tile_hist, order, tile) -> None:
    """The launches after every tile's counts are known."""
    (tokens, topk), num_experts = topk_ids.shape, tile_hist.shape[1]
    count = tile_hist.shape[0] - 1
    if count > FEW_TILES:
        _routing_scan_kernel[(num_experts,)](
            TileHist=tile_hist, tiles=count, EXPERTS=num_experts, BLOCK=1024, num_warps=4
        )
    _routing_order_kernel[(max(count, 1),)](
        TopkIds=topk_ids,
        TileHist=tile_hist,
        **order,
        tokens=tokens,
        tiles=count,
        EXPERTS=num_experts,
        TOPK=topk,
        SCANNED=count > FEW_TILES,
        **tiles.choose("routing_order", topk_ids, *(["wide"] if tile["BLOCK_E"] > WIDE else [])),
        **tile,
    )


def _forward(x, weight, bias, logits, correction_bias, topk_ids, topk, scoring, renormalize):
    tokens, num_experts = logits.shape
    check_supported(logits if x is None else x, num_experts)
    device = logits.device
    weights = torch.empty(tokens, topk, dtype=torch.float32, device=device)
    ids = torch.empty(tokens, topk, dtype=torch.int32, device=device)
    order = _order_outputs(tokens * topk, num_experts, device)
    tile = _tile(logits, tokens, num_experts, topk)
    count = triton.cdiv(tokens, tile["BLOCK_T"])
    single = count <= 1
    shape = (1 if single else count + 1, num_experts)
    tile_hist = torch.empty(shape, dtype=torch.int32, device=device)
    columns = "wide" if tile["BLOCK_E"] > WIDE else str(tiles.bits(logits if x is None else x))
    with torch.cuda.device_of(logits):
        _routing_fwd_kernel[(max(count, 1),)](
            X=x,
            Weight=weight,
            Bias=bias,
            CorrectionBias=correction_bias,
            GivenIds=topk_ids,
            Logits=logits,
            TopkWeights=weights,
            TopkIds=ids,
            TileHist=tile_hist,
            **order,
            stride_x_t=0 if x is None else x.stride(0),
            tokens=tokens,
            HIDDEN=0 if x is None else x.shape[1],
            EXPERTS=num_experts,
            TOPK=topk,
            SCORING=SCORING_CODES[scoring],
            RENORMALIZE=renormalize,
            SINGLE=single,
            **tiles.choose("routing_fwd", logits, columns),
            **tile,
        )
        if not single:
            _sort_tiles(ids, tile_hist, order, tile)
    return weights, ids, *order.values()


def _rows(x):
    """x itself where its rows are contiguous, however far apart."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(t):
    return t if t is None else t.contiguous()


def routing_fwd(x, weight, bias, correction_bias, topk_ids, topk, scoring, renormalize):
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    routed = _forward(
        _rows(x), weight.contiguous(), _contiguous(bias), logits, _contiguous(correction_bias),
        _contiguous(topk_ids), topk, scoring, renormalize,
    )  # fmt: skip
    return *routed, logits


def routing_logits_fwd(logits, correction_bias, topk_ids, topk, scoring, renormalize):
    if logits.dtype != torch.float32:
        raise Unsupported(f"logits of {logits.dtype} in Triton")
    return _forward(
        None, None, None, logits.contiguous(), _contiguous(correction_bias),
        _contiguous(topk_ids), topk, scoring, renormalize,
    )  # fmt: skip


def routing_sort(topk_ids, num_experts):
    check_supported(topk_ids, num_experts)
    topk_ids = topk_ids.contiguous()
    tokens, topk = topk_ids.shape
    order = _order_outputs(tokens * topk, num_experts, topk_ids.device)
    tile = _tile(topk_ids, tokens, num_experts, topk)
    count = triton.cdiv(tokens, tile["BLOCK_T"])
    tile_hist = torch.empty(count + 1, num_experts, dtype=torch.int32, device=topk_ids.device)
    with torch.cuda.device_of(topk_ids):
        if count > 0:
            _routing_hist_kernel[(count,)](
                TopkIds=topk_ids,
                TileHist=tile_hist,
                tokens=tokens,
                EXPERTS=num_experts,
                TOPK=topk,
                **tile,
            )
        _sort_tiles(topk_ids, tile_hist, order, tile)
    return tuple(order.values())


def routing_logits_bwd(d_topk_weights, topk_weights, topk_ids, logits, scoring, renormalize):
    check_supported(logits, logits.shape[1])
    if logits.dtype != torch.float32:
        raise Unsupported(f"logits of {logits.dtype} in Triton")
    return d_logits_of(
        d_topk_weights.contiguous(), None, topk_weights, topk_ids, logits.contiguous(),
        SCORING_CODES[scoring], renormalize,
    )  # fmt: skip


def routing_bwd(
    d_topk_weights, d_logits, x, weight, bias, topk_weights, topk_ids, logits, scoring, renormalize,
    wanted,
):  # fmt: skip
    check_supported(x, logits.shape[1])
    d = d_logits_of(
        _contiguous(d_topk_weights), _contiguous(d_logits), topk_weights, topk_ids, logits,
        SCORING_CODES[scoring], renormalize,
    )  # fmt: skip
    empty = x.new_empty(0)
    return (
        d_x_of(d, weight.contiguous(), x) if wanted[0] else empty,
        d_weight_of(d, _rows(x), weight) if wanted[1] else empty,
        d.sum(0).to(bias.dtype) if wanted[2] else empty,
    )


def _launch_meta(dtype, tokens, num_experts, topk, scoring, renormalize) -> None:
    x = torch.empty(tokens, 2880, dtype=dtype, device="meta")
    weight = torch.empty(num_experts, 2880, dtype=dtype, device="meta")
    bias = torch.empty(num_experts, dtype=dtype, device="meta")
    correction_bias = torch.empty(num_experts, device="meta") if scoring == "sigmoid" else None
    options = (topk, scoring, renormalize)
    weights, ids, *_, logits = routing_fwd(x, weight, bias, correction_bias, None, *options)
    saved = (weights, ids, logits, scoring, renormalize)
    routing_bwd(weights, logits, x, weight, bias, *saved, [True] * 3)


def _launch_given_meta(tokens, num_experts, topk, scoring, renormalize) -> None:
    logits = torch.empty(tokens, num_experts, device="meta")
    weights, ids, *_ = routing_logits_fwd(logits, None, None, topk, scoring, renormalize)
    routing_logits_fwd(logits, None, ids, topk, scoring, renormalize)
    routing_sort(ids, num_experts)
    routing_logits_bwd(weights, weights, ids, logits, scoring, renormalize)


def aot_kernels() -> Iterator[aot.AotKernel]:
    """The launches of gpt-oss, Qwen3-MoE, DeepSeek-V3 and Mixtral."""
    for dtype, tokens, num_experts, *options in (
        (torch.bfloat16, 2048, 32, 4, "topk_softmax", True),
        (torch.bfloat16, 1, 32, 4, "topk_softmax", True),
        (torch.float32, 2048, 32, 4, "topk_softmax", True),
        (torch.float32, 16384, 128, 8, "softmax_topk", False),
        (torch.bfloat16, 16384, 256, 8, "sigmoid", True),
        (torch.float16, 16384, 8, 2, "softmax_topk", True),
    ):
        name, quick = f"{tokens}-{num_experts}", num_experts == 32
        backward = aot.FEW_ROWS if dtype == torch.bfloat16 else "ieee"
        for family, cards in tiles.each_family():
            yield from aot.record(
                f"{str(dtype).removeprefix('torch.')}-{name}-{family}",
                functools.partial(_launch_meta, dtype, tokens, num_experts, *options),
                products={
                    "_routing_fwd_kernel": "ieee" if dtype == torch.float32 else aot.FEW_ROWS,
                    "_routing_d_x_kernel": backward,
                    "_routing_d_weight_kernel": backward,
                },
                quick=quick,
                cards=cards,
            )
            yield from aot.record(
                f"given-{name}-{family}",
                functools.partial(_launch_given_meta, tokens, num_experts, *options),
                products={},
                quick=quick,
                cards=cards,
            )
