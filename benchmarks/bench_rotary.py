"""rotary of q and k at gpt-oss's 64 + 8 heads, against transformers' apply_rotary_pos_emb."""

from functools import partial

import harness
import pytest
import torch

from medgpt_kernels import apply_rotary, registry, roofline, yarn_rotary

HEADS, KV_HEADS, HEAD_DIM = 64, 8, 64
CONTENDERS = (*harness.our_backends(), "transformers", "transformers_compile")
CASES = {"fwd": torch.float32, "fwd_bf16": torch.bfloat16}
PEER_BOUND = {torch.float32: 2e-6, torch.bfloat16: 3e-2}  # transformers' bf16 rounds its tables


def contender(call, name=None, **options) -> harness.Contender:
    """Both rotated tensors, by one of our backends if named."""

    def run():
        with torch.no_grad():
            if name is None:
                return call()
            with registry.backend(name):
                return call()

    return harness.Contender(run, lambda made: dict(zip(("q", "k"), made, strict=True)), **options)


def build(*, case, short, device) -> harness.Group:
    return group(512 if short else 2048, CASES[case], short, device)


def group(tokens, dtype, short, device) -> harness.Group:
    """One shape; `short` leaves torch.compile out."""
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    rotary = yarn_rotary(HEAD_DIM, tokens, truncate=False).to(device)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, tokens, heads, HEAD_DIM, generator=generator).to(device, dtype)
        for heads in (HEADS, KV_HEADS)
    )
    tables = [table[None].to(dtype) for table in rotary]

    def ours():
        return apply_rotary(q, k, rotary)

    def eager(rotate=apply_rotary_pos_emb):
        rotated = rotate(q.transpose(1, 2), k.transpose(1, 2), *tables)
        return tuple(t.transpose(1, 2) for t in rotated)

    def compiled():
        if short:
            raise harness.Unavailable("compiling takes a minute; not in the short form")
        torch.compiler.reset()
        return contender(partial(eager, torch.compile(apply_rotary_pos_emb)), warmups=3)

    def backend(name):
        try:
            registry.operators["rotary_fwd"].kernel(name)
        except registry.Unsupported as reason:
            raise harness.Unavailable(str(reason)) from None
        return contender(ours, name)

    def truth():
        with registry.backend(harness.BASELINE):
            wide = apply_rotary(q.double(), k.double(), rotary)
        return dict(zip(("q", "k"), wide, strict=True))

    return harness.Group(
        name=f"rotary fwd {str(dtype)[6:]} T{tokens} {HEADS}+{KV_HEADS} heads",
        cost=roofline.rotary_cost(tokens, HEADS + KV_HEADS, HEAD_DIM, dtype),
        dtype=dtype,
        device=device,
        contenders={
            **{
                name: partial(backend, name)
                for name in (harness.BASELINE, *registry.candidates(device.type))
            },
            "transformers": lambda: contender(eager),
            "transformers_compile": compiled,
        },
        truth=truth,
        peer_bound=PEER_BOUND[dtype],
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def bench_rotary(timed, case, contender, short, device):
    timed(partial(build, case=case, short=short, device=device), case, contender)
