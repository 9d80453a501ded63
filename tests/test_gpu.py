"""On a card: every op against its reference, and what only a card can show."""

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import native, registry, selftest, testing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_selftest():
    failed = [v for v in selftest.verdicts() if v[1] == "cuda" and v[4] != "ok"]
    assert not failed, failed


def test_cuda_library():
    try:
        library = native.cuda(0)
    except registry.Unsupported as reason:
        pytest.skip(str(reason))
    assert library.probe(0) == ""


def sorted_alike(found, expected):
    for name, value in expected._asdict().items():
        if not value.dtype.is_floating_point:
            assert torch.equal(getattr(found, name).cpu(), value), name


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("tokens", [1, 16, 33, 4096])
@pytest.mark.parametrize("experts", [32, 256])
def test_routing_sorts_alike(backend, tokens, experts):
    """All tiles, and the block that comes last, on a device where blocks do run at once."""
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    expected = mk.routing_from_logits(logits, 4)
    for _ in range(20):
        with mk.backend(backend):
            sorted_alike(mk.routing_from_logits(logits.cuda(), 4), expected)


def decoding(device, dtype, lengths, capacity=1024):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 16), "k": (1, 4), "v": (1, 4)}
    made = {n: torch.randn(len(lengths), *s, 64, generator=g).to(dtype) for n, s in shapes.items()}
    for name in ("k_cache", "v_cache"):
        made[name] = torch.randn(len(lengths), capacity, 4, 64, generator=g).to(dtype)
    made["sinks"] = torch.randn(16, generator=g)
    made["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    return {n: t.to(device) for n, t in made.items()}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_decoding_in_a_graph_follows_the_lengths(backend):
    """One capture serves every length: the launch shapes depend on maxima only."""
    lengths = ([0, 700], [255, 256], [1000, 1])
    arguments = decoding("cuda", torch.bfloat16, lengths[0])
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
        fresh = decoding("cpu", torch.bfloat16, row)
        for name, t in fresh.items():
            arguments[name].copy_(t)
        graph.replay()
        with torch.no_grad(), mk.backend("reference"):
            eager = step(decoding("cpu", torch.bfloat16, row), rotary)
            wide = {n: t if n == "cache_seqlens" else t.double() for n, t in fresh.items()}
            truth = step(wide, rotary)
        testing.assert_close(out.cpu(), eager, truth, name=str(row))
