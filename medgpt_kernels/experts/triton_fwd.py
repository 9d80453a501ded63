"""The experts in Triton: the forward pass, two or three launches, and what both passes share.

T tokens, K experts a token, S = T K rows sorted by expert, E experts, H hidden, I intermediate,
R rank. gate_up with its activation makes hidden [S, I], down makes rows [S, H], and combine sums
each token's rows by their routing weights: gathers only, no atomics. For a few tokens one launch
does the work of the last two. A tile of gate_up holds gates and ups by turns, whatever the layout
in memory, so that one product serves both. The low-rank products x A^T [S, R] are launches of their
own; B joins the product that it adds to.
"""

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.experts.triton_gemm import (
    check_supported,
    choose,
    experts_block,
    find_expert,
    find_rows,
    find_tile,
    low_rank_arguments,
    narrowed,
    product,
    row_tiles,
    weight,
)
from medgpt_kernels.experts.triton_unpack import how_to_unpack
from medgpt_kernels.rotary.triton import index_dtype, rows

FEW_TOKENS = 4  # up to here one launch for the down projection and the sum over experts
PRECISION = {"INPUT_PRECISION": "ieee"}


@triton.jit
def gate_and_sigmoid(gate, alpha):
    """The gate, 0 where closed (a half that overflowed is -inf), and sigmoid(alpha gate)."""
    sigmoid = tl.sigmoid(alpha * gate)
    return tl.where(sigmoid == 0, 0.0, gate), sigmoid


@triton.jit
def activate(gate, up, alpha, limit, PLAIN: tl.constexpr):
    """silu(gate) up, or (up + 1) gate sigmoid(alpha gate) of the clamped; NaN stays NaN."""
    if PLAIN:
        gate, sigmoid = gate_and_sigmoid(gate, 1.0)
        out = gate * sigmoid * up
    else:
        gate, sigmoid = gate_and_sigmoid(tl.where(gate > limit, limit, gate), alpha)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        out = (up + 1) * (gate * sigmoid)
    return out


@triton.jit
def _over(pre, is_gate, limit):
    """What the clamp changes: gates above the limit, ups beyond it on either side."""
    return tl.where(is_gate[None, :], pre, tl.abs(pre)) > limit


@triton.jit
def _same_side(pre, kept, is_gate, limit):
    """`pre` rounded to `kept`, but on its own side of the limit: the gradient's mask is there."""
    if kept.dtype != tl.float32:
        over = _over(pre, is_gate, limit).to(tl.int16)
        kept_over = _over(kept.to(tl.float32), is_gate, limit).to(tl.int16)
        kept = (kept.to(tl.int16, bitcast=True) + over - kept_over).to(kept.dtype, bitcast=True)
    return kept


