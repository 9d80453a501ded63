"""The experts in Triton, for CUDA and ROCm: the launchers and what they compile."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from medgpt_kernels import aot, tiles
from medgpt_kernels.experts.triton_bwd import experts_bwd
from medgpt_kernels.experts.triton_fwd import experts_fwd

__all__ = ["aot_kernels", "experts_bwd", "experts_fwd"]


class Variant(NamedTuple):
    """One call that the gate compiles; what is not named is a layer of gpt-oss-20b in training."""

    dtype: torch.dtype = torch.bfloat16
    packed: bool = False
    tokens: int = 4096
    rank: int = 0
    backward: bool = True
    hidden: int = 2880
    intermediate: int = 2880
    experts: int = 32
    topk: int = 4
    plain: bool = False  # concatenated, out_in, SiLU, no biases


PACKED = {"packed": True, "rank": 16}
MIXTRAL = {"hidden": 4096, "intermediate": 14336, "experts": 8, "topk": 2, "plain": True}
QWEN3 = {"hidden": 2048, "intermediate": 768, "experts": 128, "topk": 8, "plain": True}
VARIANTS = (
    Variant(),
    Variant(**PACKED),
    Variant(packed=True),
    Variant(packed=True, plain=True),
    Variant(rank=16),
    Variant(tokens=512),
    Variant(tokens=512, **PACKED),
    Variant(tokens=512, packed=True),
    Variant(tokens=512, packed=True, plain=True),
    Variant(tokens=512, rank=16),
    Variant(tokens=64),
    Variant(tokens=64, **PACKED),
    Variant(tokens=1, backward=False),
    Variant(tokens=1, packed=True, backward=False),
    Variant(tokens=1, dtype=torch.float32, backward=False),
    Variant(dtype=torch.float16, **PACKED),
    Variant(dtype=torch.float32, rank=16),
    Variant(dtype=torch.float32, **PACKED),
    Variant(**MIXTRAL),
    Variant(rank=32, **MIXTRAL),
    Variant(tokens=1024, **QWEN3),
    Variant(tokens=32, hidden=2000, intermediate=1000, experts=1, topk=1),
    Variant(hidden=2000, intermediate=1000, experts=1, topk=1),  # no multiples of a tile
    Variant(tokens=2**18, **PACKED),  # offsets pass 32 bits
)
QUICK = (Variant(), Variant(tokens=1, packed=True, backward=False))
FEW_ROWS = 16  # rows an expert, at most, of tiles too low for wgmma and tcgen05


def _launch(variant: Variant) -> None:
    """The forward and backward launchers on meta tensors."""
    experts, hidden, intermediate = variant.experts, variant.hidden, variant.intermediate
    slots = variant.tokens * variant.topk

    def meta(*size, dtype=variant.dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    def weight(outputs, inputs):
        if variant.packed:
            blocks = meta(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
            return blocks, meta(experts, outputs, inputs // 32, dtype=torch.uint8)
        return meta(experts, *((outputs, inputs) if variant.plain else (inputs, outputs))), None

    def low_rank(outputs, inputs):
        if not variant.rank:
            return None, None
        return meta(experts, variant.rank, inputs), meta(experts, outputs, variant.rank)

    biases = [None if variant.plain else meta(experts, n) for n in (2 * intermediate, hidden)]
    arguments = (
        meta(variant.tokens, hidden),
        meta(variant.tokens, variant.topk, dtype=torch.float32),
        meta(experts + 1, dtype=torch.int32),
        meta(slots, dtype=torch.int32),
        meta(slots, dtype=torch.int32),
        *weight(2 * intermediate, hidden),
        biases[0],
        *weight(hidden, intermediate),
        biases[1],
        *low_rank(2 * intermediate, hidden),
        *low_rank(hidden, intermediate),
        "swiglu" if variant.plain else "swiglu_oai",
        "concatenated" if variant.plain else "interleaved",
        "out_in" if variant.plain else "in_out",
        1.702,
        7.0,
        2.0,
    )
    y, pre_activation = experts_fwd(*arguments, variant.backward)
    if variant.backward:
        dense, pair = not variant.packed, [variant.rank > 0] * 2
        wanted = [True, True, dense, not variant.plain, dense, not variant.plain, *pair, *pair]
        experts_bwd(y, pre_activation, *arguments, wanted)


def aot_kernels() -> Iterator[aot.AotKernel]:
    """Every kernel of this op as its launchers would launch it on each family of cards."""
    for variant in VARIANTS:
        products = "ieee" if variant.dtype == torch.float32 else "half"
        few = variant.tokens * variant.topk <= FEW_ROWS * variant.experts
        rows = aot.FEW_ROWS if few and products == "half" else products
        name = "-".join(
            str(value).removeprefix("torch.")
            for value in variant._replace(
                packed="mxfp4" if variant.packed else "dense",
                rank=f"rank{variant.rank}",
                backward="training" if variant.backward else "inference",
                plain="plain" if variant.plain else "oai",
            )
        )
        for family, cards in tiles.each_family():
            yield from aot.record(
                f"{name}-{family}",
                functools.partial(_launch, variant),
                products={
                    "_experts_gate_up_kernel": rows,
                    "_experts_rows_kernel": rows,
                    "_experts_down_token_kernel": rows,
                    "_experts_bwd_hidden_kernel": rows,
                    "_experts_bwd_weight_kernel": products,
                },
                quick=variant in QUICK,
                cards=cards,
            )
