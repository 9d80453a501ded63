"""rotary of q and k at gpt-oss's 64 + 8 heads, against transformers' apply_rotary_pos_emb."""

from functools import partial

import harness
import pytest
import torch

from medgpt_kernels import apply_rotary, roofline, yarn_rotary

HEADS, KV_HEADS, HEAD_DIM = 64, 8, 64
CONTENDERS = (*harness.our_backends(), "transformers", "transformers_compile")


def build(*, short, device) -> harness.Group:
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    tokens = 512 if short else 2048
    rotary = yarn_rotary(HEAD_DIM, tokens, truncate=False)
    rotary = type(rotary)(*(t.to(device) for t in rotary))
    generator = torch.Generator().manual_seed(0)
    leaves = {
        name: torch.randn(1, tokens, heads, HEAD_DIM, generator=generator).to(device)
        for name, heads in (("q", HEADS), ("k", KV_HEADS))
    }

    def call(q, k):
        return apply_rotary(q, k, rotary)[0]

    def eager(q, k):
        views = (q.transpose(1, 2), k.transpose(1, 2))
        return apply_rotary_pos_emb(*views, rotary.cos[None], rotary.sin[None])[0].transpose(1, 2)

    job = harness.Job("rotary_fwd", call, leaves)

    def compiled():
        if short:
            raise harness.Unavailable("compiling takes a minute; not in the short form")
        torch.compiler.reset()
        return job.contender(partial(torch.compile(eager), **leaves), warmups=3)

    return harness.Group(
        name=f"rotary fwd float32 T{tokens} {HEADS}+{KV_HEADS} heads",
        cost=roofline.rotary_cost(tokens, HEADS + KV_HEADS, HEAD_DIM, torch.float32),
        dtype=torch.float32,
        device=device,
        contenders={
            **job.backends(),
            "transformers": lambda: job.contender(partial(eager, **leaves)),
            "transformers_compile": compiled,
        },
        truth=job.truth,
        peer_bound=2e-5,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", ["fwd"])
def bench_rotary(timed, case, contender, short, device):
    timed(partial(build, short=short, device=device), case, contender)