@triton.jit
def _experts_gate_up_kernel(
    Hidden,
    PreActivation,
    X,
    W,
    Scales,
    Bias,
    LowRank,
    Expand,
    ExpertOffs,
    GatherIndices,
    stride_x_t,
    stride_w_e,
    stride_w_k,
    stride_w_n,
    stride_scales_e,
    stride_scales_row,
    stride_expand_e,
    stride_expand_r,
    stride_expand_n,
    num_experts,
    depth,
    width,
    rank,
    scaling,
    alpha,
    limit,
    PLAIN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PACKED: tl.constexpr,
    UNPACK: tl.constexpr,
    EVEN_K: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(width, BLOCK_N)
    expert, first, end = find_tile(
        tl.program_id(0) // tiles_n, ExpertOffs, num_experts, BLOCK_E, BLOCK_M
    )
    if expert >= num_experts:
        return
    row, token, inside = find_rows(first, end, GatherIndices, BLOCK_M)
    half = width // 2
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    column = n
    if not INTERLEAVED:
        column = tl.where(n < width, n % 2 * half + n // 2, width)
    e = expert.to(tl.int64)
    low_rank_rows = row
    if LowRank is not None:
        low_rank_rows = LowRank + row.to(INDEX) * rank
        Expand += e * stride_expand_e
    if Scales is not None:
        Scales += e * stride_scales_e
    pre = product(
        X + token.to(INDEX) * stride_x_t, W + e * stride_w_e, Scales, n0, column, width, depth,
        stride_w_k, stride_w_n, stride_scales_row, low_rank_rows, Expand, rank, scaling,
        stride_expand_r, stride_expand_n, PACKED, UNPACK, EVEN_K, INPUT_PRECISION, BLOCK_K,
        BLOCK_R,
    )  # fmt: skip
    if Bias is not None:
        pre += tl.load(Bias + e * width + column, mask=n < width, other=0).to(tl.float32)[None, :]
    if PreActivation is not None:
        kept = pre.to(PreActivation.dtype.element_ty)
        if not PLAIN:
            kept = _same_side(pre, kept, n % 2 == 0, limit)
        tl.store(
            PreActivation + row.to(INDEX)[:, None] * width + column[None, :],
            kept,
            mask=inside[:, None] & (n < width)[None, :],
        )
    gate, up = tl.split(tl.reshape(pre, [BLOCK_M, BLOCK_N // 2, 2]))
    i = n0 // 2 + tl.arange(0, BLOCK_N // 2)
    tl.store(
        Hidden + row.to(INDEX)[:, None] * half + i[None, :],
        activate(gate, up, alpha, limit, PLAIN).to(Hidden.dtype.element_ty),
        mask=inside[:, None] & (i < half)[None, :],
    )


@triton.jit
def _experts_rows_kernel(
    Out,
    X,
    W,
    Scales,
    Bias,
    LowRank,
    Expand,
    ExpertOffs,
    GatherIndices,
    stride_x_t,
    stride_w_e,
    stride_w_k,
    stride_w_n,
    stride_scales_e,
    stride_scales_row,
    stride_expand_e,
    stride_expand_r,
    stride_expand_n,
    num_experts,
    depth,
    width,
    rank,
    scaling,
    PACKED: tl.constexpr,
    UNPACK: tl.constexpr,
    EVEN_K: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(width, BLOCK_N)
    expert, first, end = find_tile(
        tl.program_id(0) // tiles_n, ExpertOffs, num_experts, BLOCK_E, BLOCK_M
    )
    if expert >= num_experts:
        return
    row, source, inside = find_rows(first, end, GatherIndices, BLOCK_M)
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    e = expert.to(tl.int64)
    low_rank_rows = row
    if LowRank is not None:
        low_rank_rows = LowRank + row.to(INDEX) * rank
        Expand += e * stride_expand_e
    if Scales is not None:
        Scales += e * stride_scales_e
    out = product(
        X + source.to(INDEX) * stride_x_t, W + e * stride_w_e, Scales, n0, n, width, depth,
        stride_w_k, stride_w_n, stride_scales_row, low_rank_rows, Expand, rank, scaling,
        stride_expand_r, stride_expand_n, PACKED, UNPACK, EVEN_K, INPUT_PRECISION, BLOCK_K,
        BLOCK_R,
    )  # fmt: skip
    if Bias is not None:
        out += tl.load(Bias + e * width + n, mask=n < width, other=0).to(tl.float32)[None, :]
    tl.store(
        Out + row.to(INDEX)[:, None] * width + n[None, :],
        out.to(Out.dtype.element_ty),
        mask=inside[:, None] & (n < width)[None, :],
    )


@triton.jit(do_not_specialize=["tokens"])
def _experts_combine_kernel(
    Out,
    Rows,
    TopkWeights,
    ScatterIndices,
    tokens,
    hidden,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = token < tokens
    mask = inside[:, None] & (h < hidden)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for k in range(TOPK):
        row = tl.load(ScatterIndices + token * TOPK + k, mask=inside, other=0).to(tl.int64)
        value = tl.load(Rows + row[:, None] * hidden + h[None, :], mask=mask, other=0)
        value = value.to(tl.float32)
        if TopkWeights is not None:
            value *= tl.load(TopkWeights + token * TOPK + k, mask=inside, other=0)[:, None]
        total += value
    where = Out + token[:, None] * hidden + h[None, :]
    tl.store(where, total.to(Out.dtype.element_ty), mask=mask)


@triton.jit
def _experts_down_token_kernel(
    Out,
    X,
    W,
    Scales,
    Bias,
    LowRank,
    Expand,
    ExpertOffs,
    TopkWeights,
    ScatterIndices,
    stride_x_t,
    stride_w_e,
    stride_w_k,
    stride_w_n,
    stride_scales_e,
    stride_scales_row,
    stride_expand_e,
    stride_expand_r,
    stride_expand_n,
    num_experts,
    depth,
    width,
    rank,
    scaling,
    TOPK: tl.constexpr,
    PACKED: tl.constexpr,
    UNPACK: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(width, BLOCK_N)
    token = tl.program_id(0) // tiles_n
    n0 = tl.program_id(0) % tiles_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)  # the token's one row, repeated to what a product needs
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(TOPK):
        row = tl.load(ScatterIndices + token * TOPK + k)
        e = find_expert(row, ExpertOffs, num_experts, BLOCK_E).to(tl.int64)
        scales = Scales
        expand = Expand
        low_rank_rows = m
        if Scales is not None:
            scales += e * stride_scales_e
        if LowRank is not None:
            low_rank_rows = LowRank + row * rank + m * 0
            expand += e * stride_expand_e
        out = product(
            X + row * stride_x_t + m * 0, W + e * stride_w_e, scales, n0, n, width, depth,
            stride_w_k, stride_w_n, stride_scales_row, low_rank_rows, expand, rank, scaling,
            stride_expand_r, stride_expand_n, PACKED, UNPACK, EVEN_K, INPUT_PRECISION, BLOCK_K,
            BLOCK_R,
        )  # fmt: skip
        if Bias is not None:
            out += tl.load(Bias + e * width + n, mask=n < width, other=0).to(tl.float32)[None, :]
        total += out * tl.load(TopkWeights + token * TOPK + k)
    tl.store(
        Out + token * width + n[None, :] + m[:, None] * 0,
        total.to(Out.dtype.element_ty),
        mask=(m == 0)[:, None] & (n < width)[None, :],
    )


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


class Call:
    """One call's tensors as its kernels want them."""

    def __init__(
        self, x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj,
        gate_up_scales, gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a,
        gate_up_lora_b, down_lora_a, down_lora_b, activation, gate_up_layout, weight_layout, alpha,
        limit, lora_scaling,
    ):  # fmt: skip
        check_supported(x, topk_weights, gate_up_proj, down_proj, gate_up_lora_a, gate_up_lora_b,
                        down_lora_a, down_lora_b)  # fmt: skip
        self.x, self.topk_weights = rows(x), topk_weights.contiguous()
        self.expert_offs, self.gather = expert_offs.contiguous(), gather_indices.contiguous()
        self.scatter = scatter_indices.contiguous()
        self.gate_up, self.gate_up_scales = gate_up_proj, gate_up_scales
        self.down, self.down_scales = down_proj, down_scales
        self.gate_up_bias, self.down_bias = dense(gate_up_proj_bias), dense(down_proj_bias)
        self.gate_up_a, self.gate_up_b = gate_up_lora_a, gate_up_lora_b
        self.down_a, self.down_b = down_lora_a, down_lora_b
        self.in_out = weight_layout == "in_out"
        self.scaling = lora_scaling
        self.num_experts, self.rows = len(expert_offs) - 1, len(gather_indices)
        self.topk = topk_weights.shape[1]
        self.hidden = x.shape[1]
        self.intermediate = weight(down_proj, down_scales, self.in_out).depth
        self.activation = {"PLAIN": activation == "swiglu", "alpha": alpha, "limit": limit}
        self.interleaved = gate_up_layout == "interleaved"

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device)

    def tile(self, kernel: str, packed: bool, *marks: str) -> tiles.Tile:
        return choose(kernel, self.x, self.rows, self.num_experts, packed, *marks)

    def product(self, x, weights, low_rank, tile, bias=None) -> dict:
        """The arguments that every kernel with a product of x and these weights shares."""
        low_rank = low_rank or low_rank_arguments(None, None, False, 0.0)
        return {
            "X": x,
            "Bias": bias,
            "ExpertOffs": self.expert_offs,
            "stride_x_t": x.stride(0),
            "num_experts": self.num_experts,
            "EVEN_K": weights.depth % tile["BLOCK_K"] == 0,
            "BLOCK_E": experts_block(self.num_experts),
            "UNPACK": how_to_unpack(x.dtype, tiles.card_family(x)),
            **weights.arguments(),
            **low_rank,
            **tile,
            **PRECISION,
        }

    def launch(self, kernel, x, weights, low_rank, *, gathered, tile, bias=None, **arguments):
        """One grouped product: a program for each tile of rows and columns."""
        tiles_n = triton.cdiv(weights.width, tile["BLOCK_N"])
        kernel[(row_tiles(self.rows, self.num_experts, tile["BLOCK_M"]) * tiles_n,)](
            GatherIndices=self.gather if gathered else None,
            **self.product(x, weights, low_rank, tile, bias),
            **arguments,
        )

    def multiply(self, x, weights, *, gathered, bias=None, low_rank=None, dtype=None):
        """rows x W (+ bias, + the low-rank addition), [S, width]."""
        out = self.empty(self.rows, weights.width, dtype=dtype)
        added = low_rank is not None and low_rank["LowRank"] is not None
        marks = ("lora",) if added else ()
        tile = self.tile("experts_rows", weights.scales is not None, *marks)
        self.launch(
            _experts_rows_kernel,
            x,
            weights,
            low_rank,
            gathered=gathered,
            tile=narrowed(tile, weights.width),
            bias=bias,
            Out=out,
            INDEX=index_dtype(x, out),
        )
        return out

    def shrink(self, x, matrix, in_out: bool, *, gathered: bool):
        """The low-rank rows [S, R] of a LoRA pair in fp32, None where it has no matrix."""
        if matrix is None:
            return None
        weights = weight(matrix, None, in_out)
        return self.multiply(x, weights, gathered=gathered, dtype=torch.float32)

    def low_rank(self, low_rank_rows, expand, transposed: bool) -> dict:
        return low_rank_arguments(low_rank_rows, expand, transposed, self.scaling)

    def combine(self, sorted_rows, topk_weights=None):
        """Each token's rows summed, by their weights where there are some: [T, H]."""
        out = self.empty(*self.x.shape)
        config = tiles.choose("experts_combine", out)
        tiles_t = triton.cdiv(len(out), config["BLOCK_T"])
        tiles_h = triton.cdiv(self.hidden, config["BLOCK_H"])
        _experts_combine_kernel[(tiles_t, tiles_h)](
            Out=out,
            Rows=sorted_rows,
            TopkWeights=topk_weights,
            ScatterIndices=self.scatter,
            tokens=len(out),
            hidden=self.hidden,
            TOPK=self.topk,
            **config,
        )
        return out

    def down_token(self, x, weights, low_rank):
        """As multiply and combine, in one launch of a program for each token and its columns."""
        out = self.empty(*self.x.shape)
        tile = tiles.choose("experts_down_token", x, str(tiles.bits(x)))
        _experts_down_token_kernel[(len(out) * triton.cdiv(weights.width, tile["BLOCK_N"]),)](
            Out=out,
            TopkWeights=self.topk_weights,
            ScatterIndices=self.scatter,
            TOPK=self.topk,
            **self.product(x, weights, low_rank, tile, self.down_bias),
        )
        return out


def experts_fwd(
    x,
    topk_weights,
    expert_offs,
    gather_indices,
    scatter_indices,
    gate_up_proj,
    gate_up_scales,
    gate_up_proj_bias,
    down_proj,
    down_scales,
    down_proj_bias,
    gate_up_lora_a,
    gate_up_lora_b,
    down_lora_a,
    down_lora_b,
    activation,
    gate_up_layout,
    weight_layout,
    alpha,
    limit,
    lora_scaling,
    keep_pre_activation,
):
    call = Call(
        x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj,
        gate_up_scales, gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a,
        gate_up_lora_b, down_lora_a, down_lora_b, activation, gate_up_layout, weight_layout, alpha,
        limit, lora_scaling,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        packed = gate_up_scales is not None
        weights = weight(call.gate_up, call.gate_up_scales, call.in_out)
        hidden = call.empty(call.rows, call.intermediate)
        pre_activation = call.empty(call.rows if keep_pre_activation else 0, weights.width)
        low = call.shrink(call.x, call.gate_up_a, False, gathered=True)
        marks = ("lora",) if low is not None else () if call.interleaved else ("concatenated",)
        call.launch(
            _experts_gate_up_kernel,
            call.x,
            weights,
            call.low_rank(low, call.gate_up_b, True),
            gathered=True,
            tile=call.tile("experts_gate_up", packed, *marks),
            bias=call.gate_up_bias,
            Hidden=hidden,
            PreActivation=pre_activation if keep_pre_activation else None,
            INTERLEAVED=call.interleaved,
            INDEX=index_dtype(call.x, hidden, pre_activation),
            **call.activation,
        )
        low = call.shrink(hidden, call.down_a, False, gathered=False)
        arguments = (hidden, weight(call.down, call.down_scales, call.in_out))
        low_rank = call.low_rank(low, call.down_b, True)
        if len(x) <= FEW_TOKENS:
            return call.down_token(*arguments, low_rank), pre_activation
        sorted_rows = call.multiply(
            *arguments, gathered=False, bias=call.down_bias, low_rank=low_rank
        )
        return call.combine(sorted_rows, call.topk_weights), pre_activation
