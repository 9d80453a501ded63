"""experts: every backend against fp64 by the tolerance rule, and against transformers."""

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import testing
from medgpt_kernels.mxfp4.op import Mxfp4Tensor, mxfp4_quantize
from medgpt_kernels.routing.op import routing_from_topk

BACKENDS = [b for b in testing.backend_modules("experts") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETING = testing.interpreting()

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
        if t is None or isinstance(t, Mxfp4Tensor) or not t.dtype.is_floating_point:
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
        d_y = testing.realistic(*y.shape, dtype=inputs["x"].dtype, seed=4, outliers=0).to(y.dtype)
        wanted = [n for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], d_y)
    return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}}


def check(backend, inputs, *more_draws, brief=INTERPRETING, **options):
    """Hold every output to the rule; the errors of several draws are pooled.

    brief: of one draw only, since Triton's interpreter takes a second each.
    """
    draws = [inputs] if brief else [inputs, *more_draws]
    truth, eager, actual = (
        [outputs(name, t, compute, **options) for t in draws]
        for name, compute in (("reference", torch.float64), ("reference", None), (backend, None))
    )
    for name in truth[0]:
        pooled = [torch.cat([o[name].flatten() for o in found]) for found in (actual, eager, truth)]
        testing.assert_close(*pooled, name=name)
    return actual[0]


# Forward and backward


@backends
@dtypes
@pytest.mark.parametrize("weights", ["in_out", "out_in", "mxfp4"])
def test_layer(backend, dtype, weights):
    packed, layout = weights == "mxfp4", "out_in" if weights == "out_in" else "in_out"
    draws = [make(dtype=dtype, packed=packed, weight_layout=layout, draw=n) for n in range(3)]
    check(backend, *draws, weight_layout=layout)


