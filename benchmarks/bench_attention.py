"""attention at gpt-oss's 64 / 8 heads and head_dim 64, against torch's own flash attention.

sdpa: F.scaled_dot_product_attention without sinks, which does less: a bound, not a peer.
lse: the strongest exact peer, torch's CPU flash attention renormalised by its logsumexp; with a
window (lse_chunk) in blocks of 128 queries against 256 keys.
"""

from functools import partial

import harness
import pytest
import torch
import torch.nn.functional as F

from medgpt_kernels import attention, roofline

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 8, 64, 128
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
PEER_BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CASES = {
    "full_fwd": (2048, 0, torch.float32, False),
    "window_fwd": (2048, WINDOW, torch.float32, False),
    "window_fwd_4096": (4096, WINDOW, torch.float32, False),
    "full_fwdbwd": (2048, 0, torch.float32, True),
    "window_fwdbwd": (2048, WINDOW, torch.float32, True),
    "full_fwd_bf16": (2048, 0, torch.bfloat16, False),
    "full_fwdbwd_bf16": (512, 0, torch.bfloat16, True),
}
CONTENDERS = (*(n for n in harness.our_backends() if n != harness.BASELINE), "sdpa", "lse")


def _heads_first(x):
    return x.transpose(0, 1)[None]


def _sdpa(q, k, v, sinks):
    out = F.scaled_dot_product_attention(
        *map(_heads_first, (q, k, v)), is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _lse(q, k, v, sinks):
    """Exact sinks: out * sigmoid(lse - sink); torch's kernel differentiates out but not lse."""
    groups = HEADS // KV_HEADS
    q, k, v = map(_heads_first, (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    out, lse = FLASH(q, k, v, 0.0, True)
    return (out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype))[0].transpose(0, 1)


def _lse_chunk(q, k, v, sinks):
    """Blocks of 128 queries see their own block and the one before, masked to the window."""
    groups, blocks = HEADS // KV_HEADS, q.shape[0] // WINDOW
    k, v = (F.pad(t, (0, 0, 0, 0, WINDOW, 0)).repeat_interleave(groups, 1) for t in (k, v))
    k, v = (t.unfold(0, 2 * WINDOW, WINDOW).permute(0, 1, 3, 2) for t in (k, v))
    q = q.view(blocks, WINDOW, HEADS, HEAD_DIM).transpose(1, 2)
    at, key = torch.arange(WINDOW)[:, None] + WINDOW, torch.arange(2 * WINDOW)[None]
    keep = (key <= at) & (key > at - WINDOW)
    mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, float("-inf"))
    mask = mask.expand(blocks, 1, -1, -1).clone()
    mask[0, :, :, :WINDOW] = float("-inf")
    out, lse = FLASH(q, k, v, 0.0, False, attn_mask=mask)
    out = out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2).reshape(-1, HEADS, HEAD_DIM)


def build(*, case, short, device) -> harness.Group:
    tokens, window, dtype, backward = CASES[case]
    tokens = min(tokens, 512) if short else tokens
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    leaves = {
        name: torch.nn.Parameter(
            torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(device, dtype)
        )
        for name, heads in shapes.items()
    }
    leaves["sinks"] = torch.nn.Parameter(torch.randn(HEADS, generator=generator).to(device))
    d_out = torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    window_size = (window - 1, 0) if window else (-1, -1)

    def call(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, window_size=window_size)

    job = harness.Job("attention_fwd", call, leaves, d_out if backward else None)
    contenders = dict(job.backends())
    if device.type == "cpu" and not (backward and window):
        peer = _lse_chunk if window else _lse
        if not backward:  # torch's kernel gives lse no gradient: exact sinks only forward
            contenders["lse"] = lambda: job.contender(partial(peer, **leaves))
        if not window:
            contenders["sdpa"] = lambda: job.contender(partial(_sdpa, **leaves), is_bound=True)
    cost = partial(
        roofline.attention_cost, tokens, HEADS, KV_HEADS, HEAD_DIM, window=window, dtype=dtype
    )
    return harness.Group(
        name=f"attention {case} {str(dtype)[6:]} T{tokens}",
        cost=cost() + cost(backward=True) if backward else cost(),
        dtype=dtype,
        device=device,
        contenders=contenders,
        truth=job.truth,
        peer_bound=PEER_BOUND[dtype],
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def bench_attention(timed, case, contender, short, device):
    timed(partial(build, case=case, short=short, device=device), case, contender)
