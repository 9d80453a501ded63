"""attention at gpt-oss's 64 / 8 heads and head_dim 64, against torch's own CPU kernels.

sdpa: F.scaled_dot_product_attention without sinks, which does less: a bound, not a peer.
lse: the strongest exact peer, torch's CPU flash attention renormalised by its logsumexp; with a
window (lse_chunk) in blocks of 128 queries against 256 keys; over packed documents one by one.
flex: compiled FlexAttention with the sink as one more key, forward only.
The reference runs in blocks of queries, or its fp64 scores would not fit.
"""

import re
from functools import partial

import harness
import material
import peers_attention as peers
import pytest
import torch

from medgpt_kernels import attention, registry, roofline

HEADS, KV_HEADS, HEAD_DIM, WINDOW, BLOCK = 64, 8, 64, 128, 256
PEER_BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
OURS = harness.our_backends()
FULL = (*OURS, "sdpa", "lse")
# tokens (0: the real reports, packed), window, dtype, backward, contenders
CASES = {
    "full_fwd": (2048, 0, torch.float32, False, FULL),
    "window_fwd": (2048, WINDOW, torch.float32, False, (*OURS, "sdpa", "lse_chunk", "flex")),
    "window_fwd_4096": (4096, WINDOW, torch.float32, False, (*OURS, "lse_chunk")),
    "full_fwdbwd": (2048, 0, torch.float32, True, FULL),
    "window_fwdbwd": (2048, WINDOW, torch.float32, True, (*OURS, "lse_chunk")),
    "full_fwd_bf16": (2048, 0, torch.bfloat16, False, FULL),
    "full_fwdbwd_bf16": (512, 0, torch.bfloat16, True, FULL),
    "reports_fwdbwd": (0, 0, torch.float32, True, (*OURS, "lse_documents")),
}
SWEEP = {  # the other sizes of the plots; make bench-sweep
    f"{case}_{tokens}": (
        tokens,
        *CASES[case][1:4],
        (*OURS, "lse_chunk" if CASES[case][1] else "lse"),
    )
    for case, sizes in {
        "full_fwd": (256, 512, 1024),
        "full_fwdbwd": (256, 512, 1024),
        "window_fwd": (512, 1024, 8192, 16384),
        "window_fwdbwd": (512, 1024, 4096, 8192),
    }.items()
    for tokens in sizes
}
CASES |= SWEEP


def in_blocks(q, k, v, **options):
    """The same attention in blocks of queries, which see the last keys of a shorter sequence."""
    left, parts = options["window_size"][0], []
    for begin in range(0, q.shape[0], BLOCK):
        end = min(begin + BLOCK, q.shape[0])
        first = 0 if left < 0 else max(0, begin - left)
        parts.append(attention(q[begin:end], k[first:end], v[first:end], **options))
    return torch.cat(parts)


def build(*, case, short, device) -> harness.Group:
    tokens, window, dtype, backward, _ = CASES[case]
    lengths = list(material.REPORT_LENGTHS[: 8 if short else None])
    packed = tokens == 0
    tokens = sum(lengths) if packed else (min(tokens, 512) if short else tokens)
    lengths = lengths if packed else [tokens]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    leaves = {n: torch.nn.Parameter(random(tokens, h, HEAD_DIM)) for n, h in heads.items()}
    leaves["sinks"] = torch.nn.Parameter(torch.randn(HEADS, generator=generator).to(device))
    options = {"window_size": (window - 1, 0) if window else (-1, -1)}
    if packed:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        options |= {"cu_seqlens_q": bounds, "max_seqlen_q": max(lengths)}
        options["max_seqlen_k"] = options["max_seqlen_q"]

    def call(q, k, v, sinks):
        eager = registry.chosen_backend() == harness.BASELINE and not packed
        return (in_blocks if eager else attention)(q, k, v, sinks=sinks, **options)

    d_out = random(tokens, HEADS, HEAD_DIM) if backward else None
    job = harness.Job("attention_fwd", call, leaves, d_out)

    def flex():
        if short:
            raise harness.Unavailable("compiling takes a minute; not in the short form")
        torch.compiler.reset()
        return job.contender(partial(peers.compiled_flex(tokens, window), **leaves), warmups=3)

    contenders = dict(job.backends())
    if device.type == "cpu":
        contenders |= {
            "sdpa": lambda: job.contender(partial(peers.sdpa, **leaves), is_bound=True),
            "lse": lambda: job.contender(partial(peers.lse, **leaves)),
            "lse_documents": lambda: job.contender(
                partial(peers.lse_documents, **leaves, lengths=lengths)
            ),
            "flex": flex,
        }
    if device.type == "cpu" and window:
        mask = peers.band_mask(tokens // window, window, dtype)
        contenders["lse_chunk"] = lambda: job.contender(
            partial(peers.lse_chunk, **leaves, mask=mask)
        )
    cost = partial(
        roofline.attention_cost, lengths, HEADS, KV_HEADS, HEAD_DIM, window=window, dtype=dtype
    )
    return harness.Group(
        name=f"attention {re.sub('_(bf16|[0-9]+)$', '', case)} {str(dtype)[6:]} "
        f"T{tokens} H{HEADS}/{KV_HEADS} D{HEAD_DIM}",
        cost=cost() + cost(backward=True) if backward else cost(),
        dtype=dtype,
        device=device,
        contenders=contenders,
        truth=job.truth,
        peer_bound=PEER_BOUND[dtype],
    )


@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(case, name, marks=[pytest.mark.slow] if case in SWEEP else [])
        for case, (*_, names) in CASES.items()
        for name in names
    ],
)
def bench_attention(case, contender, timed, short, device):
    timed(partial(build, case=case, short=short, device=device), case, contender)
