"""attention: every backend against fp64 by the tolerance rule, and against transformers."""

import itertools

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import testing

BACKENDS = [b for b in testing.backend_modules("attention") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPEN, WINDOW = (-1, -1), (7, 0)

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def make(
    len_q=33, len_k=None, *, heads=16, kv_heads=4, head_dim=64, dtype=torch.float32, batch=0, draw=0
):
    """q, k, v with outlier channels, scores within about 20 and sinks as trained ones have them.

    Many heads: the rule compares error norms, and those of four sinks would be four draws of luck.
    """
    len_k = len_q if len_k is None else len_k
    lead = (batch,) if batch else ()
    q = testing.realistic(*lead, len_q, heads, head_dim, seed=10 * draw + 1, outliers=1) * 0.1
    k = testing.realistic(*lead, len_k, kv_heads, head_dim, seed=10 * draw + 2, outliers=0)
    v = testing.realistic(*lead, len_k, kv_heads, head_dim, seed=10 * draw + 3, outliers=1)
    sinks = torch.linspace(-2, 4, heads)
    return [t.to(dtype) for t in (q, k, v)] + [sinks]


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def outputs(backend, tensors, compute=None, with_lse_gradient=True, **options):
    """out, lse and the gradients of every input; inputs as rounded, computed in `compute`."""
    leaves = [
        None if t is None else t.detach().to(compute or t.dtype).requires_grad_() for t in tensors
    ]
    q, k, v, sinks = leaves
    with mk.backend(backend), testing.poisoned_empty():
        out, lse = mk.attention(q, k, v, sinks=sinks, return_lse=True, **options)
        d_out = testing.realistic(*out.shape, dtype=tensors[0].dtype, seed=4, outliers=0)
        d_out = d_out.to(out.dtype)
        d_lse = torch.linspace(-1, 1, lse.numel()).view(lse.shape).to(lse.dtype)
        finite = lse.detach().isfinite()
        losses, seeds = [out], [d_out]
        if with_lse_gradient and finite.all():
            losses, seeds = [out, lse], [d_out, d_lse]
        wanted = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(losses, wanted, seeds)
    names = ["d_q", "d_k", "d_v", "d_sinks"][: len(grads)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def check(backend, tensors, *more_draws, **options):
    """Hold every output to the rule; short inputs come in several draws, whose errors are pooled.

    The rule compares two error norms. Those of a few dozen rows with an outlier are luck, and the
    eager one as often exceeds twice the kernel's as the other way round.
    """
    draws = [tensors, *more_draws]
    truth, eager, actual = (
        [outputs(name, t, compute, **options) for t in draws]
        for name, compute in (("reference", torch.float64), ("reference", None), (backend, None))
    )
    for name in truth[0]:
        pooled = [torch.cat([o[name].flatten() for o in found]) for found in (actual, eager, truth)]
        extra = 2 if name == "d_sinks" else 0
        testing.assert_close(*pooled, name=name, extra_ulp=extra)
    return actual[0]


# Forward and backward


@backends
@dtypes
@pytest.mark.parametrize("window", [OPEN, WINDOW], ids=["full", "window"])
def test_packed(backend, dtype, window):
    check(backend, make(dtype=dtype), cu_seqlens_q=cu(20, 1, 0, 12), window_size=window)


@backends
@dtypes
def test_rotary_gives_gradients_of_the_unrotated(backend, dtype):
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    check(backend, make(dtype=dtype), cu_seqlens_q=cu(20, 13), window_size=WINDOW, rotary=rotary)


@backends
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [OPEN, (5, 3), (0, 0)], ids=["full", "window", "self"])
def test_batched(backend, causal, window):
    left, right = window
    window = (left, min(right, 0)) if causal else window
    check(backend, make(19, batch=2), causal=causal, window_size=window)


@backends
def test_packed_looking_ahead(backend):
    """A window on both sides, and cross attention to keys of other lengths."""
    check(backend, make(), cu_seqlens_q=cu(20, 13), causal=False, window_size=(4, 2))
    lengths = {"cu_seqlens_q": cu(3, 1, 8), "cu_seqlens_k": cu(9, 20, 8)}
    check(backend, make(12, 37), causal=False, **lengths)


@backends
@pytest.mark.parametrize("head_dim", [32, 72, 80, 96, 128, 256])
def test_head_dims(backend, head_dim):
    check(backend, make(17, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [1, 33, 40, 256])
def test_head_dims_of_bf16_on_every_isa(head_dim, monkeypatch):
    """CPUs with bf16 dot products take two channels, keys or queries at a time."""
    from medgpt_kernels import native

    for isa in native.supported_isas():
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        draws = (make(67, head_dim=head_dim, dtype=torch.bfloat16, draw=n) for n in range(2))
        check("cpu", *draws, cu_seqlens_q=cu(1, 2, 61, 3), window_size=(9, 0))


@backends
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 1), (6, 2), (3, 3)])
def test_grouped_heads(backend, heads, kv_heads):
    check(backend, make(17, heads=heads, kv_heads=kv_heads))


