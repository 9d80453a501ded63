"""On a card: every op against its reference, wrong kernels refused, and what only a card can show.

MEDGPT_DRY_RUN=1, with Triton's interpreter and the host runtime, runs the same on the CPU
(benchmarks/gpu_report.py --dry-run), so that these tests cannot rot where no card is.
"""

import functools
import importlib.util
import os

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import native, registry, selftest, testing
from medgpt_kernels.testing import ToleranceError, assert_close

DRY = os.environ.get("MEDGPT_DRY_RUN") == "1"
DEVICE = "cpu" if DRY else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="no GPU"),
]
needs_card = pytest.mark.skipif(DRY, reason="only a card shows it")
BACKENDS = ("triton", "cuda")
DTYPES = (torch.bfloat16,) if DRY else selftest.DTYPES


def exists(op: str, backend: str) -> bool:
    return importlib.util.find_spec(f"medgpt_kernels.{op}.{backend}") is not None


def require(backend: str) -> None:
    """Skip where this build or this machine has no such backend."""
    try:
        if backend == "cuda":
            native.cuda(0)
        else:
            pytest.importorskip("triton")
    except registry.Unsupported as reason:
        pytest.skip(str(reason))
    if DRY:
        testing.patch_interpreter_bf16()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "backend"), [(op, b) for op in selftest.OPS for b in BACKENDS if exists(op, b)]
)
def test_forward_and_backward(op, backend, dtype):
    require(backend)
    assert selftest.verdict(op, DEVICE, dtype, backend) == "ok"


@needs_card
def test_cuda_library():
    require("cuda")
    assert native.cuda(0).probe(0) == ""