@backends
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu"])
@pytest.mark.parametrize("gate_up_layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("weights", ["in_out", "out_in", "mxfp4"])
def test_activations_and_layouts(backend, activation, gate_up_layout, weights):
    packed, layout = weights == "mxfp4", "out_in" if weights == "out_in" else "in_out"
    draws = [make(packed=packed, weight_layout=layout, draw=n) for n in range(3)]
    options = {"activation": activation, "gate_up_layout": gate_up_layout}
    check(backend, *draws, weight_layout=layout, **options)


@backends
@dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_lora(backend, dtype, packed):
    draws = [make(dtype=dtype, packed=packed, rank=8, draw=n) for n in range(3)]
    check(backend, *draws, gate_up_layout="concatenated" if packed else "interleaved")


@backends
@pytest.mark.parametrize("pair", ["gate_up", "down"])
def test_lora_on_one_projection(backend, pair):
    draws = [make(rank=3, weight_layout="out_in", draw=n) for n in range(3)]
    for inputs in draws:
        for name in ("a", "b"):
            inputs[f"{'down' if pair == 'gate_up' else 'gate_up'}_{name}"] = None
    check(backend, *draws, weight_layout="out_in")


@backends
@pytest.mark.parametrize("weight_layout", ["in_out", "out_in"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 129])
def test_token_counts(backend, tokens, weight_layout):
    draws = [make(tokens, weight_layout=weight_layout, draw=n) for n in range(6)]
    actual = check(backend, *draws, weight_layout=weight_layout)
    assert actual["y"].shape == (tokens, 64)


@backends
@pytest.mark.parametrize("tokens", [0, 1, 5, 9, 33])
def test_token_counts_mxfp4(backend, tokens):
    check(backend, *(make(tokens, 96, 160, packed=True, draw=n) for n in range(6)))


@backends
@pytest.mark.parametrize("weight_layout", ["in_out", "out_in"])
@pytest.mark.parametrize("sizes", [(1, 1), (37, 51), (130, 97), (33, 300), (400, 31)], ids=str)
def test_sizes_beside_the_tiles(backend, sizes, weight_layout):
    draws = [make(31, *sizes, bias=False, weight_layout=weight_layout, draw=n) for n in range(6)]
    options = {"activation": "swiglu", "gate_up_layout": "concatenated"}
    check(backend, *draws, weight_layout=weight_layout, **options)
    check(backend, *draws, weight_layout=weight_layout)


@backends
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_all_tokens_on_one_expert(backend, packed):
    """Experts before and after it are empty, and its rows take several blocks."""
    inputs = make(801, 64, 32, 5, 1, packed=packed, ids=torch.full((801, 1), 2))
    actual = check(backend, inputs)
    if not packed:
        empty = [0, 1, 3, 4]
        assert (actual["d_gate_up_proj"][empty] == 0).all()
        assert (actual["d_down_proj_bias"][empty] == 0).all()


@backends
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_every_expert_of_every_token(backend, packed):
    check(backend, *(make(19, experts=4, topk=4, packed=packed, draw=n) for n in range(3)))


@backends
def test_an_expert_twice_for_one_token(backend):
    ids = torch.tensor([[1, 1], [0, 2], [2, 2]])
    check(backend, *(make(3, experts=3, ids=ids, draw=n) for n in range(6)))


@backends
@pytest.mark.parametrize("tokens", [1, 40])
def test_outlier_block(backend, tokens):
    """One block of x is 2^12 times the rest: a fixed-point path would drop the others' bits."""
    draws = [make(tokens, packed=True, dtype=torch.bfloat16, draw=n) for n in range(6)]
    for inputs in draws:
        inputs["x"][:, :32] *= 4096
        inputs["gate_up_proj"].scales[:, :, 0] -= 12  # its products stay beside the others'
    check(backend, *draws)


@backends
@dtypes
@pytest.mark.parametrize("tokens", [3, 40])
def test_infinite_activation(backend, dtype, tokens):
    """Under weights of one sign it drives gates and ups onto their limit, and leaves no NaN."""
    draws = [make(tokens, packed=True, dtype=dtype, draw=n) for n in range(3)]
    for inputs in draws:
        inputs["x"][:, 5] = torch.inf
        inputs["gate_up_proj"].blocks[:] &= 0x77  # no minus
        inputs["gate_up_proj"].blocks[:] |= 0x11  # no zero
    with mk.backend(backend), torch.no_grad():
        found = [call(t) for t in draws]
    with mk.backend("reference"), torch.no_grad():
        eager, truth = ([call(wide(t, d)) for t in draws] for d in (dtype, torch.float64))
    testing.assert_close(*(torch.cat([y.flatten() for y in ys]) for ys in (found, eager, truth)))
    assert torch.cat(truth).isfinite().all()


@backends
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_closed_gates_contribute_nothing(backend, dtype, activation):
    """One expert's gate far below 0, as a half even -inf where eager makes NaN of it."""
    draws = [make(dtype=dtype, draw=n) for n in range(3)]
    for inputs in draws:
        inputs["x"][:, 0] = 100
        inputs["gate_up_proj"][1, 0, 0] = -100
        inputs["gate_up_proj_bias"][1, 0] = -1e37 if dtype == torch.float32 else -6e4
    check(backend, *draws, activation=activation)


@backends
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu"])
def test_nan_goes_where_eager_takes_it(backend, activation):
    inputs = make()
    inputs["x"][7, 3] = torch.nan
    found = check(backend, inputs, activation=activation)
    assert found["y"].isnan().any(1).nonzero().flatten().tolist() == [7]


# Decoding: Triton's launches are the same with and without a gradient, and tested above.

not_triton = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])


def without_gradients(backend, inputs, compute=None, **options):
    """y alone, as decoding computes it."""
    leaves = {
        n: t.detach() if isinstance(t, torch.Tensor) else t
        for n, t in wide(inputs, compute).items()
    }
    with torch.no_grad(), mk.backend(backend), testing.poisoned_empty():
        return call(leaves, **options)


def check_decoding(backend, *draws, **options):
    truth, eager, actual = (
        torch.cat([without_gradients(name, t, compute, **options).flatten() for t in draws])
        for name, compute in (("reference", torch.float64), ("reference", None), (backend, None))
    )
    testing.assert_close(actual, eager, truth, name="y")


