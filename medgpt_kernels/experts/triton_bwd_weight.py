"""Gradients of the experts' weights, biases and LoRA matrices in Triton.

S rows sorted by expert, E experts, I inputs and O outputs of a weight. A program owns one tile of
one expert and runs over that expert's rows: no atomics, and empty experts get their zeros.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.experts.triton_fwd import PRECISION
from medgpt_kernels.rotary.triton import index_dtype


@triton.jit
def _load_rows(
    Rows, row, inside, GatherIndices, Weights, column, columns, stride, INDEX: tl.constexpr
):
    """Sorted rows [S, N], or rows gathered by token; fp32 and weighted where there are Weights."""
    source = row
    if GatherIndices is not None:
        source = tl.load(GatherIndices + row, mask=inside, other=0)
    mask = inside[:, None] & (column < columns)[None, :]
    value = tl.load(Rows + source.to(INDEX)[:, None] * stride + column[None, :], mask=mask, other=0)
    if Weights is not None:
        scale = tl.load(Weights + row, mask=inside, other=0)
        value = value.to(tl.float32) * scale[:, None]
    return value


@triton.jit
def _experts_bwd_weight_kernel(
    DWeight,
    X,
    DOut,
    GatherX,
    GatherD,
    Weights,
    ExpertOffs,
    stride_x_s,
    stride_d_out_s,
    inputs,
    outputs,
    scale,
    OUT_IN: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tiles_i = tl.cdiv(inputs, BLOCK_I)
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    i = tl.program_id(0) % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.program_id(0) // tiles_i % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    expert = tl.program_id(0) // tiles_i // tiles_o
    end = tl.load(ExpertOffs + expert + 1)
    DTYPE: tl.constexpr = DWeight.dtype.element_ty
    if OUT_IN:
        acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        where = o[:, None] * inputs + i[None, :]
        mask = (o < outputs)[:, None] & (i < inputs)[None, :]
    else:
        acc = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
        where = i[:, None] * outputs + o[None, :]
        mask = (i < inputs)[:, None] & (o < outputs)[None, :]
    for s in range(tl.load(ExpertOffs + expert), end, BLOCK_S):
        row = s + tl.arange(0, BLOCK_S)
        inside = row < end
        x = _load_rows(X, row, inside, GatherX, None, i, inputs, stride_x_s, INDEX).to(DTYPE)
        d = _load_rows(DOut, row, inside, GatherD, Weights, o, outputs, stride_d_out_s, INDEX)
        d = d.to(DTYPE)
        if OUT_IN:
            acc = tl.dot(tl.trans(d), x, acc, input_precision=INPUT_PRECISION)
        else:
            acc = tl.dot(tl.trans(x), d, acc, input_precision=INPUT_PRECISION)
    out = (acc * scale).to(DWeight.dtype.element_ty)
    tl.store(DWeight + expert.to(tl.int64) * inputs * outputs + where, out, mask=mask)


@triton.jit
def _experts_bwd_bias_kernel(
    DBias,
    DOut,
    GatherD,
    Weights,
    ExpertOffs,
    stride_d_out_s,
    outputs,
    INDEX: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    o = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    expert = tl.program_id(0) // tiles_o
    end = tl.load(ExpertOffs + expert + 1)
    total = tl.zeros([BLOCK_S, BLOCK_O], tl.float32)
    for s in range(tl.load(ExpertOffs + expert), end, BLOCK_S):
        row = s + tl.arange(0, BLOCK_S)
        d = _load_rows(DOut, row, row < end, GatherD, Weights, o, outputs, stride_d_out_s, INDEX)
        total += d.to(tl.float32)
    out = tl.sum(total, 0).to(DBias.dtype.element_ty)
    tl.store(DBias + expert.to(tl.int64) * outputs + o, out, mask=o < outputs)


class Operand(NamedTuple):
    """Rows [S, N] as sorted, or a token's [T, N] to gather; times routing weights where given."""

    rows: torch.Tensor
    gather: torch.Tensor | None = None
    weights: torch.Tensor | None = None


def weight_gradient(call, x: Operand, d_out: Operand, *, out_in: bool, scale: float = 1.0):
    """x^T d_out of each expert as [E, in, out] or [E, out, in]."""
    inputs, outputs = x.rows.shape[1], d_out.rows.shape[1]
    config = tiles.choose("experts_bwd_weight", call.x, str(tiles.bits(call.x)))
    name, columns = ("BLOCK_I", inputs) if out_in else ("BLOCK_O", outputs)
    if columns < config[name]:
        config[name] = max(16, triton.next_power_of_2(columns))
        config["num_warps"] = min(config["num_warps"], 4)
        if call.x.dtype.itemsize == 2:
            config["BLOCK_S"] = max(config["BLOCK_S"], 64)
    out = call.empty(call.num_experts, *((outputs, inputs) if out_in else (inputs, outputs)))
    parts = triton.cdiv(inputs, config["BLOCK_I"]) * triton.cdiv(outputs, config["BLOCK_O"])
    _experts_bwd_weight_kernel[(call.num_experts * parts,)](
        DWeight=out,
        X=x.rows,
        DOut=d_out.rows,
        GatherX=x.gather,
        GatherD=d_out.gather,
        Weights=d_out.weights,
        ExpertOffs=call.expert_offs,
        stride_x_s=x.rows.stride(0),
        stride_d_out_s=d_out.rows.stride(0),
        inputs=inputs,
        outputs=outputs,
        scale=scale,
        OUT_IN=out_in,
        INDEX=index_dtype(x.rows, d_out.rows),
        **config,
        **PRECISION,
    )
    return out


def bias_gradient(call, d_out: Operand) -> torch.Tensor:
    """The sums of each expert's rows, [E, out]."""
    outputs = d_out.rows.shape[1]
    out = call.empty(call.num_experts, outputs)
    config = tiles.choose("experts_bwd_bias", out)
    _experts_bwd_bias_kernel[(call.num_experts * triton.cdiv(outputs, config["BLOCK_O"]),)](
        DBias=out,
        DOut=d_out.rows,
        GatherD=d_out.gather,
        Weights=d_out.weights,
        ExpertOffs=call.expert_offs,
        stride_d_out_s=d_out.rows.stride(0),
        outputs=outputs,
        INDEX=index_dtype(d_out.rows),
        **config,
    )
    return out