def values(shape, seed, dtype, compute, scale=1.0):
    """Rounded to `dtype`, then as `compute`."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype).to(DEVICE, compute)


def wide(compute: torch.dtype) -> torch.dtype:
    return torch.promote_types(compute, torch.float32)


@functools.cache
def tables(truncate: bool) -> mk.Rotary:
    return mk.yarn_rotary(64, 512, truncate=truncate).to(torch.device(DEVICE))


def attending(dtype, compute, **changed):
    shapes = {"q": (97, 8, 64), "k": (97, 2, 64), "v": (97, 2, 64)}
    made = {n: values(s, i, dtype, compute) for i, (n, s) in enumerate(shapes.items())}
    made["sinks"] = values((8,), 3, torch.float32, wide(compute))
    bounds = torch.tensor([0, 40, 41, 97], dtype=torch.int32, device=DEVICE)
    made |= {"cu_seqlens_q": bounds, "max_seqlen_q": 56, "max_seqlen_k": 56}
    return mk.attention(**made | {"window_size": (31, 0), "rotary": tables(False)} | changed)


def decoding(dtype, compute, **changed):
    made = {"q": values((2, 1, 8, 64), 0, dtype, compute)}
    for i, name in enumerate(("k_cache", "v_cache")):
        made[name] = values((2, 256, 2, 64), 1 + i, dtype, compute)
    for i, name in enumerate(("k", "v")):
        made[name] = values((2, 1, 2, 64), 3 + i, dtype, compute)
    made["sinks"] = values((8,), 5, torch.float32, torch.float32)
    made["cache_seqlens"] = torch.tensor([200, 90], dtype=torch.int32, device=DEVICE)
    return mk.decode_attention(**made | {"window_size": (31, 0), "rotary": tables(False)} | changed)


def multiplying(dtype, compute, **changed):
    """Six tokens on packed experts, some gates and ups beyond the limit."""
    ids = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :4]
    weights = values((6, 4), 1, torch.float32, wide(compute)).softmax(-1)
    data = mk.routing_from_topk(ids.to(DEVICE), weights, 8)
    made = {"x": values((6, 64), 2, dtype, compute), "routing_data": data}
    for i, (name, rows, columns) in enumerate((("gate_up", 192, 64), ("down", 64, 96))):
        with mk.backend("reference"):
            dense = values((8, rows, columns), 3 + i, torch.float32, torch.float32)
            made[f"{name}_proj"] = mk.mxfp4_quantize(dense)
        made[f"{name}_proj_bias"] = values((8, rows), 5 + i, dtype, compute, 8.0)
    return mk.experts(**made | changed)


def choosing(dtype, compute, **changed):
    made = {
        "x": values((13, 64), 0, dtype, compute),
        "weight": values((32, 64), 1, dtype, compute),
        "bias": values((32,), 2, dtype, compute),
    }
    return mk.routing(**made | {"topk": 4} | changed).logits


def embedding(dtype, compute, **changed):
    g = torch.Generator().manual_seed(0)
    sizes = ((64, 96), (16, 16), (112, 48))
    images = mk.pack_images(
        [torch.randint(0, 256, (h, w, 3), generator=g, dtype=torch.uint8) for h, w in sizes],
        device=DEVICE,
    )
    made = {
        "weight": values((96, 768), 1, dtype, compute, 768**-0.5),
        "bias": values((96,), 2, dtype, compute),
        "position_embedding": values((6, 6, 96), 3, dtype, compute),
    }
    options = {"patch_size": 16, "weight_layout": "linear", "mean": [0.5] * 3, "std": [0.5] * 3}
    return mk.patch_embed(images, **made | options | changed).tokens


def rotating(dtype, compute, **changed):
    q, k = values((97, 8, 64), 0, dtype, compute), values((97, 2, 64), 1, dtype, compute)
    return mk.apply_rotary(q, k, **{"rotary": tables(False)} | changed)[0]


def truncated():
    return {"rotary": tables(True)}


# op, its call, what a wrong kernel would leave out or change
CONTROLS = {
    "attention without sinks": ("attention", attending, {"sinks": None}),
    "attention window short of a key": ("attention", attending, {"window_size": (30, 0)}),
    "attention truncated rotary": ("attention", attending, truncated),
    "decode without sinks": ("decode_attention", decoding, {"sinks": None}),
    "decode window short of a key": ("decode_attention", decoding, {"window_size": (30, 0)}),
    "decode truncated rotary": ("decode_attention", decoding, truncated),
    "experts without clamp": ("experts", multiplying, {"limit": 1e4}),
    "experts without up bias": ("experts", multiplying, {"gate_up_proj_bias": None}),
    "experts without down bias": ("experts", multiplying, {"down_proj_bias": None}),
    "routing without bias": ("routing", choosing, {"bias": None}),
    "patch_embed without bias": ("patch_embed", embedding, {"bias": None}),
    "patch_embed without positions": ("patch_embed", embedding, {"position_embedding": None}),
    "rotary truncated": ("rotary", rotating, truncated),
}


# at short distances 16 bits hide which frequencies were rounded
WIDE_ONLY = ("attention truncated rotary", "decode truncated rotary")


@pytest.mark.parametrize(
    ("control", "backend", "dtype"),
    [
        (name, backend, dtype)
        for name, (op, *_) in CONTROLS.items()
        for backend in BACKENDS
        if exists(op, backend)
        for dtype in (DTYPES if name not in WIDE_ONLY else (torch.float32,))
    ],
    ids=str,
)
def test_negative_control(control, backend, dtype):
    require(backend)
    _, call, change = CONTROLS[control]
    with torch.no_grad():
        with mk.backend("reference"):
            truth, eager = call(dtype, torch.float64), call(dtype, dtype)
        with mk.backend(backend):
            right = call(dtype, dtype)
            wrong = call(dtype, dtype, **(change() if callable(change) else change))
    assert_close(right, eager, truth)
    with pytest.raises(ToleranceError):
        assert_close(wrong, eager, truth)


def sorted_alike(found, expected):
    for name, value in expected._asdict().items():
        if not value.dtype.is_floating_point:
            assert torch.equal(getattr(found, name).cpu(), value), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 33] if DRY else [1, 16, 33, 4096])
@pytest.mark.parametrize("experts", [32, 256])
def test_routing_sorts_alike(backend, tokens, experts):
    """All tiles, and the block that comes last, on a device where blocks do run at once."""
    require(backend)
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    expected = mk.routing_from_logits(logits, 4)
    for _ in range(1 if DRY else 20):
        with mk.backend(backend):
            sorted_alike(mk.routing_from_logits(logits.to(DEVICE), 4), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    """No tokens, and sequences of length 0: grids of 0 are not launched."""
    require(backend)
    q = torch.empty(0, 8, 64, dtype=torch.bfloat16, device=DEVICE)
    none = torch.tensor([0, 0, 0], dtype=torch.int32, device=DEVICE)
    with mk.backend(backend):
        if backend == "triton":
            lengths = {"cu_seqlens_q": none, "max_seqlen_q": 0, "max_seqlen_k": 0}
            assert mk.attention(q, q[:, :2], q[:, :2], **lengths).shape == q.shape
        assert mk.apply_rotary(q, q[:, :2], tables(False))[0].shape == q.shape
        logits = torch.empty(0, 32, device=DEVICE)
        assert mk.routing_from_logits(logits, 4).expert_hist.tolist() == [0] * 32


def test_backward_repeats_bitwise():
    require("triton")

    tokens = 33 if DRY else 257

    def gradients():
        shapes = {"q": (tokens, 8, 64), "k": (tokens, 2, 64), "v": (tokens, 2, 64)}
        made = [values(s, i, torch.bfloat16, torch.bfloat16) for i, s in enumerate(shapes.values())]
        leaves = [t.requires_grad_() for t in made]
        with mk.backend("triton"):
            out = mk.attention(*leaves, rotary=tables(False))
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


@needs_card
@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_follow_the_current_stream(backend):
    """Inputs that arrive late on a side stream: a launch on another stream would not wait."""
    require(backend)
    late = values((64, 32), 0, torch.float32, torch.float32)
    expected = mk.routing_from_logits(late, 4).topk_ids.clone()
    logits = torch.zeros_like(late)
    side = torch.cuda.Stream()
    with mk.backend(backend):
        mk.routing_from_logits(logits, 4)  # compiled before the clock of the stream runs
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            logits.copy_(late)
            found = mk.routing_from_logits(logits, 4).topk_ids
        side.synchronize()
    assert torch.equal(found, expected)


@needs_card
def test_lengths_do_not_recompile():
    from medgpt_kernels.attention import triton_fwd

    def lengths(tokens):
        q = values((tokens, 8, 64), 0, torch.bfloat16, torch.bfloat16)
        mk.attention(q, q[:, :2], q[:, :2], window_size=(127, 0))

    with mk.backend("triton"):
        lengths(300)
        kernel = triton_fwd._attention_fwd_kernel
        before = sum(len(cache[0]) for cache in kernel.device_caches.values())
        for tokens in (301, 512, 1023):
            lengths(tokens)
        after = sum(len(cache[0]) for cache in kernel.device_caches.values())
    assert after == before


@needs_card
def test_offsets_past_32_bits():
    """More than 2^31 elements of q: the last tokens attend as they do alone."""
    require("triton")
    tokens, heads, window = 2**20 + 300, 32, 127
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    q = torch.zeros(tokens, heads, 64, dtype=torch.bfloat16, device="cuda")
    k = torch.zeros(tokens, 8, 64, dtype=torch.bfloat16, device="cuda")
    q[-300:], k[-300:] = (
        values((300, n, 64), n, torch.bfloat16, torch.bfloat16) for n in (heads, 8)
    )
    assert q.numel() > 2**31
    last = [x[-300:] for x in (q, k, k)]
    with torch.no_grad():
        with mk.backend("triton"):
            whole = mk.attention(q, k, k, window_size=(window, 0))[-100:]
        with mk.backend("reference"):
            eager = mk.attention(*last, window_size=(window, 0))[-100:]
            truth = mk.attention(*(x.double() for x in last), window_size=(window, 0))[-100:]
    assert_close(whole, eager, truth)


def cached(device, dtype, lengths, capacity=1024):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 16), "k": (1, 4), "v": (1, 4)}
    made = {n: torch.randn(len(lengths), *s, 64, generator=g).to(dtype) for n, s in shapes.items()}
    for name in ("k_cache", "v_cache"):
        made[name] = torch.randn(len(lengths), capacity, 4, 64, generator=g).to(dtype)
    made["sinks"] = torch.randn(16, generator=g)
    made["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    return {n: t.to(device) for n, t in made.items()}


@needs_card
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_in_a_graph_follows_the_lengths(backend):
    """One capture serves every length: the launch shapes depend on maxima only."""
    require(backend)
    lengths = ([0, 700], [255, 256], [1000, 1])
    arguments = cached("cuda", torch.bfloat16, lengths[0])
    rotary = mk.yarn_rotary(64, 1024, truncate=False)

    def step(given, tables):
        return mk.decode_attention(**given, rotary=tables)

    on_card = mk.Rotary(*(t.cuda() for t in rotary))
    with torch.no_grad(), mk.backend(backend):
        step(arguments, on_card)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(arguments, on_card)
    for row in lengths:
        fresh = cached("cpu", torch.bfloat16, row)
        for name, t in fresh.items():
            arguments[name].copy_(t)
        graph.replay()
        with torch.no_grad(), mk.backend("reference"):
            eager = step(cached("cpu", torch.bfloat16, row), rotary)
            wider = {n: t if n == "cache_seqlens" else t.double() for n, t in fresh.items()}
            truth = step(wider, rotary)
        testing.assert_close(out.cpu(), eager, truth, name=str(row))
