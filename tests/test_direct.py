"""Calls past PyTorch's Python layers: which they take, and that they give the long way's bits."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import medgpt_kernels as mk
from medgpt_kernels import native, testing

try:
    native.cpu()
except native.Unsupported as reason:
    pytest.skip(str(reason), allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", list(native.DTYPE_CODES)[:3], ids=lambda d: str(d)[6:])


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dual level": forward_ad.dual_level,
    "dispatch mode": Passing,
    "function mode": Watching,
    "default device": lambda: torch.device("cpu"),
    "another backend": lambda: mk.backend("reference"),
}


def routing_call(dtype=torch.float32, tokens=3, bias_dtype=None):
    g = torch.Generator().manual_seed(tokens)
    x, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((tokens, 40), (8, 40), (8,)))
    bias = bias.to(bias_dtype or dtype)
    return [x, weight, bias, 2, "topk_softmax", True, None, None]


def public_routing(x, weight, bias, topk, scoring, renormalize, correction_bias, topk_ids):
    return mk.routing(
        x,
        weight,
        bias,
        topk,
        scoring=scoring,
        renormalize=renormalize,
        correction_bias=correction_bias,
        topk_ids=topk_ids,
    )


def decode_call(dtype=torch.float32, paged=False, append=True, tokens=1, window=(-1, -1)):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    shape = (12, 16, 2, 32) if paged else (2, 96, 2, 32)
    lengths = torch.tensor([70, 33], dtype=torch.int32)
    table = torch.randperm(12, generator=g).view(2, 6).int() if paged else None
    k, v = (random(2, tokens, 2, 32) if append else None for _ in range(2))
    tables = mk.yarn_rotary(32, 96, truncate=False) if append else None
    q = random(2, tokens, 8, 32)
    caches = random(*shape), random(*shape)
    sinks = random(8)
    return [q, *caches, lengths, table, k, v, None, None, window, sinks, None, tables]


def public_decode(q, k_cache, v_cache, lengths, table, k, v, k_scale, v_scale, *rest):
    window, sinks, softmax_scale, rotary = rest
    return mk.decode_attention(
        q,
        k_cache,
        v_cache,
        lengths,
        block_table=table,
        k=k,
        v=v,
        k_scale=k_scale,
        v_scale=v_scale,
        window_size=window,
        sinks=sinks,
        softmax_scale=softmax_scale,
        rotary=rotary,
    )


def linear_call(tokens=1, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    shapes = (1, tokens, 83), (37, 83), (37,)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def short(name, arguments):
    return getattr(native.direct(), f"{name}_direct")(*arguments)


CALLS = {"routing": routing_call, "decode_attention": decode_call, "linear": linear_call}


# What they give


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("scoring", ["topk_softmax", "softmax_topk", "sigmoid"])
def test_routing_gives_the_long_ways_bits(dtype, tokens, scoring):
    for bias_dtype in (dtype, torch.float32):
        arguments = routing_call(dtype, tokens, bias_dtype)
        arguments[4] = scoring
        with torch.no_grad():
            found = short("routing", arguments)
            public = public_routing(*arguments)
        expected = public_routing(*arguments)  # gradients are on
        for a, b, c in zip(found, expected, public, strict=True):
            assert a.dtype == b.dtype
            assert a.is_contiguous()
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@DTYPES
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("append", [False, True], ids=["cached", "append"])
@pytest.mark.parametrize(("tokens", "window"), [(1, (-1, -1)), (1, (20, 0)), (3, (20, -1))])
def test_decode_attention_gives_the_long_ways_bits(dtype, paged, append, tokens, window):
    arguments, again = (decode_call(dtype, paged, append, tokens, window) for _ in range(2))
    with torch.no_grad():
        (found,) = short("decode_attention", arguments)
    expected = public_decode(*again)
    assert found.dtype == dtype
    for a, b in ((found, expected), *zip(arguments[1:3], again[1:3], strict=True)):
        assert torch.equal(a, b)


@torch.no_grad()
def test_outputs_are_tensors_like_others():
    arguments = routing_call()
    weights, *_, logits = short("routing", arguments)
    assert weights._version == 0
    assert not weights.requires_grad
    with torch.enable_grad():
        (weights.requires_grad_() * 2).sum().backward()
    assert (weights.grad == 2).all()
    kept = logits.clone()
    logits.add_(1)
    assert torch.equal(short("routing", arguments)[-1], kept)
    with torch.inference_mode():
        assert short("routing", arguments)[0].is_inference()


# What they leave to others


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_modes_go_the_long_way(name, mode):
    arguments = CALLS[name]()
    with torch.no_grad():
        assert short(name, arguments) is not None
        with MODES[mode]():
            assert short(name, arguments) is None


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_environment_goes_the_long_way(name, monkeypatch):
    isas = native.supported_isas()
    for variable, value, taken in (
        ("BACKEND", "cpu", True),
        ("BACKEND", "reference", False),
        ("CPU_ISA", isas[0], True),
        ("CPU_ISA", isas[-1], len(isas) == 1),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"MEDGPT_KERNELS_{variable}", value)
            assert (short(name, CALLS[name]()) is not None) == taken


@torch.no_grad()
def test_transforms_and_traces_go_the_long_way():
    x, weight, *rest = routing_call()

    def call(w):
        assert short("routing", [x, w, *rest]) is None
        return w * 1

    torch.vmap(call)(weight[None])
    torch.jit.trace(call, (weight,), check_trace=False)


class Mine(torch.Tensor):
    pass


WRONG_ROUTING = {
    "a subclass": (0, lambda x: x.as_subclass(Mine)),
    "a lazy minus": (1, torch._neg_view),
    "no memory": (0, lambda x: x.to("meta")),
    "sparse": (0, lambda x: x.to_sparse()),
    "another dtype": (0, lambda x: x.double()),
    "ids": (0, lambda x: x.int()),
    "one dimension": (0, lambda x: x[0]),
    "no rows": (0, lambda x: x[:0]),
    "another width": (0, lambda x: x[:, :39].contiguous()),
    "columns": (1, lambda w: w.t().contiguous().t()),
    "a short bias": (2, lambda b: b[:7]),
    "a bias with gaps": (2, lambda b: b.repeat(2)[::2]),
    "topk 0": (3, lambda k: 0),
    "topk beyond E": (3, lambda k: 9),
    "topk True": (3, lambda k: True),
    "an unknown scoring": (4, lambda s: "topk"),
    "not renormalised": (5, lambda r: False),
    "a correction": (6, lambda c: torch.zeros(8)),
    "ids to follow": (7, lambda ids: torch.zeros(3, 2, dtype=torch.int32)),
}


@pytest.mark.parametrize("case", WRONG_ROUTING)
@torch.no_grad()
def test_routing_leaves_the_rest(case):
    arguments = routing_call()
    at, change = WRONG_ROUTING[case]
    arguments[at] = change(arguments[at])
    assert short("routing", arguments) is None


WRONG_DECODE = {
    "q of 3 dimensions": (0, lambda q: q[0]),
    "q with gaps": (0, lambda q: q.repeat_interleave(2, -1)[..., ::2]),
    "another dtype": (0, lambda q: q.bfloat16()),
    "heads that do not divide": (0, lambda q: q[:, :, :7]),
    "another cache": (2, lambda v: v[:, :95]),
    "a cache with gaps": (1, lambda k: k.repeat_interleave(2, -1)[..., ::2]),
    "an fp8 cache": (1, lambda k: k.to(torch.float8_e4m3fn)),
    "long lengths": (3, lambda n: n.long()),
    "too long": (3, lambda n: n + 26),
    "less than -1": (3, lambda n: n - 35),
    "one length": (3, lambda n: n[:1]),
    "a table of another batch": (4, lambda t: torch.zeros(1, 6, dtype=torch.int32)),
    "k alone": (6, lambda v: None),
    "k of other heads": (5, lambda k: k[:, :, :1]),
    "a scale": (7, lambda s: torch.ones(2)),
    "a window to the right": (9, lambda w: (3, 1)),
    "a window of floats": (9, lambda w: (3.0, 0)),
    "short sinks": (10, lambda s: s[:7]),
    "a scale in words": (11, lambda s: "1"),
    "wide tables": (12, lambda r: mk.yarn_rotary(64, 96, truncate=False)),
    "short tables": (12, lambda r: mk.yarn_rotary(32, 70, truncate=False)),
    "trained tables": (12, lambda r: [t.clone().requires_grad_() for t in r]),
}


@pytest.mark.parametrize("case", WRONG_DECODE)
@torch.no_grad()
def test_decode_attention_leaves_the_rest(case):
    arguments = decode_call()
    at, change = WRONG_DECODE[case]
    arguments[at] = change(arguments[at])
    if case == "trained tables":
        arguments[at] = type(decode_call()[at])(*arguments[at])
    before = arguments[1].clone(), arguments[2].clone()
    assert short("decode_attention", arguments) is None
    for cache, kept in zip(arguments[1:3], before, strict=True):
        assert torch.equal(cache.float(), kept.float())


@torch.no_grad()
def test_errors_of_the_kernels():
    arguments = routing_call()
    arguments[0][1, 3] = float("nan")
    with pytest.raises(ValueError, match="routing: expected logits without NaN"):
        short("routing", arguments)
    arguments = decode_call(paged=True)
    arguments[4][1, 2] = 12
    with pytest.raises(ValueError, match=r"expected pages in 0 \.\.\. 11, got 12"):
        short("decode_attention", arguments)


@torch.no_grad()
def test_wrong_numbers_of_arguments_go_the_long_way():
    for name, make in CALLS.items():
        assert short(name, make()[:-1]) is None


# The product of few rows


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("shape", [(37, 83), (8, 32), (1, 1), (33, 64), (300, 2880)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_on_every_instruction_set(tokens, shape, dtype):
    out, width = shape
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (out, width), (out,))
    x, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    linear = torch.nn.functional.linear
    for b in (bias, None):
        wide = None if b is None else b.double()
        eager, truth = linear(x, weight, b), linear(x.double(), weight.double(), wide)
        for isa in native.supported_isas():
            y = torch.full((tokens, out), float("nan"), dtype=dtype)
            pointers = map(native.pointer, (x, weight, b, y))
            native.cpu_library(isa).linear(native.DTYPE_CODES[dtype], tokens, width, out, *pointers)
            testing.assert_close(y, eager, truth, name=isa)


def test_linear_check_notices_a_dropped_bias():
    x, weight, bias = linear_call(3)
    linear = torch.nn.functional.linear
    truth = linear(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        (wrong,) = short("linear", [x, weight, None])
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(wrong, linear(x, weight, bias), truth)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_does_not_depend_on_the_rows_beside(dtype):
    x, weight, bias = linear_call(16, dtype)
    (whole,) = short("linear", [x, weight, bias])
    for t in (1, 2, 3, 7):
        assert torch.equal(short("linear", [x[:, :t].contiguous(), weight, bias])[0], whole[:, :t])


@torch.no_grad()
def test_linear_leaves_the_rest():
    x, weight, bias = linear_call(16)
    for arguments in (
        linear_call(17),
        linear_call(dtype=torch.float16),
        linear_call(dtype=torch.float64),
        [x[0], weight, bias],
        [x.repeat_interleave(2, -1)[..., ::2], weight, bias],
        [x, weight.t().contiguous().t(), bias],
        [x, weight[:, :82].contiguous(), bias],
        [x, weight, bias.float()],
        [x, weight, bias[:36]],
    ):
        assert short("linear", arguments) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_rows_linear_has_gradients(dtype):
    pytest.importorskip("transformers")
    from medgpt_kernels.integrations.gpt_oss import FewRowsLinear

    layer = FewRowsLinear(83, 37, dtype=dtype)
    same = torch.nn.Linear(83, 37, dtype=dtype)
    same.load_state_dict(layer.state_dict())
    x = linear_call(3, dtype)[0]
    grads = [
        torch.autograd.grad(m(x).float().square().sum(), list(m.parameters()))
        for m in (layer, same)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        assert torch.equal(layer(x), short("linear", [x, layer.weight, layer.bias])[0])
        stack.enter_context(mk.backend("reference"))
        assert torch.equal(layer(x), same(x))
