"""attention and decode_attention at gpt-oss-20b's 64 / 8 heads and head_dim 64, in bf16."""

from functools import partial

import harness
import torch

from gpu import peers
from gpu.timing import Comparison, Place
from medgpt_kernels import attention, decode_attention, roofline
from medgpt_kernels.attention import reference

HEADS, HEAD_DIM, WINDOW = (64, 8), 64, 128  # of queries, of keys
DRY_HEADS = (4, 2)
DTYPE = torch.bfloat16
PEER_BOUND = 3e-2
# What each case is timed at, and with which peers; compiling is what takes the report's minutes.
QUICK = ("triton", "torch_flash", "sdpa", "flash_attn", "fa4")
CASES = (
    # window, backward, packed, tokens, contenders
    (0, False, False, 4096, ("reference", *QUICK)),
    (0, True, False, 4096, ("reference", "compile", "flex", *QUICK)),
    (WINDOW, True, False, 4096, ("reference", "flex", *QUICK)),
    (0, False, False, 16384, QUICK),
    (0, True, False, 16384, QUICK),
    (WINDOW, False, False, 16384, QUICK),
    (WINDOW, True, False, 16384, ("flex", *QUICK)),
    (0, True, True, 16384, ("triton", "reference")),
    (WINDOW, False, False, 131072, QUICK),
)
DECODE = (  # sequences, cached keys, window
    (1, 4096, 0),
    (1, 32768, 0),
    (1, 131072, 0),
    (1, 32768, WINDOW),
    (32, 8192, 0),
    (32, 8192, WINDOW),
)


def random(place: Place, *shape: int, seed: int) -> torch.Tensor:
    g = torch.Generator(place.device).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=place.device).to(DTYPE)