@backends
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_fewer_queries_than_keys(backend, rotary):
    """The causal diagonal is aligned with the last key; with rotary, queries are the last ones."""
    options = {"rotary": mk.yarn_rotary(32, 64, truncate=False)} if rotary else {}
    lengths = {"cu_seqlens_q": cu(3, 1, 8), "cu_seqlens_k": cu(9, 20, 8)}
    check(backend, make(12, 37), **lengths, window_size=WINDOW, **options)
    check(backend, make(12, 37), **lengths, **options)


@backends
@pytest.mark.parametrize("window", [OPEN, (127, 0)], ids=["full", "window"])
def test_real_report_lengths(backend, window):
    """Packed radiology reports; Triton's interpreter takes three of them."""
    material = pytest.importorskip("material")
    lengths = material.REPORT_LENGTHS[: 3 if backend == "triton" else 8]
    tensors = make(sum(lengths), heads=8, kv_heads=2)
    rotary = mk.yarn_rotary(64, 512, truncate=False)
    check(backend, tensors, cu_seqlens_q=cu(*lengths), window_size=window, rotary=rotary)


@backends
def test_position_ids(backend):
    at = torch.arange(33) * 3 % 40
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    check(backend, make(), rotary=rotary, position_ids=at)
    packed = {"cu_seqlens_q": cu(20, 13), "position_ids": at.int()}
    check(backend, make(), rotary=rotary, **packed)
    check(backend, make(batch=2), rotary=rotary, position_ids=at)


@backends
def test_without_sinks(backend):
    q, k, v, _ = make(17)
    check(backend, [q, k, v, None])


@backends
def test_queries_that_see_nothing(backend):
    """More queries than keys: the first see no key; they give 0 and the sink, and no gradient."""
    actual = check(backend, *(make(9, 4, draw=n) for n in range(6)))
    assert (actual["out"][:5] == 0).all()
    sinks = make(9, 4)[3]
    torch.testing.assert_close(actual["lse"][:, :5], sinks[:, None].expand(-1, 5))
    q, k, v, _ = make(9, 4)
    without = outputs(backend, [q, k, v, None], with_lse_gradient=False)
    assert (without["lse"][:, :5] == float("-inf")).all()
    assert (without["out"][:5] == 0).all()
    assert all(without[n].isfinite().all() for n in ("d_q", "d_k", "d_v"))


def test_reference_gradcheck():
    rotary = mk.yarn_rotary(4, 16, truncate=False)
    q, k, v, sinks = (
        t.double().requires_grad_() for t in make(7, 9, heads=2, kv_heads=1, head_dim=6)
    )
    lengths = {"cu_seqlens_q": cu(3, 4), "cu_seqlens_k": cu(4, 5)}

    def run(q, k, v, sinks):
        return mk.attention(
            q, k, v, sinks=sinks, rotary=rotary, window_size=(2, 0), return_lse=True, **lengths
        )

    with mk.backend("reference"):
        assert torch.autograd.gradcheck(run, (q, k, v, sinks))


