"""decode_attention, one token at gpt-oss's 64 / 8 heads and head_dim 64, against torch's kernels.

sdpa: F.scaled_dot_product_attention without sinks, which does less: a bound, not a peer.
lse: the strongest exact peer, torch's CPU flash attention renormalised by its logsumexp, the eight
query heads of a key head as rows. With a window the peers get its keys only, already cut out; all
peers get keys and values with the heads first, contiguous.
"""

from functools import partial

import harness
import peers_attention as peers
import pytest
import torch

from medgpt_kernels import decode_attention, roofline

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 8, 64, 128
PEER_BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CONTENDERS = (*harness.our_backends(), "sdpa", "lse")
# cached keys, window, dtype
CASES = {
    "long": (32768, 0, torch.float32),
    "long_bf16": (32768, 0, torch.bfloat16),
    "short": (4096, 0, torch.float32),
    "short_bf16": (4096, 0, torch.bfloat16),
    "window": (32768, WINDOW, torch.float32),
    "window_bf16": (32768, WINDOW, torch.bfloat16),
}
SWEEP = {  # the other sizes of the plots; make bench-sweep
    f"cache_{length}{suffix}": (length, 0, dtype)
    for length in (1024, 16384, 131072)
    for suffix, dtype in (("", torch.float32), ("_bf16", torch.bfloat16))
}
CASES |= SWEEP


def build(*, case, short, device) -> harness.Group:
    length, window, dtype = CASES[case]
    length = min(length, 2048) if short else length
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    leaves = {
        "q": random(1, 1, HEADS, HEAD_DIM),
        "k_cache": random(1, length, KV_HEADS, HEAD_DIM),
        "v_cache": random(1, length, KV_HEADS, HEAD_DIM),
        "sinks": torch.randn(HEADS, generator=generator).to(device),
    }
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    window_size = (window - 1, 0) if window else (-1, -1)

    def call(q, k_cache, v_cache, sinks):
        return decode_attention(q, k_cache, v_cache, lengths, sinks=sinks, window_size=window_size)

    job = harness.Job("decode_attention", call, leaves)
    contenders = dict(job.backends())
    seen = window or length
    if device.type == "cpu":
        k, v = (
            leaves[n][:, length - seen :].transpose(1, 2).contiguous()
            for n in ("k_cache", "v_cache")
        )
        operands = (leaves["q"], k, v, leaves["sinks"])
        contenders |= {
            "sdpa": lambda: job.contender(partial(peers.decode_sdpa, *operands), is_bound=True),
            "lse": lambda: job.contender(partial(peers.decode_lse, *operands)),
        }
    return harness.Group(
        name=f"decode_attention {case.split('_')[0]} {str(dtype)[6:]} S{length} "
        f"H{HEADS}/{KV_HEADS} D{HEAD_DIM}",
        cost=roofline.decode_attention_cost(seen, HEADS, KV_HEADS, HEAD_DIM, dtype=dtype),
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
        for case in CASES
        for name in CONTENDERS
    ],
)
def bench_decode_attention(case, contender, timed, short, device):
    timed(partial(build, case=case, short=short, device=device), case, contender)