@not_triton
@dtypes
@pytest.mark.parametrize("weights", ["in_out", "out_in", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_decoding(backend, dtype, weights, tokens):
    """Few tokens without a gradient; one, two, three and more rows an expert."""
    packed, layout = weights == "mxfp4", "out_in" if weights == "out_in" else "in_out"
    sizes = {"tokens": tokens, "hidden": 96, "intermediate": 160, "topk": 3}
    draws = [
        make(**sizes, dtype=dtype, packed=packed, weight_layout=layout, draw=n) for n in range(2)
    ]
    check_decoding(backend, *draws, weight_layout=layout)


@not_triton
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu"])
@pytest.mark.parametrize("gate_up_layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("weights", ["in_out", "out_in", "mxfp4"])
def test_decoding_activations_and_layouts(backend, activation, gate_up_layout, weights):
    packed, layout = weights == "mxfp4", "out_in" if weights == "out_in" else "in_out"
    sizes = {"tokens": 5, "hidden": 32, "intermediate": 96, "bias": activation == "swiglu_oai"}
    draws = [make(**sizes, packed=packed, weight_layout=layout, draw=n) for n in range(3)]
    options = {"activation": activation, "gate_up_layout": gate_up_layout}
    check_decoding(backend, *draws, weight_layout=layout, **options)


@not_triton
@pytest.mark.parametrize("weights", ["in_out", "out_in", "mxfp4"])
@pytest.mark.parametrize("sizes", [(32, 32), (2080, 32), (32, 2080), (544, 288)], ids=str)
def test_decoding_sizes(backend, sizes, weights):
    """A step of a warp, one more block than it, outputs beside the tiles."""
    packed, layout = weights == "mxfp4", "out_in" if weights == "out_in" else "in_out"
    draws = [make(2, *sizes, 3, 2, packed=packed, weight_layout=layout, draw=n) for n in range(3)]
    check_decoding(backend, *draws, weight_layout=layout)


@not_triton
@pytest.mark.parametrize("weights", ["in_out", "mxfp4"])
def test_decoding_of_uneven_experts(backend, weights):
    """All on one, one twice for a token, the last of many experts, no token."""
    for experts, ids in (
        (5, torch.full((16, 1), 2)),
        (3, torch.tensor([[1, 1], [0, 2], [2, 2]])),
        (70, torch.tensor([[69, 33], [33, 0]])),
        (4, torch.empty(0, 2, dtype=torch.int64)),
    ):
        sizes = {"tokens": len(ids), "hidden": 32, "intermediate": 32, "experts": experts}
        packed = weights == "mxfp4"
        draws = [make(**sizes, topk=ids.shape[1], ids=ids, packed=packed, draw=n) for n in range(3)]
        check_decoding(backend, *draws)


# What only the Triton kernels have: skewed schedules, ranks beside a tile, decoding in registers

triton_only = pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])


@triton_only
def test_schedule_of_uneven_experts(backend):
    """Empty experts first, last and between, one row, a full tile, a tile and a row."""
    counts = {1: 1, 3: 32, 4: 33, 7: 65}
    ids = torch.cat([torch.full((n, 1), e) for e, n in counts.items()])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    check(backend, make(len(ids), 32, 32, experts=9, topk=1, ids=ids))


@triton_only
@pytest.mark.parametrize("experts", [1, 200])
def test_numbers_of_experts(backend, experts):
    check(backend, make(6, 32, 16, experts=experts, topk=1))


@triton_only
@pytest.mark.parametrize("rank", [3, 70])
@pytest.mark.parametrize("tokens", [4, 20])
def test_lora_ranks(backend, rank, tokens):
    """Above and below FEW_TOKENS; a rank past BLOCK_R."""
    draws = [make(tokens, 32, 48, rank=rank, draw=n) for n in range(6 if tokens == 4 else 1)]
    check(backend, *draws, brief=False)


@triton_only
@pytest.mark.parametrize("limit", [0.3, 7.01])
def test_kept_pre_activations_stay_on_their_side_of_the_limit(backend, limit):
    """A bf16 place away at most; the fp32 call says where the sum lies."""
    inputs = make(40, dtype=torch.bfloat16)
    tensors = {n: t if n == "topk_ids" else t.float() for n, t in inputs.items()}
    kept = []
    for given in (inputs, tensors):
        data = routing_from_topk(given["topk_ids"], given["topk_weights"].float(), 6)
        with mk.backend(backend):
            _, pre = torch.ops.medgpt_kernels.experts_fwd.default(
                given["x"], data.topk_weights, *data[3:6], given["gate_up_proj"], None,
                given["gate_up_proj_bias"], given["down_proj"], None, given["down_proj_bias"],
                *[None] * 4, "swiglu_oai", "interleaved", "in_out", 1.702, limit, 1.0, True,
            )  # fmt: skip
        kept.append(pre.float())
    narrow, exact = kept
    for place, sizes in ((0, lambda t: t), (1, torch.abs)):
        a, b = sizes(narrow[:, place::2]), sizes(exact[:, place::2])
        assert torch.equal(a > limit, b > limit)
    assert ((narrow - exact).abs() <= exact.abs() * 2**-7 + 1e-6).all()


@triton_only
@pytest.mark.parametrize(
    ("dtype", "way"),
    [(torch.float32, "WIDE"), (torch.float16, "WIDE"), (torch.bfloat16, "WIDE"),
     (torch.bfloat16, "PAIRS")],
)  # fmt: skip
def test_every_byte_and_scale_decodes_as_the_reference(backend, dtype, way):
    """All 256 bytes under scales at both ends and between, bit for bit."""
    import triton
    import triton.language as tl

    from medgpt_kernels.experts import triton_unpack

    @triton.jit
    def decode(
        Out, Blocks, Scales, rows: tl.constexpr, DTYPE: tl.constexpr, WAY: tl.constexpr,
        UNPACK: tl.constexpr,
    ):  # fmt: skip
        row = tl.arange(0, rows)
        block = tl.arange(0, 16)
        mask = (row < rows)[:, None] & (block < 16)[None, :]
        values = UNPACK(Blocks, Scales, row, block, mask, 256, 16, DTYPE, WAY)
        tl.store(Out + row[:, None] * 512 + tl.arange(0, 512)[None, :], values)

    scales = torch.tensor([0, 1, 2, 3, 23, 100, 111, 127, 128, 140, 200, 251, 252, 253, 254, 255])
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(16, 16, 16).contiguous()
    scales = scales.to(torch.uint8)[:, None].expand(16, 16).contiguous()
    found = torch.empty(16, 512, dtype=dtype)
    width = getattr(tl, str(dtype).split(".")[1])
    decode[(1,)](
        found, blocks, scales, rows=16, DTYPE=width, WAY=getattr(triton_unpack, way),
        UNPACK=triton_unpack.unpack,
    )  # fmt: skip
    expected = Mxfp4Tensor(blocks, scales).dequantize(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    keep = ~expected.isnan()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found[keep].view(bits), expected[keep].view(bits))


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


def mixtral_experts(inputs, dtype):
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    experts, width, hidden = inputs["gate_up_proj"].shape
    module = MixtralExperts(
        MixtralConfig(hidden_size=hidden, intermediate_size=width // 2, num_local_experts=experts)
    )
    for name, parameter in module.named_parameters():
        parameter.data = inputs[name].to(dtype)
    return module


def qwen3_experts(inputs, dtype):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    experts, width, hidden = inputs["gate_up_proj"].shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width // 2)
    config.num_experts = config.num_local_experts = experts
    module = Qwen3MoeExperts(config)
    for name, parameter in module.named_parameters():
        parameter.data = inputs[name].to(dtype)
    return module


def eager_outputs(module, inputs, dtype):
    """y and gradients of a module of transformers, in `dtype`."""
    x = inputs["x"].to(dtype).requires_grad_()
    weights = inputs["topk_weights"].to(dtype).requires_grad_()
    y = module(x, inputs["topk_ids"], weights)
    d_y = testing.realistic(*y.shape, dtype=inputs["x"].dtype, seed=4, outliers=0).to(dtype)
    parameters = dict(module.named_parameters())
    leaves = {"x": x, "topk_weights": weights, **parameters}
    grads = torch.autograd.grad(y, list(leaves.values()), d_y)
    return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


ORACLES = {
    "gpt_oss": (gpt_oss_experts, {}, {}),
    "mixtral": (
        mixtral_experts,
        {"weight_layout": "out_in", "bias": False},
        {"activation": "swiglu", "gate_up_layout": "concatenated", "weight_layout": "out_in"},
    ),
}
ORACLES["qwen3"] = (qwen3_experts, *ORACLES["mixtral"][1:])


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_transformers(backend, oracle):
    build, shape, options = ORACLES[oracle]
    inputs = make(**shape)
    found = outputs(backend, inputs, **options)
    eager, truth = (
        eager_outputs(build(inputs, dtype), inputs, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name in truth:
        testing.assert_close(found[name], eager[name], truth[name], name=name)


@backends
def test_mxfp4_equals_its_dequantised_weights(backend):
    """Packed and dense kernels share no decoding: their outputs must."""
    inputs = make(33, packed=True)
    dense = {
        n: t.dequantize(torch.float32) if isinstance(t, Mxfp4Tensor) else t
        for n, t in inputs.items()
    }
    found = outputs(backend, inputs)
    expected = outputs(backend, dense, weight_layout="out_in")
    for name, value in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5 * scale)


@backends
@pytest.mark.parametrize("tokens", [2, 40])
def test_mxfp4_scales_at_both_ends(backend, tokens):
    """Scale bytes 0 (2^-127) and 255 (NaN), in one expert each."""
    inputs = make(tokens, packed=True, topk=1, ids=torch.arange(tokens)[:, None] % 2)
    inputs["gate_up_proj"].scales[0] = 0
    inputs["gate_up_proj"].scales[1, 7, 0] = 255
    with mk.backend("reference"):
        expected = call(inputs)
    with mk.backend(backend):
        found = call(inputs)
    assert found[1::2].isnan().all()
    assert expected[1::2].isnan().all()
    torch.testing.assert_close(found[::2], expected[::2])


# Properties


@backends
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_bitwise_repeatable(backend, packed):
    first, again = (outputs(backend, make(packed=packed, rank=4)) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


@backends
def test_only_what_is_wanted_is_computed(backend):
    inputs = make(rank=4)
    full = outputs(backend, inputs)
    d_y = testing.realistic(*inputs["x"].shape, seed=4, outliers=0)
    for name, t in inputs.items():
        if name == "topk_ids":
            continue
        leaf = t.clone().requires_grad_()
        with mk.backend(backend), testing.poisoned_empty():
            (grad,) = torch.autograd.grad(call({**inputs, name: leaf}), leaf, d_y)
        assert torch.equal(grad, full[f"d_{name}"]), name


@backends
def test_keeps_the_pre_activation_only_for_a_gradient(backend):
    inputs = wide(make())
    seen = []

    def note(t):
        seen.append(t)
        return t

    with mk.backend(backend), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        call(inputs)
    given = {t.data_ptr() for t in inputs.values()}
    kept = [t for t in seen if t.dtype.is_floating_point and t.data_ptr() not in given]
    assert [tuple(t.shape) for t in kept] == [(90, 192)]
    options = ("swiglu_oai", "interleaved", "in_out", 1.702, 7.0, 1.0)
    with torch.no_grad(), mk.backend(backend):
        _, pre = torch.ops.medgpt_kernels.experts_fwd.default(*operator_tensors(), *options, False)
    assert tuple(pre.shape) == (0, 192)


@backends
def test_a_token_alone_equals_the_token_among_others(backend):
    inputs = make(41)
    with mk.backend(backend):
        whole = call(inputs)
        for t in (0, 40):
            names = ("x", "topk_weights", "topk_ids")
            alone = call({**inputs, **{n: inputs[n][t : t + 1] for n in names}})
            torch.testing.assert_close(alone[0], whole[t], rtol=1e-5, atol=1e-4)


@backends
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_autocast_casts_x_and_weights_only(backend, packed):
    inputs = make(packed=packed)
    with mk.backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call(inputs)
        kept = ("topk_weights", "topk_ids")
        narrow = {
            n: t if n in kept or isinstance(t, Mxfp4Tensor) else t.bfloat16()
            for n, t in inputs.items()
        }
        expected = call(narrow)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@backends
def test_strided_inputs(backend):
    inputs = make()
    turned = {
        n: t.mT.contiguous().mT if n in ("x", "gate_up_proj", "down_proj") else t
        for n, t in inputs.items()
    }
    with mk.backend(backend):
        assert torch.equal(call(turned), call(inputs))


@backends
def test_biases_and_lora_of_another_dtype(backend):
    inputs = make(dtype=torch.bfloat16, packed=True, rank=4)
    other = {
        n: t.float() if "bias" in n or n in LORA else t for n, t in inputs.items()
    }  # fmt: skip
    with mk.backend(backend):
        assert torch.equal(call(other), call(inputs))


def test_every_isa_agrees(monkeypatch):
    from medgpt_kernels import native

    for isa in native.supported_isas():
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        assert native.cpu().isa == isa
        for tokens in (3, 60):
            draws = [make(tokens, 96, 64, packed=True, rank=5, draw=n) for n in range(4)]
            check("cpu", *draws)
            narrow = [make(tokens, 61, 45, dtype=torch.bfloat16, draw=n) for n in range(4)]
            check("cpu", *narrow)
            options = {"weight_layout": "out_in", "gate_up_layout": "concatenated"}
            check(
                "cpu", *(make(tokens, weight_layout="out_in", draw=n) for n in range(4)), **options
            )


# Negative controls: what is wrong on purpose must fail the rule


def swap_pairs(t, dim=-1):
    """gate 0, up 0, ... as up 0, gate 0, ..."""
    return t.unflatten(dim, (-1, 2)).flip(dim).flatten(dim - 1)


def wrong_outputs(wrong, inputs):
    """y with one mistake, by changed inputs or options of the reference."""
    options, changed = {}, dict(inputs)
    bias, ids = inputs["down_proj_bias"], inputs["topk_ids"]
    if wrong == "clamp_dropped":
        options["limit"] = 1e9
    elif wrong == "plain_sigmoid":
        options["alpha"] = 1.0
    elif wrong == "halves":
        options["gate_up_layout"] = "concatenated"
    elif wrong == "pairs_swapped":
        packed = inputs["gate_up_proj"]
        changed["gate_up_proj"] = Mxfp4Tensor(
            packed.blocks.unflatten(1, (-1, 2)).flip(2).flatten(1, 2),
            packed.scales.unflatten(1, (-1, 2)).flip(2).flatten(1, 2),
        )
        changed["gate_up_proj_bias"] = swap_pairs(inputs["gate_up_proj_bias"])
    elif wrong == "bias_after_weight":
        changed["down_proj_bias"] = None
        extra = bias[ids].sum(1)
        return call(changed) + extra
    elif wrong == "nibble_order":
        blocks, scales = inputs["gate_up_proj"]
        changed["gate_up_proj"] = Mxfp4Tensor(blocks >> 4 | blocks << 4, scales)
    elif wrong == "scale_off_by_one":
        blocks, scales = inputs["down_proj"]
        changed["down_proj"] = Mxfp4Tensor(blocks, scales + 1)
    elif wrong == "last_expert_forgotten":
        changed["topk_weights"] = inputs["topk_weights"].masked_fill(ids == 31, 0.0)
    return call(changed, **options)


WRONG = (
    "clamp_dropped", "plain_sigmoid", "halves", "pairs_swapped", "bias_after_weight",
    "nibble_order", "scale_off_by_one", "last_expert_forgotten",
)  # fmt: skip


@pytest.mark.parametrize("wrong", [*WRONG, "one_dropped"])
def test_mistakes_fail_the_rule(wrong, monkeypatch):
    inputs = make(64, experts=32, topk=4, packed=True, dtype=torch.bfloat16)
    with mk.backend("reference"):
        truth, eager = call(wide(inputs, torch.float64)).detach(), call(inputs)
        if wrong == "one_dropped":
            from medgpt_kernels.experts import reference

            def activate(pre, activation, layout, alpha, limit):
                gate, up = reference.split(pre, layout)
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                return up * gate * (gate * alpha).sigmoid()

            monkeypatch.setattr(reference, "activate", activate)
        found = wrong_outputs(wrong, inputs)
    testing.assert_close(eager, eager, truth)
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(found, eager, truth)


@backends
def test_gradients_of_clamped_values_vanish(backend):
    """Pre-activations beyond the limit: forgetting the clamp's gradient would show."""
    inputs = make()
    inputs["gate_up_proj_bias"] = torch.full_like(inputs["gate_up_proj_bias"], 500.0)
    found = outputs(backend, inputs)
    assert (found["d_gate_up_proj"] == 0).all()
    assert (found["d_x"] == 0).all()
    assert found["d_down_proj"].abs().max() > 0


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(45, 3, 64)}, r"float x \[T, H\]"),
        ({"x": torch.zeros(45, 63)}, "in_out weights from 63 to 2 I"),
        ({"x": torch.zeros(44, 64)}, r"topk_weights \[44, K\]"),
        ({"x": torch.zeros(45, 64).bfloat16()}, "dense weights of x's torch.bfloat16"),
        ({"gate_up_proj": torch.zeros(6, 64, 190)}, "weights from 64"),
        ({"down_proj": torch.zeros(6, 64, 96)}, "weights from 64"),
        ({"gate_up_proj_bias": torch.zeros(6, 191)}, r"gate_up_proj_bias \[6, 192\]"),
        ({"down_proj_bias": torch.zeros(6, 64).int()}, "float down_proj_bias"),
        ({"gate_up_a": torch.zeros(6, 4, 64)}, "both or neither"),
        (
            {"down_a": torch.zeros(6, 4, 64), "down_b": torch.zeros(6, 64, 4)},
            r"down_a \[6, 4, 96\]",
        ),
        ({"activation": "gelu"}, "activation swiglu_oai or swiglu, got 'gelu'"),
        ({"gate_up_layout": "halves"}, "gate_up_layout interleaved or concatenated"),
        ({"weight_layout": "nk"}, "weight_layout in_out or out_in"),
        ({"gate_up_proj": torch.zeros(6, 64, 0), "down_proj": torch.zeros(6, 0, 64)}, "I >= 1"),
        (
            {
                "x": torch.zeros(45, 0),
                "gate_up_proj": torch.zeros(6, 0, 192),
                "down_proj": torch.zeros(6, 96, 0),
            },
            r"E, H and I >= 1, got \[6, 0, 192\]",
        ),
        (
            {"gate_up_a": torch.zeros(6, 0, 64), "gate_up_b": torch.zeros(6, 192, 0)},
            r"R >= 1, got \[6, 0, 64\]",
        ),
        ({"limit": -1.0}, "limit >= 0, got -1.0"),
        ({"limit": float("nan")}, "limit >= 0, got nan"),
        ({"limit": None}, "a number for limit, got None"),
        ({"alpha": "1"}, "a number for alpha, got '1'"),
        ({"activation": "swiglu", "limit": 10.0}, "neither alpha nor limit with activation swiglu"),
        ({"activation": "swiglu", "alpha": 1.0}, "neither alpha nor limit with activation swiglu"),
        ({"lora": (None,) * 4}, "lora as ExpertLora or None, got tuple"),
    ],
)
def test_refuses(change, message):
    inputs = make()
    options = {n: t for n, t in change.items() if n not in inputs and n not in LORA}
    change = {n: t for n, t in change.items() if n not in options}
    pairs = dict.fromkeys(LORA) if any(n in LORA for n in change) else {}
    with pytest.raises(ValueError, match="experts: expected.*" + message):
        call({**inputs, **pairs, **change}, **options)


