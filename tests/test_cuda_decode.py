"""decode_attention as CUDA C++ splits it: lengths around splits and pages, against fp64."""

import pytest
import torch

from medgpt_kernels import testing

op = pytest.importorskip("medgpt_kernels.decode_attention.op")
mk = pytest.importorskip("medgpt_kernels")

BACKENDS = [b for b in testing.backend_modules("decode_attention") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = torch.float8_e4m3fn

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def make(
    lengths=(0, 1, 37),
    *,
    tokens=1,
    heads=4,
    kv_heads=2,
    head_dim=64,
    capacity=320,
    page=None,
    dtype=torch.float32,
    fp8=False,
    append=True,
    sinks=True,
    rotary=True,
    seed=0,
):
    """Arguments by name; pages are shuffled, entries that must not be read are out of range."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    batches, table = len(lengths), None
    if page is None:
        shape = (batches, capacity, kv_heads, head_dim)
    else:
        per_row = -(-capacity // page)
        shape = (batches * per_row + 2, page, kv_heads, head_dim)
        table = torch.randperm(batches * per_row, generator=g).view(batches, per_row).int()
        for b, length in enumerate(lengths):
            table[b, -(-(max(length, 0) + tokens) // page) :] = 10**6
    caches = [noise(*shape) for _ in range(2)]
    made = {"q": noise(batches, tokens, heads, head_dim), "block_table": table}
    if append:
        made |= {n: noise(batches, tokens, kv_heads, head_dim) for n in ("k", "v")}
    if fp8:
        caches = [c.float().clamp(-448, 448).to(FP8) for c in caches]
        made |= {n: torch.rand(kv_heads, generator=g) + 0.5 for n in ("k_scale", "v_scale")}
    if sinks:
        made["sinks"] = torch.randn(heads, generator=g) * 2
    if rotary and append:
        made["rotary"] = mk.yarn_rotary(min(head_dim, 32), 1024, truncate=False)
    made |= {"k_cache": caches[0], "v_cache": caches[1]}
    return made | {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}


def run(backend, arguments, compute=None, **options):
    """out and both caches; caches are copied first, since they are written."""
    made = {}
    for name, t in arguments.items():
        if isinstance(t, torch.Tensor) and t.dtype.is_floating_point and t.dtype != FP8:
            keep = name in ("sinks", "k_scale", "v_scale") and compute is None
            t = t if compute is None or keep or name.endswith("scale") else t.to(compute)
        made[name] = t.clone() if isinstance(t, torch.Tensor) else t
    with torch.no_grad(), mk.backend(backend), testing.poisoned_empty():
        out = op.decode_attention(**made, **options)
    return out, made["k_cache"], made["v_cache"]


def check(backend, arguments, **options):
    truth, eager, actual = (
        run(name, arguments, compute, **options)
        for name, compute in (("reference", torch.float64), ("reference", None), (backend, None))
    )
    for name, *found in zip(("out", "k_cache", "v_cache"), actual, eager, truth, strict=True):
        testing.assert_close(*(t.double() if t.dtype == FP8 else t for t in found), name=name)
    return actual


@backends
@dtypes
@pytest.mark.parametrize("page", [None, 16, 48], ids=["dense", "paged", "paged-48"])
def test_decode(backend, dtype, page):
    check(backend, make((0, 1, 37, 255), dtype=dtype, page=page))


@backends
@pytest.mark.parametrize("page", [None, 16])
def test_lengths_around_pages_and_splits(backend, page):
    lengths = (15, 16, 17, 255, 256, 257, 511, 512)
    check(backend, make(lengths, capacity=544, page=page))


@backends
@pytest.mark.parametrize("tokens", [2, 5, 16])
@pytest.mark.parametrize("window", [(-1, -1), (31, 0)], ids=["full", "window"])
def test_several_new_tokens(backend, tokens, window):
    arguments = make((0, 250, 255, 256), tokens=tokens, heads=8, kv_heads=2, page=16)
    check(backend, arguments, window_size=window)


@backends
@pytest.mark.parametrize("left", [0, 1, 127, 255, 256, 300])
def test_windows(backend, left):
    check(backend, make((0, 100, 300, 511), capacity=544), window_size=(left, 0))


@backends
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 1), (6, 2), (20, 2)])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_heads(backend, heads, kv_heads, head_dim):
    check(backend, make((40, 7), heads=heads, kv_heads=kv_heads, head_dim=head_dim, capacity=64))


@backends
@dtypes
@pytest.mark.parametrize("page", [None, 16], ids=["dense", "paged"])
def test_fp8_cache(backend, dtype, page):
    check(backend, make((0, 37, 255), dtype=dtype, fp8=True, page=page, tokens=3))


@backends
@pytest.mark.parametrize("tokens", [1, 4])
def test_cached_keys_alone(backend, tokens):
    """Without k the lengths count everything; a query before the first key sees none."""
    arguments = make((0, 1, 3, 256, 300), tokens=tokens, append=False)
    out, k_cache, _ = check(backend, arguments)
    assert torch.equal(k_cache, arguments["k_cache"])
    assert (out[0] == 0).all()
    check(backend, arguments | {"sinks": None})


@backends
def test_skipped_rows(backend):
    arguments = make((-1, 12, -1))
    out, k_cache, _ = check(backend, arguments)
    assert (out[0] == 0).all()
    assert (out[2] == 0).all()
    assert torch.equal(k_cache[0], arguments["k_cache"][0])


@backends
def test_a_row_does_not_depend_on_its_batch(backend):
    arguments = make((3, 256, 300), dtype=torch.bfloat16)
    whole = run(backend, arguments)[0]
    for b in range(3):
        alone = {
            n: t[b : b + 1] if n in ("q", "k", "v", "k_cache", "v_cache", "cache_seqlens") else t
            for n, t in arguments.items()
        }
        assert torch.equal(run(backend, alone)[0][0], whole[b])


@backends
def test_what_no_query_sees_is_not_read(backend):
    """NaN behind the window, past the length, and in pages of no sequence."""
    arguments = make((100, 290), capacity=320, page=16)
    options = {"window_size": (40, 0)}
    expected = run(backend, arguments, **options)[0]
    for b, length in enumerate((100, 290)):
        first = (length - 40) // 16
        arguments["block_table"][b, :first] = 10**6
    for cache in (arguments["k_cache"], arguments["v_cache"]):
        cache[-2:] = float("nan")
    assert torch.equal(run(backend, arguments, **options)[0], expected)


@backends
def test_a_dropped_sink_is_noticed(backend):
    arguments = make((37,))
    truth = run("reference", arguments, torch.float64)[0]
    eager = run("reference", arguments)[0]
    wrong = run(backend, arguments | {"sinks": None})[0]
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(wrong, eager, truth)
