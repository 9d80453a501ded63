"""experts: every backend against fp64 by the tolerance rule, and against transformers."""

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import testing
from medgpt_kernels.mxfp4.op import Mxfp4Tensor, mxfp4_quantize
from medgpt_kernels.routing.op import routing_from_topk

BACKENDS = [b for b in testing.backend_modules("experts") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def route(tokens, experts, topk, seed=0, ids=None):
    """ids [T, K] of random experts, or the given ones, and weights that sum to one."""
    g = torch.Generator().manual_seed(seed)
    if ids is None:
        ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :topk]
    return ids, torch.randn(tokens, topk, generator=g).softmax(-1)


def make(
    tokens=45,
    hidden=64,
    intermediate=96,
    experts=6,
    topk=2,
    *,
    dtype=torch.float32,
    packed=False,
    bias=True,
    rank=0,
    weight_layout="in_out",
    ids=None,
    draw=0,
):
    """Inputs by name: x with outlier channels, pre-activations on both sides of the limit."""
    g = torch.Generator().manual_seed(100 * draw + 1)

    def weight(outputs, inputs, scale):
        w = torch.randn(experts, outputs, inputs, generator=g) * scale * inputs**-0.5
        if packed:
            return mxfp4_quantize(w)
        return (w if weight_layout == "out_in" else w.mT.contiguous()).to(dtype)

    def vector(*shape, scale=0.5):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    topk_ids, topk_weights = route(tokens, experts, topk, draw, ids)
    inputs = {
        "x": testing.realistic(tokens, hidden, dtype=dtype, seed=100 * draw + 2, outliers=1) * 0.3,
        "topk_weights": topk_weights,
        "gate_up_proj": weight(2 * intermediate, hidden, 2.0),
        "down_proj": weight(hidden, intermediate, 1.0),
        "topk_ids": topk_ids,
    }
    if bias:
        inputs["gate_up_proj_bias"] = vector(experts, 2 * intermediate)
        inputs["down_proj_bias"] = vector(experts, hidden)
    if rank:
        inputs["gate_up_a"] = vector(experts, rank, hidden, scale=hidden**-0.5)
        inputs["gate_up_b"] = vector(experts, 2 * intermediate, rank)
        inputs["down_a"] = vector(experts, rank, intermediate, scale=intermediate**-0.5)
        inputs["down_b"] = vector(experts, hidden, rank)
    return inputs


LORA = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def call(inputs, **options):
    """mk.experts on `make`'s inputs."""
    down = inputs["down_proj"]
    data = routing_from_topk(inputs["topk_ids"], inputs["topk_weights"], down.shape[0])
    if "gate_up_a" in inputs:
        options["lora"] = mk.ExpertLora(*(inputs[n] for n in LORA), scaling=0.5)
    return mk.experts(
        inputs["x"], data, inputs["gate_up_proj"], inputs.get("gate_up_proj_bias"), down,
        inputs.get("down_proj_bias"), **options,
    )  # fmt: skip


def wide(inputs, compute=None):
    """Leaves for gradients; floats as rounded, then in `compute`, routing weights at least fp32."""
    leaves = {}
    for name, t in inputs.items():
        if isinstance(t, Mxfp4Tensor) or not t.dtype.is_floating_point:
            leaves[name] = t
            continue
        dtype = compute or t.dtype
        if name == "topk_weights":
            dtype = torch.promote_types(dtype, torch.float32)
        leaves[name] = t.detach().to(dtype).requires_grad_()
    return leaves


def outputs(backend, inputs, compute=None, **options):
    """y and the gradient of every float input; inputs as rounded, computed in `compute`."""
    leaves = wide(inputs, compute)
    with mk.backend(backend), testing.poisoned_empty():
        y = call(leaves, **options)
        d_y = testing.realistic(*y.shape, dtype=inputs["x"].dtype, seed=4, outliers=1).to(y.dtype)
        wanted = [n for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], d_y)
    return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}}


def check(backend, inputs, *more_draws, **options):
    """Hold every output to the rule; the errors of several draws are pooled."""
    draws = [inputs, *more_draws]
    truth, eager, actual = (
        [outputs(name, t, compute, **options) for t in draws]
        for name, compute in (("reference", torch.float64), ("reference", None), (backend, None))
    )
    for name in truth[0]:
        pooled = [torch.cat([o[name].flatten() for o in found]) for found in (actual, eager, truth)]
        testing.assert_close(*pooled, name=name)
    return actual[0]


# The reference


@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_reference_gradcheck(activation, packed):
    leaves = wide(
        make(5, 32, 32, 3, 2, packed=packed, rank=2 if packed else 0) if packed
        else make(5, 6, 4, 3, 2, rank=2),
        torch.float64,
    )  # fmt: skip
    names = [n for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad]

    def run(*tensors):
        return call({**leaves, **dict(zip(names, tensors, strict=True))}, activation=activation)

    with mk.backend("reference"):
        assert torch.autograd.gradcheck(run, [leaves[n] for n in names], fast_mode=True)


# Second oracle: transformers' own modules


def gpt_oss_experts(inputs, dtype):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    experts, hidden, width = inputs["gate_up_proj"].shape
    module = GptOssExperts(
        GptOssConfig(hidden_size=hidden, intermediate_size=width // 2, num_local_experts=experts)
    )
    for name, parameter in module.named_parameters():
        parameter.data = inputs[name].to(dtype)
    return module


def test_reference_equals_transformers_gpt_oss():
    inputs = make()
    with mk.backend("reference"):
        found = outputs("reference", inputs, torch.float64)
    module = gpt_oss_experts(inputs, torch.float64)
    x = inputs["x"].double().requires_grad_()
    weights = inputs["topk_weights"].double().requires_grad_()
    y = module(x, inputs["topk_ids"], weights)
    torch.testing.assert_close(found["y"], y)
    d_y = testing.realistic(*y.shape, seed=4, outliers=1).double()
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    leaves = [x, weights, *(getattr(module, n) for n in names)]
    grads = torch.autograd.grad(y, leaves, d_y)
    for name, grad in zip(("x", "topk_weights", *names), grads, strict=True):
        torch.testing.assert_close(found[f"d_{name}"], grad)