def test_refuses_what_is_no_routing_data():
    inputs = make()
    weights = (inputs["gate_up_proj"], None, inputs["down_proj"], None)
    data = routing_from_topk(inputs["topk_ids"], inputs["topk_weights"], 6)
    with pytest.raises(ValueError, match="experts: expected RoutingData, got tuple"):
        mk.experts(inputs["x"], tuple(data), *weights)
    none = mk.RoutingData(torch.zeros(45, 0), *data[1:4], *[torch.zeros(0).int()] * 2, None)
    with pytest.raises(ValueError, match=r"experts: expected topk_weights \[T, K\] with K >= 1"):
        mk.experts(inputs["x"], none, *weights)


def test_refuses_dense_beside_packed():
    inputs = make()
    packed = make(packed=True)["down_proj"]
    with pytest.raises(ValueError, match="both weights dense or both Mxfp4Tensor"):
        call({**inputs, "down_proj": packed})


@pytest.mark.parametrize("name", ["expert_offs", "gather_indices", "scatter_indices"])
def test_refuses_indices_that_lead_outside(name):
    inputs = make()
    data = routing_from_topk(inputs["topk_ids"], inputs["topk_weights"], 6)
    wrong = getattr(data, name).clone()
    wrong[3] = 1000
    arguments = (inputs["gate_up_proj"], None, inputs["down_proj"], None)
    with mk.backend("cpu"), pytest.raises(ValueError, match=f"experts: expected {name}"):
        mk.experts(inputs["x"], data._replace(**{name: wrong}), *arguments)
    with pytest.raises(ValueError, match=f"experts: expected {name} int32"):
        mk.experts(inputs["x"], data._replace(**{name: wrong.long()}), *arguments)