# Second oracle: transformers' eager gpt-oss attention


@backends
@pytest.mark.parametrize("window", [None, 8])
def test_equals_transformers_gpt_oss(backend, window):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v, sinks = make(33, batch=2)

    class Module(torch.nn.Module):
        num_key_value_groups = 4
        training = False

    def eager(dtype):
        module = Module()
        module.sinks = sinks.to(dtype)
        at = torch.arange(33)
        keep = at[:, None] >= at[None, :]
        if window is not None:
            keep &= at[:, None] - at[None, :] < window
        mask = torch.zeros(33, 33, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
        views = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
        out, _ = eager_attention_forward(module, *views, mask[None, None], scaling=64**-0.5)
        return out

    with mk.backend(backend):
        found = mk.attention(
            q, k, v, sinks=sinks, window_size=OPEN if window is None else (window - 1, 0)
        )
    testing.assert_close(found, eager(torch.float32), eager(torch.float64))


# Properties


@backends
def test_packed_equals_one_by_one(backend):
    q, k, v, sinks = make(33)
    bounds = cu(20, 1, 12)
    with mk.backend(backend):
        packed = mk.attention(q, k, v, sinks=sinks, cu_seqlens_q=bounds)
        for begin, end in itertools.pairwise(bounds.tolist()):
            alone = mk.attention(q[begin:end], k[begin:end], v[begin:end], sinks=sinks)
            torch.testing.assert_close(packed[begin:end], alone)


@backends
@pytest.mark.parametrize("deterministic", [False, True])
def test_bitwise_repeatable(backend, deterministic):
    """The default as well. One long sequence: the CPU cuts each key head into several parts."""
    tensors = make(33 if backend == "triton" else 700, heads=8, kv_heads=1)
    options = {"rotary": mk.yarn_rotary(64, 700, truncate=False), "deterministic": deterministic}
    first = outputs(backend, tensors, **options)
    for _ in range(1 if backend == "triton" else 5):
        again = outputs(backend, tensors, **options)
        assert all(torch.equal(first[n], again[n]) for n in first)


@backends
def test_largest_windows_are_open(backend):
    q, k, v, sinks = make(17)
    with mk.backend(backend):
        whole = mk.attention(q, k, v, sinks=sinks, causal=False)
        for side in (2**31 - 1, 2**31, 2**63 - 1):
            found = mk.attention(q, k, v, sinks=sinks, causal=False, window_size=(side, side))
            assert torch.equal(found, whole)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_polynomial_exp2(backend, monkeypatch):
    from medgpt_kernels.attention import triton_exp2

    q, k, v, sinks = make()
    plain = outputs(backend, [q, k, v, sinks])
    monkeypatch.setenv("MEDGPT_KERNELS_POLY_EXP2", "1")
    taken = outputs(backend, [q, k, v, sinks])
    assert not torch.equal(plain["out"], taken["out"])
    # a few of the probabilities, each 3e-6 off: far below the half a bf16 ulp it is meant for
    assert (plain["out"] - taken["out"]).abs().max() < 4e-6 * v.abs().max()
    monkeypatch.setenv("MEDGPT_KERNELS_POLY_EXP2", "0")
    assert triton_exp2.how_to_exp2({"POLY_EXP2": 1}, q) == 0


@backends
def test_merge_of_two_halves_of_the_keys(backend):
    q, k, v, sinks = make(16)
    with mk.backend(backend):
        whole, lse = mk.attention(q, k, v, sinks=sinks, causal=False, return_lse=True)
        a = mk.attention(q, k[:9], v[:9], sinks=sinks, causal=False, return_lse=True)
        b = mk.attention(q, k[9:], v[9:], causal=False, return_lse=True)
    merged, merged_lse = mk.merge_attention(*a, *b)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=1e-5)


@backends
def test_strided_inputs(backend):
    """Views of one fused projection, and [B, H, S, D] as transformers holds them."""
    fused = torch.randn(2, 17, 8, 64)
    views = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in views]
    with mk.backend(backend):
        expected = mk.attention(*(t.contiguous() for t in views))
        assert torch.equal(mk.attention(*views), expected)
        assert torch.equal(mk.attention(*turned), expected)


