"""Which tensors a MedGPT checkpoint holds, and how each is made of those of its parts.

E experts.
"""

import copy
import re
from collections.abc import Iterator

import torch

from medgpt.config import MedGPTConfig
from medgpt.shards import Planned, Source
from medgpt_kernels.integrations import refuse
from medgpt_kernels.mxfp4.op import BLOCK, Mxfp4Tensor, mxfp4_quantize

PROJECTOR = "model.multi_modal_projector."
_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")
_PACKED = re.compile(r"\.experts\.(gate_up|down)_proj_(blocks|scales)$")
Parts = dict[str, tuple[Source, str]]  # our name: where it lies, under which name


def expected_tensors(config: MedGPTConfig, packed: bool) -> dict[str, torch.Tensor]:
    """Every tensor of the model by name, on "meta"."""
    from transformers.modeling_utils import set_zero3_state

    from medgpt.model import MedGPTForConditionalGeneration
    from medgpt_kernels.integrations.packed import pack_experts

    # under DeepSpeed transformers would cut up what is on "meta" too, and then initialise it
    with torch.device("meta"), set_zero3_state():
        model = MedGPTForConditionalGeneration(copy.deepcopy(config))
    if packed:
        pack_experts(model)
    return model.state_dict()


def new_projector(config: MedGPTConfig, dtype: torch.dtype, seed: int) -> dict[str, Planned]:
    """Normal weights (deviation 0.02), no bias, a LayerNorm of ones."""
    from medgpt.model import MedGPTProjector

    with torch.device("meta"):
        shapes = MedGPTProjector(config).state_dict()
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, meta in shapes.items():
        value = torch.zeros(meta.shape, dtype=torch.float32)
        if name == "layer_norm.weight":
            value.fill_(1)
        elif name.endswith("weight"):
            value.normal_(std=0.02, generator=generator)
        made[PROJECTOR + name] = whole(value.to(dtype))
    return made


def whole(value: torch.Tensor) -> Planned:
    """A tensor that is here."""
    return Planned(value.dtype, tuple(value.shape), lambda: [value])


def plan(parts: Parts, packed: bool, dtype: torch.dtype, op: str) -> dict[str, Planned]:
    """Each tensor under our name, experts packed or dense."""
    planned = {}
    for name, (source, own) in parts.items():
        if not packed and name.endswith("_blocks") and _PACKED.search(name):
            stem = name.removesuffix("_blocks")
            scales = parts.get(f"{stem}_scales")
            if scales is None:
                refuse(f"{stem}_scales beside its blocks", "none", op)
            planned[stem] = _dequantized(source, own, *scales, dtype, op)
        elif packed and _EXPERTS.search(name):
            planned |= _quantized(name, source, own, op)
        elif packed or not _PACKED.search(name):
            planned[name] = source.planned(own, dtype)
    return planned


def _dequantized(
    source: Source, blocks: str, other: Source, scales: str, dtype: torch.dtype, op: str
) -> Planned:
    """[E, out, in/32, 16] to transformers' [E, in, out], an expert at a time."""
    shape, held = source.headers[blocks].shape, other.headers[scales]
    if len(shape) != 4 or shape[-1] != BLOCK // 2 or held.shape != shape[:-1]:
        refuse(f"{blocks} [E, out, in/32, 16] and scales", f"{list(shape)}, {list(held.shape)}", op)
    if {held.dtype, source.headers[blocks].dtype} != {"U8"}:
        refuse(f"{blocks} and scales as U8", source.headers[blocks].dtype, op)

    def pieces() -> Iterator[torch.Tensor]:
        for e in range(shape[0]):
            part = Mxfp4Tensor(source.rows(blocks, e, e + 1), other.rows(scales, e, e + 1))
            yield part.dequantize(dtype).transpose(1, 2)

    return Planned(dtype, (shape[0], shape[2] * BLOCK, shape[1]), pieces)


def _quantized(name: str, source: Source, own: str, op: str) -> dict[str, Planned]:
    """transformers' [E, in, out] to blocks [E, out, in/32, 16] and scales, an expert at a time."""
    shape = source.headers[own].shape
    if len(shape) != 3 or shape[1] % BLOCK:
        refuse(f"{own} [E, in, out] with in a multiple of {BLOCK}", list(shape), op)

    def pieces(field: int) -> Iterator[torch.Tensor]:
        for e in range(shape[0]):
            yield mxfp4_quantize(source.rows(own, e, e + 1).transpose(1, 2))[field]

    scales = (shape[0], shape[2], shape[1] // BLOCK)
    return {
        f"{name}_blocks": Planned(torch.uint8, (*scales, BLOCK // 2), lambda: pieces(0)),
        f"{name}_scales": Planned(torch.uint8, scales, lambda: pieces(1)),
    }


def check(tensors: dict[str, Planned], expected: dict[str, torch.Tensor], op: str) -> None:
    """Every tensor of the model, no other, each in its shape."""
    for kind, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            refuse("the tensors of MedGPT", f"{len(names)} {kind}, as {min(names)}", op)
    for name, wanted in expected.items():
        found = tensors[name]
        same = found.dtype.is_floating_point == wanted.dtype.is_floating_point
        if found.shape != tuple(wanted.shape) or not same:
            refuse(
                f"{name} {list(wanted.shape)}" + ("" if same else f" of {wanted.dtype}"),
                f"{list(found.shape)}" + ("" if same else f" of {found.dtype}"),
                op,
            )
