"""Kernels whose ceiling is known on paper, for tests/test_static_model.py: one unit's work each."""

import functools

import torch
import triton
import triton.language as tl

from medgpt_kernels import aot


@triton.jit
def _paper_gemm_kernel(
    Out, X, W, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        x = tl.load(X + m[:, None] * depth + (k0 + k)[None, :])
        w = tl.load(W + (k0 + k)[:, None] * BLOCK_N + n[None, :])
        acc = tl.dot(x, w, acc)
    tl.store(Out + m[:, None] * BLOCK_N + n[None, :], acc.to(Out.dtype.element_ty))


@triton.jit
def _paper_exp2_kernel(Out, rounds, CHAINS: tl.constexpr):
    i = tl.arange(0, 32 * CHAINS)
    x = tl.load(Out + i)
    for _ in range(rounds):
        x = tl.exp2(x)
    tl.store(Out + i, x)


@triton.jit
def _paper_fma_kernel(Out, a, b, rounds, CHAINS: tl.constexpr):
    i = tl.arange(0, 32 * CHAINS)
    x = tl.load(Out + i)
    for _ in range(rounds):
        x = x * a + b
    tl.store(Out + i, x)


def _gemm(block_m: int, block_n: int, warps: int) -> None:
    out, x, w = (
        torch.empty(size, dtype=torch.bfloat16, device="meta")
        for size in ((block_m, block_n), (block_m, 4096), (4096, block_n))
    )
    _paper_gemm_kernel[(1,)](
        out, x, w, 4096, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, num_warps=warps, num_stages=3
    )


def _chains() -> None:
    """32 threads with 32 values each."""
    out = torch.empty(1024, dtype=torch.float32, device="meta")
    _paper_exp2_kernel[(1,)](out, 1000, CHAINS=32, num_warps=1)
    _paper_fma_kernel[(1,)](out, 0.5, 0.25, 1000, CHAINS=32, num_warps=1)


def aot_kernels():
    for block_m, block_n, warps in ((128, 256, 8), (64, 64, 4)):
        yield from aot.record(
            f"{block_m}-{block_n}",
            functools.partial(_gemm, block_m, block_n, warps),
            products={"_paper_gemm_kernel": "half"},
            quick=True,
        )
    yield from aot.record("chains", _chains, products={}, quick=True)