def documents(tokens: int) -> list[int]:
    """Lengths like those of packed reports and papers: an eighth of the pack, halves of it, ..."""
    lengths, left = [], tokens
    while left:
        lengths.append(min(left, max(1, tokens // 8 >> len(lengths) % 4)))
        left -= lengths[-1]
    return lengths


def attention_group(place: Place, window, backward, packed, tokens) -> harness.Group:
    heads, kv_heads = place.size(HEADS, DRY_HEADS)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    leaves = {
        n: torch.nn.Parameter(random(place, tokens, h, HEAD_DIM, seed=i))
        for i, (n, h) in enumerate(shapes.items())
    }
    leaves["sinks"] = torch.nn.Parameter(random(place, heads, seed=3).float())
    options = {"window_size": (window - 1, 0) if window else (-1, -1)}
    lengths = documents(tokens) if packed else [tokens]
    if packed:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(place.device, torch.int32)
        options |= {"cu_seqlens_q": bounds, "max_seqlen_q": max(lengths)}
        options["max_seqlen_k"] = options["max_seqlen_q"]

    def call(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, **options)

    d_out = random(place, tokens, heads, HEAD_DIM, seed=4) if backward else None
    job = harness.Job("attention_fwd", call, leaves, d_out)

    def compiled():
        def eager(q, k, v, sinks):
            left = options["window_size"][0]
            rest = (None, None, None, None, None, tokens, tokens, left, 0)
            out, _ = reference.attention_fwd(q[None], k[None], v[None], sinks, *rest, scale, True)
            return out[0]

        scale = HEAD_DIM**-0.5
        return job.contender(partial(place.compile(eager), **leaves), warmups=3)

    def flex():
        made = peers.Flex(tokens, window, place.device, place.compile)
        return job.contender(partial(made, **leaves), warmups=3)

    def peer(make, **about):
        return lambda: job.contender(partial(make, **leaves, window=window), **about)

    kind = "fwd+bwd" if backward else "fwd"
    span = "packed" if packed else "window" if window else "full"
    cost = partial(
        roofline.attention_cost, lengths, heads, kv_heads, HEAD_DIM, window=window, dtype=DTYPE
    )
    return harness.Group(
        name=f"attention {span} {kind} T{tokens}",
        cost=cost() + cost(backward=True) if backward else cost(),
        dtype=DTYPE,
        device=place.device,
        contenders={
            "reference": partial(job.backend, "reference"),
            "triton": partial(job.backend, "triton"),
            "compile": compiled,
            "flex": flex,
            "torch_flash": peer(peers.torch_flash),
            "sdpa": peer(peers.sdpa, is_bound=True),
            "flash_attn": peer(peers.flash_attn, is_bound=True),
            "fa4": peer(peers.fa4),
        },
        truth=job.truth,
        peer_bound=PEER_BOUND,
    )


def decode_group(place: Place, batch: int, window: int, length: int) -> harness.Group:
    (heads, kv_heads), seen = place.size(HEADS, DRY_HEADS), min(window or length, length)
    leaves = {"q": random(place, batch, 1, heads, HEAD_DIM, seed=0)}
    for i, name in enumerate(("k_cache", "v_cache")):
        leaves[name] = random(place, batch, length, kv_heads, HEAD_DIM, seed=1 + i)
    leaves["sinks"] = random(place, heads, seed=3).float()
    lengths = torch.full((batch,), length, dtype=torch.int32, device=place.device)
    window_size = (window - 1, 0) if window else (-1, -1)

    def call(q, k_cache, v_cache, sinks):
        return decode_attention(q, k_cache, v_cache, lengths, sinks=sinks, window_size=window_size)

    job = harness.Job("decode_attention", call, leaves)
    k, v = (leaves[n][:, length - seen :].contiguous() for n in ("k_cache", "v_cache"))
    operands = (leaves["q"], k, v, leaves["sinks"])
    about = (torch.full_like(lengths, seen),)
    one = roofline.decode_attention_cost(seen, heads, kv_heads, HEAD_DIM, dtype=DTYPE)

    def compiled():
        return job.contender(partial(place.compile(eager_decode), *operands), warmups=3)

    return harness.Group(
        name=f"decode_attention {'window' if window else 'full'} B{batch} S{length}",
        cost=roofline.Cost(batch * one.bytes, batch * one.flops),
        dtype=DTYPE,
        device=place.device,
        contenders={
            **{n: partial(job.backend, n) for n in ("reference", "triton", "cuda")},
            "compile": compiled,
            "torch_flash": lambda: job.contender(partial(peers.decode_torch_flash, *operands)),
            "sdpa": lambda: job.contender(partial(peers.decode_sdpa, *operands), is_bound=True),
            "flash_attn": lambda: job.contender(
                partial(peers.decode_flash_attn, *operands, *about), is_bound=True
            ),
        },
        truth=job.truth,
        peer_bound=PEER_BOUND,
    )


def eager_decode(q, k, v, sinks):
    """One new token over cached keys, as the eager formula; for torch.compile."""
    batch, head_dim = q.shape[0], q.shape[3]
    rows = q.view(batch, k.shape[2], -1, head_dim)
    scores = torch.einsum("bgpd,bsgd->bgps", rows, k).float() * head_dim**-0.5
    column = sinks.view(1, k.shape[2], -1, 1).expand(batch, -1, -1, 1)
    p = torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(v.dtype)
    return torch.einsum("bgps,bsgd->bgpd", p, v).reshape(q.shape)


def comparisons(place: Place):
    """(what to compare, which contenders) of the part "attention"."""
    for window, backward, packed, tokens, names in place.size(CASES, CASES[1:3]):
        window = place.size(window, min(window, 16))
        build = partial(attention_group, place, window, backward, packed)
        yield Comparison(build, place.size(tokens, 40), place.size(1024, 40)), names
    if place.dry:
        build = partial(attention_group, place, 0, True, True)
        yield Comparison(build, 64, 64), ("reference", "triton")


def decode_comparisons(place: Place):
    """The same of the part "decode"."""
    for batch, length, window in place.size(DECODE, DECODE[3:5]):
        batch, window = place.size(batch, min(batch, 2)), place.size(window, min(window, 16))
        build = partial(decode_group, place, batch, window)
        compiles = (batch, length, window) == (1, 32768, 0)
        names = ["reference", "triton", "cuda", "torch_flash", "sdpa", "flash_attn"]
        names += ["compile"] if compiles else []
        yield Comparison(build, place.size(length, 64), place.size(2048, 64), few=True), names