@backends
def test_autocast_casts_q_k_v_only(backend):
    q, k, v, sinks = make(17)
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    with mk.backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = mk.attention(q, k, v, sinks=sinks, rotary=rotary)
        narrow = (t.bfloat16() for t in (q, k, v))
        expected = mk.attention(*narrow, sinks=sinks, rotary=rotary)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@backends
def test_merge_gives_the_gradients_of_the_whole(backend):
    """Its lse gradients pass through each part's operator."""
    q, k, v, sinks = (t.requires_grad_() for t in make(16))
    d_out, d_lse = torch.randn(16, 16, 64), torch.randn(16, 16)

    def parts():
        a = mk.attention(q, k[:9], v[:9], sinks=sinks, causal=False, return_lse=True)
        b = mk.attention(q, k[9:], v[9:], causal=False, return_lse=True)
        return mk.merge_attention(*a, *b)

    def whole():
        return mk.attention(q, k, v, sinks=sinks, causal=False, return_lse=True)

    with mk.backend(backend):
        found, expected = (
            torch.autograd.grad(f(), (q, k, v, sinks), (d_out, d_lse)) for f in (parts, whole)
        )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_merge_of_parts_that_see_nothing():
    """No NaN, neither forward nor backward, where one side or both are empty."""
    lse = torch.tensor([[0.5, float("-inf"), float("-inf")]], requires_grad=True)
    other = torch.tensor([[float("-inf"), 0.25, float("-inf")]], requires_grad=True)
    outs = [torch.full((3, 1, 2), x, requires_grad=True) for x in (1.0, 2.0)]
    merged, merged_lse = mk.merge_attention(outs[0], lse, outs[1], other)
    assert merged[:, 0, 0].tolist() == [1.0, 2.0, 0.0]
    assert merged_lse.tolist() == [[0.5, 0.25, float("-inf")]]
    grads = torch.autograd.grad(merged.sum() + merged_lse[0, :2].sum(), (*outs, lse, other))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("window", [OPEN, (40, 0), (20, 20)], ids=["full", "causal", "both"])
def test_one_key_head_cut_into_parts(window):
    """The CPU backward splits a long key head among threads and adds the parts' sums."""
    causal = window[1] < 1
    check("cpu", make(400, heads=4, kv_heads=1), window_size=window, causal=causal)


def test_a_key_that_all_rows_see_loses_no_bits(monkeypatch):
    """d_v of the first key is a sum over 32,768 rows of one sign, p = 1 / keys seen."""
    from medgpt_kernels import native

    tokens, heads = 2048, 16
    d_out = torch.rand(1, tokens, heads, 64, generator=torch.Generator().manual_seed(0))
    q, k = torch.zeros_like(d_out), torch.zeros(1, tokens, 1, 64)

    def first_d_v(backend):
        v = k.clone().requires_grad_()
        with mk.backend(backend):
            out = mk.attention(q, k, v, window_size=(-1, 0))
        return torch.autograd.grad(out, v, d_out)[0][0, 0, 0]

    share = 1 / torch.arange(1, tokens + 1, dtype=torch.float64)
    truth = (d_out[0].double() * share[:, None, None]).sum((0, 1))
    eager = first_d_v("reference")
    for isa in native.supported_isas():
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        testing.assert_close(first_d_v("cpu"), eager, truth, name=isa)


def test_every_isa_agrees(monkeypatch):
    from medgpt_kernels import native

    for isa in native.supported_isas():
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        assert native.cpu().isa == isa
        check("cpu", make(130, dtype=torch.bfloat16), window_size=WINDOW)
        check("cpu", make(131, head_dim=72))


