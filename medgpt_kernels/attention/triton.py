"""Attention in Triton, for CUDA and ROCm: the launchers and what they compile."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from medgpt_kernels import aot, tiles
from medgpt_kernels.attention.triton_bwd import attention_bwd
from medgpt_kernels.attention.triton_fwd import attention_fwd

__all__ = ["aot_kernels", "attention_bwd", "attention_fwd"]


class Variant(NamedTuple):
    """One call that the gate compiles; what is not named is a full layer of gpt-oss."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 64
    heads: int = 64
    kv_heads: int = 8
    rotary_dim: int = 64
    window: tuple[int, int] = (-1, 0)
    sinks: bool = True
    packed: bool = True
    tokens: int = 4096


SIGLIP = {"heads": 16, "kv_heads": 16, "rotary_dim": 0, "window": (-1, -1), "sinks": False}
LLAMA = {"head_dim": 128, "heads": 32, "kv_heads": 8, "rotary_dim": 128, "sinks": False}
VARIANTS = (
    Variant(),
    Variant(window=(127, 0)),
    Variant(dtype=torch.float16, window=(127, 0), packed=False),
    Variant(head_dim=72, **SIGLIP),
    Variant(head_dim=72, packed=False, **SIGLIP),
    Variant(head_dim=80, heads=32, kv_heads=32, rotary_dim=32, sinks=False),
    Variant(head_dim=96, heads=32, kv_heads=8, rotary_dim=96, sinks=False),
    Variant(**LLAMA),
    Variant(**LLAMA | {"window": (127, 0)}),
    Variant(head_dim=256, heads=8, kv_heads=4, rotary_dim=256, window=(1023, 0), sinks=False),
    Variant(dtype=torch.float32),
    Variant(dtype=torch.float32, window=(127, 0)),
    Variant(dtype=torch.float32, head_dim=72, **SIGLIP),
    Variant(dtype=torch.float32, **LLAMA),
    Variant(dtype=torch.float32, head_dim=256, heads=8, kv_heads=4, rotary_dim=256, sinks=False),
    Variant(tokens=2**20),  # offsets pass 32 bits
)
QUICK = VARIANTS[:2]


def _launch(variant: Variant) -> None:
    """The forward and backward launchers on meta tensors."""
    lead = (variant.tokens,) if variant.packed else (4, variant.tokens)

    def meta(*size, dtype=variant.dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    q = meta(*lead, variant.heads, variant.head_dim)
    k, v = (meta(*lead, variant.kv_heads, variant.head_dim) for _ in range(2))
    table = None
    if variant.rotary_dim:
        table = meta(variant.tokens, variant.rotary_dim // 2, dtype=torch.float32)
    cu_seqlens = meta(9, dtype=torch.int32) if variant.packed else None
    arguments = (
        meta(variant.heads, dtype=torch.float32) if variant.sinks else None,
        table,
        table,
        None,
        cu_seqlens,
        cu_seqlens,
        variant.tokens,
        variant.tokens,
        *variant.window,
        variant.head_dim**-0.5,
        True,
    )
    out, lse = attention_fwd(q, k, v, *arguments)
    wanted = [True, True, True, variant.sinks]
    attention_bwd(q, None, q, k, v, out, lse, *arguments, wanted)


def aot_kernels() -> Iterator[aot.AotKernel]:
    """Every kernel of this op as its launchers would launch it on each family of cards."""
    for variant in VARIANTS:
        products = "ieee" if variant.dtype == torch.float32 else "half"
        name = "-".join(
            str(value).removeprefix("torch.").replace(" ", "")
            for value in variant._replace(
                sinks="sinks" if variant.sinks else "no_sinks",
                packed="packed" if variant.packed else "batched",
            )
        )
        for family, cards in tiles.each_family():
            # two gradients of 64 rows and 256 columns do not fit a warp group's registers
            small = family == "sm_90" and variant.head_dim > 128 and products == "half"
            backward = aot.FEW_ROWS if small else products
            yield from aot.record(
                f"{name}-{family}",
                functools.partial(_launch, variant),
                products={
                    "_attention_fwd_kernel": products,
                    "_attention_bwd_kv_kernel": backward,
                    "_attention_bwd_q_kernel": backward,
                },
                quick=variant in QUICK,
                cards=cards,
            )
