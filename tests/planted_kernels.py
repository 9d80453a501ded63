"""Kernels with one fault each, listed as an op lists its own: what the gate must report."""

import functools
import os

import torch
import triton
import triton.language as tl

from medgpt_kernels import aot


@triton.jit
def _product_kernel(
    Out, A, B, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """Out [M, N] = the sum of 64 products of A [M, K] and B [K, N]."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for step in range(64):
        a = tl.load(A + (m * 64 * K)[:, None] + step * K + k[None, :])
        b = tl.load(B + step * K * N + (k * N)[:, None] + n[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(Out + (m * N)[:, None] + n[None, :], acc)


@triton.jit
def _copy_kernel(Out, In, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Out + at, tl.load(In + at))


@triton.jit
def _broken_kernel(Out, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "planted")
    tl.store(Out, BLOCK)


class _Deadly(dict):
    """Options that end the process which reads them, as a crash of the compiler would."""

    def keys(self):
        os._exit(3)

    __iter__ = keys


def _product(precision, m, n, k, dtype=torch.float32, num_warps=4, num_stages=1):
    a = torch.empty(m, 64 * k, dtype=dtype, device="meta")
    b = torch.empty(64 * k, n, dtype=dtype, device="meta")
    out = torch.empty(m, n, device="meta")
    _product_kernel[(1,)](
        out, a, b, PRECISION=precision, M=m, N=n, K=k, num_warps=num_warps, num_stages=num_stages
    )


def _copy(block=128):
    x = torch.empty(block, device="meta")
    _copy_kernel[(1,)](x, x, BLOCK=block)


half = functools.partial(_product, "ieee", dtype=torch.bfloat16)
PLANTED = {
    "sound": ("half", functools.partial(half, 64, 64, 32)),
    "tf32": ("ieee", functools.partial(_product, "tf32", 64, 64, 16)),
    "tf32-declared-x3": ("tf32x3", functools.partial(_product, "tf32", 64, 64, 32)),
    "sound-x3": ("tf32x3", functools.partial(_product, "tf32x3", 64, 64, 16)),
    "spill": ("half", functools.partial(half, 256, 256, 32, num_warps=4)),
    "spill-amd": ("half", functools.partial(half, 512, 256, 32, num_warps=4)),
    "shared": ("half", functools.partial(half, 128, 256, 64, num_warps=8, num_stages=6)),
    "few-rows": ("half", functools.partial(half, 32, 64, 32)),
    "undeclared": ("none", functools.partial(half, 64, 64, 64)),
    "no-product": ("half", _copy),
}


def aot_kernels():
    """One kernel a fault, and sound ones between them."""
    for variant, (products, call) in PLANTED.items():
        names = {"_product_kernel": products, "_copy_kernel": products}
        yield from aot.record(variant, call, names)
    out = torch.empty(1, device="meta")
    yield from aot.record("broken", lambda: _broken_kernel[(1,)](out, BLOCK=1), {})
    for kernel in aot.record("deadly", functools.partial(_copy, 256), {}):
        yield kernel._replace(options=_Deadly(num_warps=4))