def test_exp2_of_every_isa():
    """Within 1 ulp of fp64 (1.25 without FMA), 0 where it must be, and NaN stays NaN."""
    from medgpt_kernels import native

    g = torch.Generator().manual_seed(0)
    x = torch.cat([
        torch.rand(400_000, generator=g) * 253 - 126,
        torch.rand(400_000, generator=g) * 2 - 1,
        -torch.rand(3_984, generator=g) * 1e-3,
    ])  # fmt: skip
    truth = x.double().exp2()
    ulp = 2.0 ** (truth.log2().floor() - 23)
    special = torch.tensor([0.0, -0.0, -127.0, -1e30, float("-inf"), float("nan")])
    for isa in native.supported_isas():
        library, out = native.cpu_library(isa), torch.empty_like(x)
        library.exp2(x.data_ptr(), out.data_ptr(), len(x))
        assert ((out - truth).abs() / ulp).max() < (1.25 if isa == "baseline" else 1.0)
        out = torch.empty_like(special)
        library.exp2(special.data_ptr(), out.data_ptr(), len(special))
        assert out[:5].tolist() == [1, 1, 0, 0, 0]
        assert out[5].isnan()


# Edges


@pytest.mark.parametrize("lengths", [(127,), (128,), (129,), (0,), (1,), (0, 130, 0), (96, 97)])
def test_lengths_around_blocks(lengths):
    if "cpu" not in BACKENDS:
        pytest.fail("no CPU kernels were built")
    for window in (OPEN, (127, 0)):
        draws = (make(sum(lengths), draw=n) for n in range(4))
        check("cpu", *draws, cu_seqlens_q=cu(*lengths), window_size=window)


@backends
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_sequences(backend, batch):
    """No keys, no queries, and neither."""
    for len_q, len_k in ((5, 0), (0, 5), (0, 0)):
        q, k, v, sinks = make(len_q, len_k, batch=batch)
        actual = outputs(backend, [q, k, v, sinks], with_lse_gradient=False)
        assert (actual["out"] == 0).all()
        expected = sinks[:, None].expand_as(actual["lse"])
        testing.assert_close(actual["lse"], expected, expected.double())
        assert all((actual[n] == 0).all() for n in ("d_q", "d_k", "d_v", "d_sinks"))


@backends
def test_nan_stays_in_its_own_rows(backend):
    q, k, v, sinks = make(12)
    q[3] = float("nan")
    with mk.backend(backend):
        out = mk.attention(q, k, v, sinks=sinks, cu_seqlens_q=cu(6, 6))
    assert out[3].isnan().all()
    assert out[torch.arange(12) != 3].isfinite().all()


@backends
def test_nan_in_a_sink_stays_in_its_head(backend):
    q, k, v, sinks = make(12)
    sinks[3] = float("nan")
    with mk.backend(backend):
        out, lse = mk.attention(q, k, v, sinks=sinks, return_lse=True)
    with mk.backend("reference"):
        expected, expected_lse = mk.attention(q, k, v, sinks=sinks, return_lse=True)
    for found in (out, expected):
        assert found[:, 3].isnan().all()
        assert found[:, torch.arange(16) != 3].isfinite().all()
    for found in (lse, expected_lse):
        assert torch.equal(found.isnan(), sinks.isnan()[:, None].expand(-1, 12))


@backends
def test_large_sinks_and_scores(backend):
    q, k, v, _ = make(17)
    check(backend, [q * 30, k, v, torch.tensor([-1e4, 50.0, 1e4, 0.0]).repeat(4)])


# Negative controls: the rule must notice each of these


