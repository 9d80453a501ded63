"""mxfp4 of one gpt-oss expert's up-projection, packed and unpacked, against transformers.

transformers' converter also transposes; it has no quantiser of its own on the CPU.
"""

from functools import partial

import harness
import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import registry, roofline

SHAPE, SHORT_SHAPE = (1, 5760, 2880), (1, 576, 2880)
CONTENDERS = (*harness.our_backends(), "transformers")
CASES = {
    "dequantize": torch.float32,
    "dequantize_bf16": torch.bfloat16,
    "quantize": torch.float32,
    "quantize_bf16": torch.bfloat16,
}


def build(*, case, short, device) -> harness.Group:
    return group(case, SHORT_SHAPE if short else SHAPE, CASES[case], device)


def group(case, shape, dtype, device) -> harness.Group:
    """One shape [E, out, in]."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    packed = mk.mxfp4_quantize(w)
    unpacks = case.startswith("dequantize")

    def ours():
        return {"values": packed.dequantize(dtype)} if unpacks else mk.mxfp4_quantize(w)._asdict()

    def backend(name):
        try:
            registry.operators["mxfp4_quantize"].kernel(name)
        except registry.Unsupported as reason:
            raise harness.Unavailable(str(reason)) from None

        def run():
            with registry.backend(name):
                return ours()

        return harness.Contender(run, lambda made: made)

    def transformers():
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        if not unpacks:
            raise harness.Unavailable("transformers quantises on a GPU only")
        run = partial(convert_moe_packed_tensors, *packed, dtype=dtype)
        return harness.Contender(run, lambda made: {"values": made.transpose(1, 2).contiguous()})

    def truth():
        with registry.backend(harness.BASELINE):
            return {n: t.double() if unpacks else t for n, t in ours().items()}

    return harness.Group(
        name=f"mxfp4 {case.split('_')[0]} {str(dtype)[6:]} {shape[1]}x{shape[2]}",
        cost=roofline.mxfp4_cost(w.numel(), dtype),
        dtype=dtype,
        device=device,
        contenders={
            **{
                name: partial(backend, name)
                for name in (harness.BASELINE, *registry.candidates(device.type))
            },
            "transformers": transformers,
        },
        truth=truth,
        peer_bound=0.0,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def bench_mxfp4(timed, case, contender, short, device):
    timed(partial(build, case=case, short=short, device=device), case, contender)