# The dispatcher's own checks, and compilation


def operator_tensors(**shape):
    """The fifteen tensors of the operators, in their order."""
    inputs = wide(make(**shape))
    down = inputs["down_proj"]
    data = routing_from_topk(inputs["topk_ids"], inputs["topk_weights"].detach(), down.shape[0])
    packed = isinstance(down, Mxfp4Tensor)
    pairs = [inputs[n] if packed else (inputs[n], None) for n in ("gate_up_proj", "down_proj")]
    return (
        inputs["x"], data.topk_weights.requires_grad_(), *data[3:6], *pairs[0],
        inputs.get("gate_up_proj_bias"), *pairs[1], inputs.get("down_proj_bias"),
        *(inputs.get(n) for n in LORA),
    )  # fmt: skip


OPTIONS = ("swiglu_oai", "interleaved", "in_out", 1.702, 7.0, 0.5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_opcheck(packed):
    tensors = operator_tensors(tokens=5, hidden=32, intermediate=32, packed=packed, rank=2)
    forward = torch.ops.medgpt_kernels.experts_fwd.default
    torch.library.opcheck(forward, (*tensors, *OPTIONS, True))


def test_opcheck_backward():
    tensors = operator_tensors(tokens=5, hidden=8, intermediate=12, rank=2)
    tensors = [None if t is None else t.detach() for t in tensors]
    y, pre = torch.ops.medgpt_kernels.experts_fwd.default(*tensors, *OPTIONS, True)
    backward = torch.ops.medgpt_kernels.experts_bwd.default
    for wanted in ([True] * 10, [True, False] * 5, [False] * 10):
        torch.library.opcheck(backward, (torch.ones_like(y), pre, *tensors, *OPTIONS, wanted))


def test_double_backward_raises():
    inputs = wide(make(5))
    (grad,) = torch.autograd.grad(call(inputs).square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_compiles_at_most_twice_over_random_lengths(packed):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(inputs):
        return call(inputs).square().sum()

    g = torch.Generator().manual_seed(0)
    for i in range(20):
        tokens = int(torch.randint(2, 40, (1,), generator=g))
        inputs = wide(make(tokens, 32, 32, packed=packed, draw=i))
        leaves = [inputs[n] for n in ("x", "topk_weights", "gate_up_proj_bias")]
        found = torch.autograd.grad(step(inputs), leaves)
        expected = torch.autograd.grad(call(inputs).square().sum(), leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2
