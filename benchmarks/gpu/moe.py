"""One gpt-oss-20b layer of experts (32, top-4, 2880 / 2880), its router, and MXFP4 itself."""

from functools import partial

import bench_mxfp4
import bench_routing
import harness
import peers_experts
import torch

import medgpt_kernels as mk
from gpu import peers_moe
from gpu.timing import Comparison, Place
from medgpt_kernels import roofline

EXPERTS, TOPK, HIDDEN, RANK = 32, 4, 2880, 16
DRY_EXPERTS, DRY_HIDDEN = 4, 64
DTYPE, FP32 = torch.bfloat16, torch.float32
PEER_BOUND = 3e-2
NAMES = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
PEERS = ("eager", "grouped_mm", "triton_kernels", "scattermoe")
CASES = (  # tokens, packed weights, backward, rank of LoRA, contenders
    (1, True, None, 0, ("reference", "triton", "cuda", *PEERS)),
    (16, True, None, 0, ("triton", "cuda", *PEERS)),
    (4096, True, None, 0, ("reference", "triton", "compile", *PEERS)),
    (4096, True, "frozen", 0, ("reference", "triton", *PEERS)),
    (4096, True, "frozen", RANK, ("reference", "triton")),
    (4096, False, None, 0, ("triton", "eager", "grouped_mm", "scattermoe")),
    (4096, False, "trainable", 0, ("triton", "eager", "grouped_mm")),
)


def packed_weights(experts: int, hidden: int, device) -> dict:
    """Random codes at scales around weights of 0.02, made where they are used."""
    g = torch.Generator(device).manual_seed(0)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8, device=device)

    made = {}
    for name, rows in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
        blocks = integers(0, 256, experts, rows, hidden // 32, 16)
        made[name] = mk.Mxfp4Tensor(blocks, integers(118, 121, experts, rows, hidden // 32))
        bias = torch.randn(experts, rows, generator=g, device=device) * 0.02
        made[f"{name}_bias"] = bias.to(DTYPE)
    return made


def dense_weights(packed: dict) -> dict:
    """The same values as transformers' [E, in, out]."""

    def dense(t):
        values = t.dequantize(DTYPE) if isinstance(t, mk.Mxfp4Tensor) else t
        return values.mT.contiguous() if isinstance(t, mk.Mxfp4Tensor) else values

    return {name: dense(t) for name, t in packed.items()}


def lora_leaves(experts: int, hidden: int, device) -> dict[str, torch.nn.Parameter]:
    g = torch.Generator(device).manual_seed(2)
    shapes = {
        "gate_up_a": (experts, RANK, hidden),
        "gate_up_b": (experts, 2 * hidden, RANK),
        "down_a": (experts, RANK, hidden),
        "down_b": (experts, hidden, RANK),
    }
    scaled = {n: torch.randn(s, generator=g, device=device) * 0.02 for n, s in shapes.items()}
    return {n: torch.nn.Parameter(t.to(DTYPE)) for n, t in scaled.items()}


def experts_group(place: Place, is_packed, backward, rank, tokens) -> harness.Group:
    device = place.device
    experts, hidden = place.size((EXPERTS, HIDDEN), (DRY_EXPERTS, DRY_HIDDEN))
    g = torch.Generator(device).manual_seed(1)
    ids = torch.rand(tokens, experts, generator=g, device=device).argsort(1)[:, :TOPK]
    x = torch.randn(tokens, hidden, generator=g, device=device).to(DTYPE)
    topk_weights = torch.randn(tokens, TOPK, generator=g, device=device).softmax(-1)
    leaves = {"x": x, "topk_weights": topk_weights}
    packed = packed_weights(experts, hidden, device)
    weights = packed if is_packed else dense_weights(packed)
    if backward:
        leaves = {n: torch.nn.Parameter(t) for n, t in leaves.items()}
    if backward == "trainable":
        weights = {n: torch.nn.Parameter(t) for n, t in weights.items()}
        leaves |= weights
    if rank:
        leaves |= lora_leaves(experts, hidden, device)
    d_y = torch.randn(tokens, hidden, generator=g, device=device).to(DTYPE) if backward else None

    def ours(x, topk_weights, **given):
        data = mk.routing_from_topk(ids, topk_weights, experts)
        own = weights | {n: t for n, t in given.items() if n in NAMES}
        own = {n: t.to(x.dtype) if torch.is_tensor(t) else t for n, t in own.items()}
        pairs = [given[n] for n in given if n not in NAMES]
        return mk.experts(x, data, **own, lora=mk.ExpertLora(*pairs) if pairs else None)

    job = harness.Job("experts_fwd", ours, leaves, d_y)

    def peer(make, **about):
        """A peer's call on x, ids and the weights of the routing in bf16."""
        call = make(dense_weights(packed) if is_packed else weights)
        return job.contender(partial(call, leaves["x"], ids, topk_weights.to(DTYPE)), **about)

    gpt_oss = partial(partial, peers_experts.gpt_oss)

    def compiled():
        made = partial(peers_experts.gpt_oss, implementation="grouped_mm")
        return peer(lambda dense: place.compile(made(dense)), warmups=3)

    hit = len(ids.unique())
    cost = partial(
        roofline.experts_cost, tokens, TOPK, hit, hidden, hidden, dtype=DTYPE, packed=is_packed
    )
    stored = "mxfp4" if is_packed else "bf16"
    kind = f"fwd+bwd {backward}" if backward else "fwd"
    return harness.Group(
        name=f"experts {stored} {kind}{' LoRA' if rank else ''} T{tokens}",
        cost=cost() + cost(backward=backward) if backward else cost(),
        dtype=DTYPE,
        device=device,
        contenders={
            **{n: partial(job.backend, n) for n in ("reference", "triton", "cuda")},
            "eager": partial(peer, gpt_oss(implementation="eager")),
            "grouped_mm": partial(peer, gpt_oss(implementation="grouped_mm")),
            "compile": compiled,
            "triton_kernels": lambda: job.contender(
                partial(peers_moe.triton_kernels(packed), leaves["x"], ids, topk_weights)
            ),
            "scattermoe": partial(peer, peers_moe.scattermoe, is_bound=True),
        },
        truth=job.truth,
        peer_bound=PEER_BOUND,
    )


def comparisons(place: Place):
    """(what to compare, which contenders) of the part "experts"."""
    for tokens, is_packed, backward, rank, names in place.size(CASES, CASES[::2]):
        build = partial(experts_group, place, is_packed, backward, rank)
        # enough rows an expert that the tile which is checked is the one that is timed
        checked = place.size(min(tokens, 1024), min(tokens, 9))
        yield Comparison(build, place.size(tokens, checked), checked, few=tokens <= 16), names


def routing_comparisons(place: Place):
    cases = ((1, False), (16, False), (4096, False), (4096, True))
    for tokens, backward in place.size(cases, ((1, False), (17, True))):

        def build(tokens, backward=backward):
            return bench_routing.group(tokens, 1, DTYPE, backward, place.dry, place.device)

        yield Comparison(build, tokens, min(tokens, 1024), few=tokens <= 16), None


def mxfp4_comparisons(place: Place):
    shape = place.size((4, 5760, 2880), (1, 64, 64))
    for case in ("dequantize", "quantize"):

        def build(experts, case=case):
            return bench_mxfp4.group(case, (experts, *shape[1:]), DTYPE, place.device)

        yield Comparison(build, shape[0], 1), None