@pytest.mark.parametrize(
    "wrong",
    ["no_sink", "window_off_by_one", "no_factor", "truncate", "head_order", "documents_leak"],
)
def test_the_rule_notices(wrong):
    def rotary(**options):
        return mk.yarn_rotary(64, 64, **{"truncate": False} | options)

    q, k, v, sinks = make(33)
    options = {"window_size": WINDOW, "rotary": rotary(), "cu_seqlens_q": cu(20, 13)}
    truth = outputs("reference", [q, k, v, sinks], torch.float64, **options)["out"]
    eager = outputs("reference", [q, k, v, sinks], **options)["out"]
    right = mk.attention(q, k, v, sinks=sinks, **options)
    testing.assert_close(right, eager, truth)
    if wrong == "no_sink":
        sinks = None
    elif wrong == "window_off_by_one":
        options["window_size"] = (8, 0)
    elif wrong == "no_factor":
        options["rotary"] = rotary(attention_factor=1.0)
    elif wrong == "truncate":
        options["rotary"] = rotary(truncate=True)
    elif wrong == "head_order":
        order = torch.arange(16).view(4, 4).T.flatten()
        q = q[:, order]
    elif wrong == "documents_leak":
        options["cu_seqlens_q"] = None
    found = mk.attention(q, k, v, sinks=sinks, **options)
    if wrong == "head_order":
        found = found[:, order.argsort()]
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(found, eager, truth)


@backends
def test_sinks_get_a_gradient(backend):
    """Never None or zero: libraries have dropped it silently. One that is wrong fails the rule."""
    tensors = make(17)
    actual = outputs(backend, tensors)["d_sinks"]
    assert actual.abs().min() > 0
    truth, eager = (
        outputs("reference", tensors, dtype)["d_sinks"] for dtype in (torch.float64, None)
    )
    testing.assert_close(actual, eager, truth, extra_ulp=2)
    for wrong in (torch.zeros_like(actual), -actual, actual.roll(1)):
        with pytest.raises(testing.ToleranceError):
            testing.assert_close(wrong, eager, truth, extra_ulp=2)


def test_only_what_is_wanted_is_computed():
    q, k, v, sinks = make(17)
    full = outputs("cpu", [q, k, v, sinks], with_lse_gradient=False)
    for name in ("q", "k", "v", "sinks"):
        inputs = {"q": q.clone(), "k": k.clone(), "v": v.clone(), "sinks": sinks.clone()}
        inputs[name].requires_grad_()
        out = mk.attention(**inputs)
        d_out = testing.realistic(*out.shape, seed=4, outliers=0)
        (grad,) = torch.autograd.grad(out, inputs[name], d_out)
        assert torch.equal(grad, full[f"d_{name}"])


def test_double_backward_raises():
    q, k, v, _ = (t.requires_grad_() for t in make(5))
    (grad,) = torch.autograd.grad(mk.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        grad.sum().backward()


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(33, 3, 64)}, "of one shape"),
        ({"k": torch.zeros(33, 3, 64), "v": torch.zeros(33, 3, 64)}, "divide, got 16 and 3"),
        ({"v": torch.zeros(33, 4, 32)}, "of one shape"),
        ({"k": torch.zeros(33, 4, 64).half()}, "one float dtype"),
        ({"q": torch.zeros(33, 16, 300)}, "head_dim of at most 256"),
        ({"sinks": torch.zeros(5)}, r"sinks \[16\], got torch.float32 \[5\]"),
        ({"window_size": (-2, 0)}, r"got \(-2, 0\)"),
        ({"window_size": 128}, "window_size"),
        ({"window_size": (2.5, 0)}, "window_size"),
        ({"window_size": (4, 2)}, r"right window of 0 or -1 where causal, got \(4, 2\)"),
        ({"max_seqlen_q": 9.5}, "an int >= 0, got 9.5"),
        ({"max_seqlen_q": 20}, "max_seqlen_q of at least 33, got 20"),
        ({"max_seqlen_k": 32}, "max_seqlen_k of at least 33, got 32"),
        ({"max_seqlen_q": 20, "cu_seqlens_q": cu(33)}, "at most 20 tokens, got 33"),
        ({"cu_seqlens_k": cu(33)}, "cu_seqlens_q with cu_seqlens_k"),
        ({"cu_seqlens_q": cu(33), "cu_seqlens_k": cu(20, 13)}, r"cu_seqlens_k \[2\]"),
        ({"cu_seqlens_q": torch.tensor([0, 30], dtype=torch.int32)}, "rising from 0 to 33"),
        ({"cu_seqlens_q": torch.tensor([0, 20, 33])}, "int32"),
        ({"position_ids": torch.arange(33)}, "rotary with position_ids"),
        ({"rotary": (torch.ones(64, 40), torch.ones(64, 40))}, "at most head_dim 64, got 80"),
        ({"rotary": (torch.ones(16, 32), torch.ones(16, 32))}, "at least 33 positions, got 16"),
    ],
)
def test_refuses(change, message):
    q, k, v, sinks = make(33)
    arguments = {"q": q, "k": k, "v": v, "sinks": sinks} | change
    with pytest.raises(ValueError, match="attention: expected.*" + message):
        mk.attention(**arguments)


