"""One real gpt-oss-20b layer of experts (32 experts, 2880 / 2880, top-4), against transformers.

Peers work on dense weights of the same values: eager (a loop over experts), grouped_mm, and for
bf16 linear_out_in, the fastest product that torch has there. Groups of one token are four steps
with different experts, as decoding has them. Weights are kept once, so cases run one after another.
"""

import functools
from functools import partial

import harness
import peers_experts as peers
import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import registry, roofline
from medgpt_kernels.mxfp4.op import Mxfp4Tensor

EXPERTS, TOPK, HIDDEN = 32, 4, 2880
PEER_BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
OURS = harness.our_backends()
FAST = tuple(n for n in OURS if n != harness.BASELINE)  # where the reference takes seconds
FP32, BF16 = torch.float32, torch.bfloat16
DENSE = (*FAST, "eager", "grouped_mm")
SLOW = {  # with the others, more than the minutes that README's command may take
    "mxfp4_fwdbwd_T512", "dense_fwd_T1", "dense_fwd_T512", "dense_fwd_T2048", "dense_fwdbwd_T512",
    "dense_fwd_T1_bf16", "dense_fwd_T8_bf16",
}  # fmt: skip
# tokens, dtype of x, packed weights, backward, contenders
CASES = {
    "mxfp4_fwd_T1": (1, FP32, True, None, DENSE),
    "mxfp4_fwd_T1_bf16": (1, BF16, True, None, DENSE),
    "mxfp4_fwd_T8": (8, FP32, True, None, DENSE),
    "mxfp4_fwd_T64": (64, FP32, True, None, DENSE),
    "mxfp4_fwd_T512": (512, FP32, True, None, (*OURS, "eager", "grouped_mm")),
    "mxfp4_fwdbwd_T512": (512, FP32, True, "frozen", DENSE),
    "dense_fwd_T1": (1, FP32, False, None, DENSE),
    "dense_fwd_T512": (512, FP32, False, None, DENSE),
    "dense_fwd_T2048": (2048, FP32, False, None, DENSE),
    "dense_fwdbwd_T512": (512, FP32, False, "trainable", (*FAST, "grouped_mm")),
    "dense_fwd_T1_bf16": (1, BF16, False, None, (*DENSE, "linear_out_in")),
    "dense_fwd_T8_bf16": (8, BF16, False, None, (*FAST, "eager", "linear_out_in")),
}
NAMES = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


@functools.lru_cache(maxsize=1)
def packed_weights(experts: int, hidden: int, device: torch.device) -> dict:
    """Random codes at scales around weights of 0.02, and bf16-like biases."""
    g = torch.Generator().manual_seed(0)

    def packed(outputs, inputs):
        blocks = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), generator=g, dtype=torch.uint8
        )
        scales = torch.randint(118, 121, blocks.shape[:3], generator=g, dtype=torch.uint8)
        return Mxfp4Tensor(blocks, scales).to(device)

    def bias(width):
        return (torch.randn(experts, width, generator=g) * 0.02).bfloat16().float().to(device)

    return {
        "gate_up_proj": packed(2 * hidden, hidden),
        "gate_up_proj_bias": bias(2 * hidden),
        "down_proj": packed(hidden, hidden),
        "down_proj_bias": bias(hidden),
    }


@functools.lru_cache(maxsize=1)
def dense_weights(experts: int, hidden: int, device: torch.device, dtype: torch.dtype) -> dict:
    """The same values as [E, in, out]; only the last ones asked for are kept."""

    def dense(weight):
        out = torch.empty(experts, *weight.shape[:0:-1], dtype=dtype, device=device)
        for e in range(experts):
            out[e] = Mxfp4Tensor(weight.blocks[e], weight.scales[e]).dequantize(dtype).mT
        return out

    packed = packed_weights(experts, hidden, device)
    return {n: dense(t) if isinstance(t, Mxfp4Tensor) else t.to(dtype) for n, t in packed.items()}


def one_expert(weights: dict, e: int) -> list:
    """Expert e's four tensors in fp64, whatever they are stored as."""
    return [
        Mxfp4Tensor(*(part[e : e + 1] for part in t))
        if isinstance(t, Mxfp4Tensor)
        else t[e : e + 1].detach().double()
        for t in (weights[n] for n in NAMES)
    ]


