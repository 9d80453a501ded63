"""routing at gpt-oss's layer (2880 hidden, 32 experts, top-4), against transformers' router.

The peers do what a grouped expert layer needs: router, stable argsort by expert, offsets. A single
token's call is timed a hundred at a time.
"""

import contextlib
from functools import partial

import harness
import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import registry, roofline

HIDDEN, EXPERTS, TOPK = 2880, 32, 4
CONTENDERS = (*harness.our_backends(), "transformers", "transformers_compile")
CASES = {  # tokens, tokens in the short form, calls a round, dtype, backward
    "T1": (1, 1, 100, torch.float32, False),
    "T16": (16, 16, 20, torch.float32, False),
    "T2048": (2048, 512, 1, torch.float32, False),
    "T2048_bf16": (2048, 512, 1, torch.bfloat16, False),
    "T2048_fwdbwd": (2048, 512, 1, torch.float32, True),
}
PEER_BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # transformers rounds logits to bf16
NAMES = ("topk_weights", "logits", "gather_indices", "expert_offs")


def inputs(tokens, dtype, device):
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS,))
    scales = (1.0, HIDDEN**-0.5, 0.1)
    return [
        (torch.randn(s, generator=g) * scale).to(device, dtype)
        for s, scale in zip(shapes, scales, strict=True)
    ]


def transformers_router(tensors):
    """The router module and what a grouped layer derives from its ids."""
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOPK)
    router = GptOssTopKRouter(config)
    router.weight, router.bias = (torch.nn.Parameter(t) for t in tensors[1:])

    def route(x):
        logits, weights, ids = router(x)
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        offs = torch.bincount(flat, minlength=EXPERTS).cumsum(0)
        return weights, logits, order // TOPK, offs

    return route, [router.weight, router.bias]


def build(*, case, short, device) -> harness.Group:
    tokens, short_tokens, calls, dtype, backward = CASES[case]
    return group(short_tokens if short else tokens, calls, dtype, backward, short, device)


def group(tokens, calls, dtype, backward, short, device) -> harness.Group:
    """One shape; `short` leaves torch.compile out."""
    tensors = inputs(tokens, dtype, device)
    g = torch.Generator().manual_seed(1)
    seeds = [torch.randn(tokens, n, generator=g).to(device) for n in (TOPK, EXPERTS)]

    def contender(call, leaves, name=None, **options):
        """`call` gives the four outputs; leaves get gradients through the first two."""

        def once():
            if not backward:
                with torch.no_grad():
                    return call()
            made = call()
            grads = torch.autograd.grad(made[:2], leaves, [s.to(made[0].dtype) for s in seeds])
            return *(t.detach() for t in made), *grads

        def run():
            with registry.backend(name) if name else contextlib.nullcontext():
                for _ in range(calls):
                    made = once()
            return made

        def outputs(made):
            if name is None and dtype != torch.float32:
                return {"logits": made[1]}  # rounded to bf16, they choose other experts
            packed = dict(zip(NAMES, made, strict=False))
            if packed["expert_offs"].numel() == EXPERTS:  # the peers' has no leading 0
                zero = packed["expert_offs"].new_zeros(1)
                packed["expert_offs"] = torch.cat([zero, packed["expert_offs"]])
            return packed | {f"d_{i}": d for i, d in enumerate(made[4:])}

        return harness.Contender(run, outputs, **options)

    def ours(x, weight, bias):
        data = mk.routing(x, weight, bias, TOPK)
        return data.topk_weights, data.logits, data.gather_indices, data.expert_offs

    def backend(name):
        try:
            registry.operators["routing_fwd"].kernel(name)
        except registry.Unsupported as reason:
            raise harness.Unavailable(str(reason)) from None
        leaves = [t.detach().requires_grad_(backward) for t in tensors]
        return contender(partial(ours, *leaves), leaves, name)

    def peer(compiled):
        if compiled and short:
            raise harness.Unavailable("compiling takes a minute; not in the short form")
        route, parameters = transformers_router(tensors)
        if compiled:
            torch.compiler.reset()
            route = torch.compile(route)
        x = tensors[0].detach().requires_grad_(backward)
        return contender(partial(route, x), [x, *parameters], warmups=3 if compiled else 1)

    def truth():
        wide = [t.double().requires_grad_(backward) for t in tensors]
        made = contender(partial(ours, *wide), wide, harness.BASELINE)
        return made.outputs(made.run())

    cost = roofline.routing_cost(tokens, HIDDEN, EXPERTS, TOPK, dtype=dtype)
    if backward:
        cost += roofline.routing_cost(tokens, HIDDEN, EXPERTS, TOPK, dtype=dtype, backward=True)
    kind = "fwd+bwd" if backward else "fwd"
    times = f" x{calls}" if calls > 1 else ""
    return harness.Group(
        name=f"routing {kind} {str(dtype)[6:]} T{tokens}{times}",
        cost=roofline.Cost(cost.bytes * calls, cost.flops * calls),
        dtype=dtype,
        device=device,
        contenders={
            **{
                name: partial(backend, name)
                for name in (harness.BASELINE, *registry.candidates(device.type))
            },
            "transformers": partial(peer, False),
            "transformers_compile": partial(peer, True),
        },
        truth=truth,
        peer_bound=PEER_BOUND[dtype],
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def bench_routing(timed, case, contender, short, device):
    timed(partial(build, case=case, short=short, device=device), case, contender)