def test_autocast_leaves_double_and_integers():
    q, k, v, _ = make(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mk.attention(q.double(), k.double(), v.double()).dtype == torch.float64
        with pytest.raises(ValueError, match="one float dtype"):
            mk.attention(q.int(), k.int(), v.int())


def test_forward_mode_raises():
    q, k, v, _ = make(5)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: mk.attention(q, k, v), (q,), (torch.ones_like(q),))


def test_unknown_arguments_raise():
    q, k, v, _ = make(9)
    for name in ("softcap", "dropout_p", "alibi_slopes"):
        with pytest.raises(TypeError, match=name):
            mk.attention(q, k, v, **{name: 0.5})


# The dispatcher's own checks, and compilation


def test_opcheck():
    q, k, v, sinks = (t.requires_grad_() for t in make(9, batch=2))
    cos, sin = mk.yarn_rotary(64, 16, truncate=False)
    arguments = (q, k, v, sinks, cos, sin, None, None, None, 9, 9, 7, 0, 0.125, False)
    torch.library.opcheck(torch.ops.medgpt_kernels.attention_fwd.default, arguments)


def test_opcheck_backward():
    q, k, v, sinks = make(9)
    options = (None, None, None, cu(4, 5), cu(4, 5), 5, 5, 7, 0, 0.125, False)
    out, lse = torch.ops.medgpt_kernels.attention_fwd.default(q, k, v, sinks, *options)
    backward = torch.ops.medgpt_kernels.attention_bwd.default
    for d_lse, wanted in ((None, [True] * 4), (torch.ones_like(lse), [True, False, True, False])):
        torch.library.opcheck(
            backward, (torch.ones_like(out), d_lse, q, k, v, out, lse, sinks, *options, wanted)
        )


def test_compiled_call_checks_lengths():
    """A compiled graph cannot look at values; the CPU kernel does before it reads."""
    q, k, v, _ = make(33)
    step = torch.compile(
        lambda c: mk.attention(q, k, v, cu_seqlens_q=c), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(step(cu(20, 13)), mk.attention(q, k, v, cu_seqlens_q=cu(20, 13)))
    with pytest.raises(ValueError, match="attention: expected cu_seqlens_q rising"):
        step(cu(20, 30))
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    at_positions = torch.compile(
        lambda p: mk.attention(q, k, v, rotary=rotary, position_ids=p),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"attention: expected positions in 0 \.\.\. 63"):
        at_positions(torch.full((33,), 2**32))


def test_compiles_at_most_twice_over_random_packings():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    rotary = mk.yarn_rotary(32, 256, truncate=False)
    g = torch.Generator().manual_seed(0)

    @torch.compile(backend=counter, fullgraph=True)
    def step(q, k, v, sinks, cu_seqlens, max_seqlen):
        return mk.attention(
            q, k, v, sinks=sinks, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen, window_size=WINDOW, rotary=rotary,
        ).square().sum()  # fmt: skip

    for i in range(50):
        lengths = torch.randint(1, 30, (3 + i % 5,), generator=g).tolist()
        q, k, v, sinks = (t.requires_grad_() for t in make(sum(lengths), head_dim=32))
        bounds = cu(*lengths)
        loss = step(q, k, v, sinks, bounds, max(lengths))
        found = torch.autograd.grad(loss, (q, k, v, sinks))
        out = mk.attention(
            q, k, v, sinks=sinks, cu_seqlens_q=bounds, window_size=WINDOW, rotary=rotary
        )
        expected = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2