def exact(x, ids, topk_weights, weights, d_y, sampled) -> harness.Outputs:
    """fp64, an expert at a time: the whole layer in fp64 would take 6 GB."""
    x = x.detach().double().requires_grad_()
    topk_weights = topk_weights.detach().double().requires_grad_()
    found = {"tokens": torch.zeros_like(x, requires_grad=False)}
    d_x, d_weights = torch.zeros_like(x), torch.zeros_like(topk_weights)
    for e in range(weights["down_proj"].shape[0]):
        at, slot = (ids == e).nonzero(as_tuple=True)
        if len(at) == 0:
            continue
        tensors = one_expert(weights, e)
        if e == sampled and d_y is not None:
            tensors = [t.requires_grad_() for t in tensors]
        data = mk.routing_from_topk(
            torch.zeros_like(at)[:, None], topk_weights[at, slot][:, None], 1
        )
        with registry.backend(harness.BASELINE):
            y = mk.experts(x[at], data, *tensors)
            if d_y is not None:
                leaves = [x, topk_weights, *(tensors if e == sampled else [])]
                grads = torch.autograd.grad(y, leaves, d_y[at].double())
                d_x, d_weights = d_x + grads[0], d_weights + grads[1]
                if e == sampled:
                    found |= {f"d_{n}": g[0] for n, g in zip(NAMES, grads[2:], strict=True)}
        found["tokens"].index_add_(0, at, y.detach())
    return found if d_y is None else {**found, "d_x": d_x, "d_topk_weights": d_weights}


def build(*, case, short, device) -> harness.Group:
    tokens, dtype, is_packed, backward, _ = CASES[case]
    experts, hidden = (8, 256) if short else (EXPERTS, HIDDEN)
    tokens = min(tokens, 64) if short else tokens
    steps = 4 if tokens == 1 else 1
    g = torch.Generator().manual_seed(1)
    ids = torch.rand(steps * tokens, experts, generator=g).argsort(1)[:, :TOPK].to(device)
    x = torch.randn(steps * tokens, hidden, generator=g).to(device, dtype)
    routing_weights = torch.randn(steps * tokens, TOPK, generator=g).softmax(-1).to(device)
    parameters = {"x": x, "topk_weights": routing_weights}
    weights = packed_weights(experts, hidden, device)
    if not is_packed:
        weights = dense_weights(experts, hidden, device, dtype)
        if backward == "trainable":
            weights = {n: torch.nn.Parameter(t) for n, t in weights.items()}
            parameters |= weights
    if backward:
        for name in ("x", "topk_weights"):
            parameters[name] = torch.nn.Parameter(parameters[name])
    d_y = torch.randn(tokens, hidden, generator=g).to(device, dtype) if backward else None
    sampled = int(ids[0, 0]) if backward == "trainable" else -1

    def in_steps(call, x, topk_weights):
        """`call` on each step's tokens."""
        parts = zip(x.split(tokens), ids.split(tokens), topk_weights.split(tokens), strict=True)
        found = [call(*part) for part in parts]
        return found[0] if steps == 1 else torch.cat(found)

    def ours(x, topk_weights, **_):
        def step(x, ids, topk_weights):
            data = mk.routing_from_topk(ids, topk_weights, experts)
            return mk.experts(x, data, *(weights[n] for n in NAMES))

        return in_steps(step, x, topk_weights)

    job = harness.Job("experts_fwd", ours, parameters, d_y)

    def sample(contender):
        """Of a trained weight's gradient, one expert is compared."""

        def outputs(y):
            made = contender.outputs(y)
            return {n: t[sampled] if n[2:] in NAMES else t for n, t in made.items()}

        return contender._replace(outputs=outputs)

    def peer(make, to=None):
        dense = weights if not is_packed else dense_weights(experts, hidden, device, FP32)
        call = make(dense)
        if dtype != dense["down_proj"].dtype:
            wide = {"x": x.float(), "topk_weights": routing_weights}
            return job.contender(partial(in_steps, call, **wide))
        given = {n: parameters[n] for n in ("x", "topk_weights")}
        if dtype == BF16:
            given["topk_weights"] = routing_weights.to(dtype)
        return sample(job.contender(partial(in_steps, call, **given)))

    contenders = {n: lambda make=make: sample(make()) for n, make in job.backends().items()}
    for name in ("eager", "grouped_mm"):
        contenders[name] = partial(peer, partial(peers.gpt_oss, implementation=name))
    contenders["linear_out_in"] = partial(peer, peers.linear_out_in)
    hit = sum(len(part.unique()) for part in ids.split(tokens))
    cost = partial(
        roofline.experts_cost,
        steps * tokens,
        TOPK,
        hit,
        hidden,
        hidden,
        dtype=dtype,
        packed=is_packed,
    )
    return harness.Group(
        name=f"experts {case.removesuffix('_bf16')} {str(dtype)[6:]} E{experts} top{TOPK} H{hidden}"
        + (f" {steps} steps" if steps > 1 else ""),
        cost=cost() + cost(backward=backward) if backward else cost(),
        dtype=dtype,
        device=device,
        contenders=contenders,
        truth=lambda: exact(x, ids, routing_weights, weights, d_y, sampled),
        peer_bound=PEER_BOUND[dtype],
    )


@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(case, name, marks=[pytest.mark.slow] if case in SLOW else [])
        for case, (*_, names) in CASES.items()
        for name in names
    ],
)
def bench_experts(case, contender, timed, short, device):
    timed(partial(build, case=case, short=short, device=device), case, contender)
