"""decode_attention: every backend against fp64 by the tolerance rule, and against transformers.

The truth of a call that appends is taken over the caches as that call left them: what is stored is
rounded once, and held bitwise to what apply_rotary gives.
"""

import types

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import testing
from medgpt_kernels.decode_attention.reference import FP8, quantize

BACKENDS = [b for b in testing.backend_modules("decode_attention") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
H, G, D, CAPACITY = 16, 4, 64, 640

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


class Case:
    """One call: tensors, and the same caches paged with shuffled pages where a page is given."""

    def __init__(
        self,
        lengths,
        tokens=1,
        *,
        heads=H,
        kv_heads=G,
        head_dim=D,
        capacity=CAPACITY,
        dtype=torch.float32,
        fp8=False,
        page=None,
        window=None,
        new=True,
        rotary=True,
        sinks=True,
        seed=0,
    ):
        batch = len(lengths)
        self.page = page
        q = testing.realistic(batch, tokens, heads, head_dim, seed=seed + 1, outliers=1) * 0.1
        k = testing.realistic(batch, capacity + tokens, kv_heads, head_dim, seed=seed, outliers=0)
        v = testing.realistic(
            batch, capacity + tokens, kv_heads, head_dim, seed=seed + 2, outliers=1
        )
        self.q, k, v = (x.to(dtype) for x in (q, k, v))
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.options = {}
        if new:
            self.options |= {"k": k[:, capacity:], "v": v[:, capacity:]}
        if rotary and new:
            self.options["rotary"] = mk.rotary_from_inv_freq(
                torch.logspace(0, -4, head_dim // 2), capacity
            )
        if sinks:
            self.options["sinks"] = torch.linspace(-2, 4, heads)
        if window is not None:
            self.options["window_size"] = (window, 0)
        self.caches = [k[:, :capacity].contiguous(), v[:, :capacity].contiguous()]
        if fp8:
            scale = torch.linspace(0.02, 0.05, kv_heads)
            self.options |= {"k_scale": scale, "v_scale": scale.flip(0) * 8}
            self.caches = [
                quantize(c, self.options[n])
                for c, n in zip(self.caches, ("k_scale", "v_scale"), strict=True)
            ]
        if page is not None:
            self._to_pages(page, seed)

    def _to_pages(self, page, seed):
        batch, capacity = self.caches[0].shape[:2]
        count = -(-capacity // page)
        order = torch.randperm(batch * count + 3, generator=torch.Generator().manual_seed(seed))[
            : batch * count
        ]
        self.options["block_table"] = order.view(batch, count).int()
        paged = []
        for cache in self.caches:
            raw = cache.view(torch.uint8) if cache.dtype == FP8 else cache
            rows = raw.new_zeros(batch, count * page, *raw.shape[2:])
            rows[:, :capacity] = raw
            pages = raw.new_zeros(batch * count + 3, page, *raw.shape[2:])
            pages[order] = rows.view(batch * count, page, *raw.shape[2:])
            paged.append(pages.view(cache.dtype))
        self.caches = paged

    def run(self, backend, **changed):
        """out, and the caches as the call left them."""
        caches = [c.clone() for c in self.caches]
        with mk.backend(backend), torch.no_grad(), testing.poisoned_empty():
            out = mk.decode_attention(self.q, *caches, self.lengths, **self.options | changed)
        return out, caches

    def rows(self, out):
        """Rows that are not skipped."""
        return out[self.lengths >= 0]

    def expected(self, caches, compute=None):
        """The reference over caches that hold the new tokens already."""
        q, options = self.q, dict(self.options)
        lengths = self.lengths
        new = options.pop("k", None) is not None
        options.pop("v", None)
        rotary = options.pop("rotary", None)
        tokens = q.shape[1]
        if compute is not None:
            q = q.to(compute)
            caches = [c if c.dtype == FP8 else c.to(compute) for c in caches]
        if rotary is not None:
            at = lengths.clamp(min=0)[:, None] + torch.arange(tokens)
            with mk.backend("reference"):
                q, _ = mk.apply_rotary(q, q[:, :, :1], rotary, position_ids=at)
        if new:
            lengths = torch.where(lengths < 0, lengths, lengths + tokens)
        with mk.backend("reference"), torch.no_grad():
            return mk.decode_attention(q, *(c.clone() for c in caches), lengths, **options)


def check(backend, *cases, **changed):
    """Hold the outputs of all cases, pooled, to the rule; few rows alone would be luck."""
    actual, eager, truth = [], [], []
    for case in cases:
        out, caches = case.run(backend, **changed)
        actual.append(case.rows(out).flatten())
        eager.append(case.rows(case.expected(caches)).flatten())
        truth.append(case.rows(case.expected(caches, torch.float64)).flatten())
    testing.assert_close(torch.cat(actual), torch.cat(eager), torch.cat(truth), name="out")


# Forward


@backends
@dtypes
@pytest.mark.parametrize("page", [None, 16], ids=["dense", "paged"])
@pytest.mark.parametrize("window", [None, 127], ids=["full", "window"])
def test_mixed_lengths(backend, dtype, page, window):
    check(backend, Case([0, 1, 130, -1, 511], dtype=dtype, page=page, window=window))


@backends
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("page", [None, 64], ids=["dense", "paged"])
def test_fp8_cache(backend, dtype, page):
    check(backend, Case([5, 130, 600], 2, dtype=dtype, fp8=True, page=page, window=200))


@backends
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 16, 40])
def test_several_new_tokens(backend, tokens):
    check(backend, Case([0, 3, 70], tokens, page=32, capacity=128))
    check(backend, Case([0, 3, 70], tokens, window=5, capacity=128))


@backends
@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
def test_page_sizes(backend, page):
    check(backend, Case([page - 2, page - 1, page, 2 * page + 1], 2, page=page, capacity=1024))


@backends
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 1), (6, 2), (3, 3), (32, 2)])
def test_grouped_heads(backend, heads, kv_heads):
    check(backend, *(Case([70, 131], 3, heads=heads, kv_heads=kv_heads, seed=10 * i)
                     for i in range(4)))  # fmt: skip


@backends
@pytest.mark.parametrize("head_dim", [8, 32, 72, 80, 128, 256])
def test_head_dims(backend, head_dim):
    check(backend, *(Case([70, 131], 2, head_dim=head_dim, seed=10 * i) for i in range(2)))


@pytest.mark.parametrize("head_dim", [1, 33, 40])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_odd_head_dims_on_the_cpu(head_dim, dtype):
    check("cpu", *(Case([70, 131], 2, head_dim=head_dim, dtype=dtype, rotary=False, seed=10 * i)
                   for i in range(4)))  # fmt: skip


@backends
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_cached_only(backend, tokens):
    check(backend, Case([tokens, 131, 600], tokens, new=False))


@backends
def test_without_sinks_and_rotary(backend):
    check(backend, Case([9, 131], 2, sinks=False, rotary=False))


@backends
@pytest.mark.parametrize("length", [511, 512, 513, 1023, 1024, 1025, 1100])
def test_lengths_around_splits(backend, length):
    check(backend, Case([length, length - 512], capacity=1152))


@backends
def test_large_sinks_and_scores(backend):
    case = Case([131, 600])
    case.options["sinks"] = torch.linspace(-60, 60, H)
    case.q = case.q * 20
    check(backend, case)


# The same numbers as attention


@backends
@pytest.mark.parametrize("window", [-1, 7, 127])
def test_rows_of_prefill(backend, window):
    """Prefill in one chunk, then token by token: every row is attention's."""
    total, prompt = 136, 133
    q, k, v = (testing.realistic(1, total, h, D, seed=h + 1, outliers=1) * 0.3 for h in (H, G, G))
    rotary, sinks = mk.yarn_rotary(D, total, truncate=False), torch.linspace(-2, 4, H)
    options = {"window_size": (window, 0), "rotary": rotary, "sinks": sinks}
    caches = [torch.full((1, total, G, D), float("nan")) for _ in range(2)]
    made = []
    with torch.no_grad(), mk.backend(backend):
        for lo, hi in ((0, prompt), *((t, t + 1) for t in range(prompt, total))):
            made.append(mk.decode_attention(
                q[:, lo:hi], *caches, torch.tensor([lo], dtype=torch.int32),
                k=k[:, lo:hi], v=v[:, lo:hi], **options,
            ))  # fmt: skip
    with mk.backend("reference"):
        eager = mk.attention(q, k, v, **options)
        truth = mk.attention(q.double(), k.double(), v.double(), **options)
    testing.assert_close(torch.cat(made, 1), eager, truth)
    assert torch.equal(caches[1], v)


@backends
@pytest.mark.parametrize("window", [None, 8])
def test_equals_transformers_with_a_cache(backend, window):
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    total = 33
    q, k, v = (testing.realistic(1, total, h, D, seed=h + 1, outliers=1) * 0.3 for h in (H, G, G))
    sinks = torch.linspace(-2, 4, H)
    module = types.SimpleNamespace(num_key_value_groups=H // G, sinks=sinks, training=False)
    cache = transformers.DynamicCache()
    caches = [torch.zeros(1, total, G, D) for _ in range(2)]
    actual, eager, truth = [], [], []
    for lo, hi in ((0, 30), *((t, t + 1) for t in range(30, total))):
        keys, values = cache.update(k[:, lo:hi].transpose(1, 2), v[:, lo:hi].transpose(1, 2), 0)
        at = torch.arange(lo, hi)[:, None] - torch.arange(hi)[None]
        hidden = (at < 0) | (at >= (window or total))
        for wide, rows in ((torch.float32, eager), (torch.float64, truth)):
            mask = torch.zeros(hidden.shape, dtype=wide).masked_fill(hidden, float("-inf"))
            module.sinks = sinks.to(wide)
            out, _ = eager_attention_forward(
                module, q[:, lo:hi].transpose(1, 2).to(wide), keys.to(wide), values.to(wide),
                mask[None, None], D**-0.5,
            )  # fmt: skip
            rows.append(out)
        with torch.no_grad(), mk.backend(backend):
            actual.append(mk.decode_attention(
                q[:, lo:hi], *caches, torch.tensor([lo], dtype=torch.int32), k=k[:, lo:hi],
                v=v[:, lo:hi], sinks=sinks, window_size=(-1 if window is None else window - 1, 0),
            ))  # fmt: skip
    testing.assert_close(*(torch.cat(rows, 1) for rows in (actual, eager, truth)))


# The append


@backends
@dtypes
@pytest.mark.parametrize("fp8", [False, True], ids=["same", "fp8"])
@pytest.mark.parametrize("page", [None, 16], ids=["dense", "paged"])
def test_append_is_apply_rotarys(backend, dtype, fp8, page):
    case = Case([0, 15, 301], 3, dtype=dtype, fp8=fp8, page=page)
    _, caches = case.run(backend)
    at = case.lengths[:, None] + torch.arange(3)
    k, v, rotary = (case.options[n] for n in ("k", "v", "rotary"))
    with mk.backend(backend):
        _, rotated = mk.apply_rotary(k, k, rotary, position_ids=at)
    for cache, before, rows, name in zip(
        caches, case.caches, (rotated, v), ("k_scale", "v_scale"), strict=True
    ):
        expected = before.clone().view(torch.uint8)
        for b, length in enumerate(case.lengths.tolist()):
            for i in range(3):
                row = rows[b, i]
                if fp8:
                    row = quantize(row[None], case.options[name])[0]
                where = (b, length + i)
                if page is not None:
                    table = case.options["block_table"]
                    where = (int(table[b, (length + i) // page]), (length + i) % page)
                expected[where] = row.contiguous().view(torch.uint8)
        assert torch.equal(cache.view(torch.uint8), expected)


@backends
def test_every_fp8_value_and_rounding(backend):
    """All codes come back; values between them, beyond 448 and NaN are stored as torch's."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    between = torch.linspace(-500, 500, 4001)
    near = (codes.float()[:, None] * (1 + torch.tensor([-(2**-4), 2**-4, 2**-5, 0]))).flatten()
    values = torch.cat([codes.float(), between, near, torch.tensor([float("inf"), -1e9, 1e-9])])
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(1, -1, 1, 64)
    tokens = values.shape[1]
    caches = [torch.zeros(1, tokens, 1, 64, dtype=torch.uint8).view(FP8) for _ in range(2)]
    with torch.no_grad(), mk.backend(backend):
        mk.decode_attention(
            torch.zeros_like(values), *caches, torch.zeros(1, dtype=torch.int32), k=values, v=values
        )
    expected = quantize(values[0], None)
    for cache in caches:
        same = cache[0].view(torch.uint8) == expected.view(torch.uint8)
        assert (same | (expected.float().isnan() & cache[0].float().isnan())).all()


@backends
def test_skipped_rows(backend):
    case = Case([-1, 20, -1], 2, page=16)
    out, caches = case.run(backend)
    assert (out[[0, 2]] == 0).all()
    assert (out[1] != 0).any()
    table = case.options["block_table"]
    for cache, before in zip(caches, case.caches, strict=True):
        touched = (cache != before).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(touched) <= {int(table[1, 1])}


@backends
def test_lengths_are_not_changed(backend):
    case = Case([3, 20])
    case.run(backend)
    assert case.lengths.tolist() == [3, 20]


# Properties


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("window", [None, 127], ids=["full", "window"])
def test_batch_equals_one_by_one_bitwise(dtype, tokens, window):
    lengths = [0, 1, 127, 128, 129, -1, 511, 512, 513, 2000]
    case = Case(lengths, tokens, dtype=dtype, window=window, capacity=2048)
    out, caches = case.run("cpu")
    for b in range(len(lengths)):
        options = dict(case.options)
        options |= {n: options[n][b : b + 1] for n in ("k", "v")}
        own = [c[b : b + 1].clone() for c in case.caches]
        with torch.no_grad():
            alone = mk.decode_attention(case.q[b : b + 1], *own, case.lengths[b : b + 1], **options)
        assert torch.equal(alone[0], out[b]), lengths[b]
        assert torch.equal(own[0][0], caches[0][b])


@pytest.mark.parametrize("page", [16, 24, 256])
@pytest.mark.parametrize("fp8", [False, True], ids=["same", "fp8"])
def test_paged_equals_dense_bitwise(page, fp8):
    dense, paged = (Case([0, 15, 100, 630], 2, page=p, fp8=fp8, window=300) for p in (None, page))
    assert torch.equal(dense.run("cpu")[0], paged.run("cpu")[0])


@backends
def test_pages_before_the_window_are_not_read(backend):
    case = Case([600, 300], page=16, window=20)
    expected, _ = case.run(backend)
    table = case.options["block_table"]
    for b, length in enumerate(case.lengths.tolist()):
        before = (length - 20) // 16
        for cache in case.caches:
            cache[table[b, :before].long()] = float("nan")
        table[b, :before] = -1
        table[b, length // 16 + 1 :] = 10**6
    out, _ = case.run(backend)
    assert torch.equal(out, expected)


@backends
def test_strided_inputs(backend):
    case = Case([131, 300], 2)
    expected, _ = case.run(backend)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    case.caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in case.caches]
    for name in ("k", "v"):
        case.options[name] = torch.stack([case.options[name]] * 2, -1)[..., 0]
    caches = [c.clone() for c in case.caches]
    assert not caches[0].is_contiguous()
    with mk.backend(backend), torch.no_grad():
        out = mk.decode_attention(case.q, *caches, case.lengths, **case.options)
    assert torch.equal(out, expected)


def test_every_isa_agrees(monkeypatch):
    from medgpt_kernels import native

    for isa in native.supported_isas():
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        for dtype in DTYPES:
            check("cpu", Case([0, 130, 600], 3, dtype=dtype))
            check("cpu", Case([0, 130, 600], dtype=dtype, fp8=True))


@backends
def test_nan_stays_in_its_own_row(backend):
    case = Case([40, 50])
    case.caches[1][0, 7, 2, 5] = float("nan")
    out, _ = case.run(backend)
    assert out[0, 0, 8:12, 5].isnan().all()
    assert out.isnan().sum() == 4


@pytest.mark.parametrize("batch", [0, 1])
def test_empty(batch):
    case = Case([0] * batch, new=False) if batch else Case([0], new=False)
    q, lengths, caches = case.q[:batch], case.lengths[:batch], [c[:batch] for c in case.caches]
    with torch.no_grad():
        out = mk.decode_attention(q, *caches, lengths, sinks=case.options["sinks"])
    assert out.shape == q.shape
    assert (out == 0).all()


def test_autocast_casts_q_k_v_only():
    case = Case([40], 2)
    caches = [c.bfloat16() for c in case.caches]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = mk.decode_attention(case.q, *caches, case.lengths, **case.options)
    assert out.dtype == torch.bfloat16


# Negative controls


def _drop_sink(case):
    return {"sinks": None}


def _sink_once_per_split(case):
    return {"sinks": case.options["sinks"] + torch.tensor(2.0).log()}


def _longer_window(case):
    return {"window_size": (case.options["window_size"][0] + 1, 0)}


def _shorter_window(case):
    return {"window_size": (case.options["window_size"][0] - 1, 0)}


def _wrong_page_order(case):
    table = case.options["block_table"].clone()
    table[:, :2] = table[:, :2].flip(1)
    return {"block_table": table}


def _unscaled(case):
    return {"v_scale": None}


@pytest.mark.parametrize(
    "wrong", [_drop_sink, _sink_once_per_split, _longer_window, _shorter_window,
              _wrong_page_order, _unscaled],
    ids=lambda f: f.__name__.strip("_"),
)  # fmt: skip
def test_the_rule_notices(wrong):
    case = Case([25, 20], page=16, window=15, fp8=True, dtype=torch.bfloat16, seed=3)
    check("cpu", case)
    with pytest.raises(testing.ToleranceError):
        check("cpu", case, **wrong(case))


def test_the_rule_notices_an_unrotated_key():
    case = Case([25, 20])
    out, _ = case.run("cpu")
    k, rotary = case.options["k"], case.options.pop("rotary")
    at = case.lengths[:, None] + torch.arange(1)
    case.q, _ = mk.apply_rotary(case.q, k, rotary, position_ids=at)
    wrong, _ = case.run("cpu")  # q rotated, k appended as it is
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(wrong, out, out.double())


def test_a_read_before_the_window_would_show():
    case = Case([60], page=16, window=20)
    case.caches[1][case.options["block_table"][0, 0].long()] = float("nan")
    out, _ = case.run("cpu")
    assert out.isfinite().all()
    read, _ = case.run("cpu", window_size=(-1, 0))
    assert read.isnan().any()


# Bad input


def _changed(**changes):
    case = Case([3, 20], 2)
    arguments = {
        "q": case.q, "k_cache": case.caches[0], "v_cache": case.caches[1],
        "cache_seqlens": case.lengths, **case.options,
    }  # fmt: skip
    arguments |= {n: f(arguments) for n, f in changes.items()}
    return arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": lambda a: a["q"][0]}, r"expected q \[B, S, H, D\]"),
        ({"q": lambda a: a["q"][:, :0]}, "of S >= 1"),
        ({"q": lambda a: a["q"][..., :32]}, "one head_dim"),
        ({"q": lambda a: a["q"][:, :, :15]}, "key heads divide"),
        ({"q": lambda a: a["q"].half()}, "caches in q's torch.float16"),
        ({"q": lambda a: a["q"].int()}, "float dtype"),
        ({"v_cache": lambda a: a["v_cache"][:, :9]}, "caches of one shape"),
        ({"v_cache": lambda a: a["v_cache"].half()}, "caches in q's"),
        ({"k_cache": lambda a: a["k_cache"].transpose(2, 3).contiguous().transpose(2, 3)},
         "last dimension is contiguous"),
        ({"v": lambda a: None}, "both k and v"),
        ({"k": lambda a: a["k"][:, :1]}, r"expected k and v \[2, 2, 4, 64\]"),
        ({"v": lambda a: a["v"].half()}, "k and v in q's"),
        ({"cache_seqlens": lambda a: a["cache_seqlens"].long()}, r"cache_seqlens int32 \[2\]"),
        ({"cache_seqlens": lambda a: a["cache_seqlens"][:1]}, r"cache_seqlens int32 \[2\]"),
        ({"cache_seqlens": lambda a: torch.tensor([639, 0]).int()}, r"-1 ... 638, got 639"),
        ({"cache_seqlens": lambda a: torch.tensor([0, -2]).int()}, "got -2 in row 1"),
        ({"rotary": lambda a: mk.yarn_rotary(D, 16, truncate=False)}, r"-1 ... 14, got 20"),
        ({"rotary": lambda a: mk.yarn_rotary(128, 640, truncate=False)}, "rotary_dim"),
        ({"k": lambda a: None, "v": lambda a: None}, "k and v with rotary"),
        ({"block_table": lambda a: torch.zeros(2, 3)}, "block_table int32"),
        ({"block_table": lambda a: torch.full((2, 3), 7).int()}, "pages in 0 ... 1, got 7"),
        ({"k_cache": lambda a: a["k_cache"][:1], "v_cache": lambda a: a["v_cache"][:1]},
         "caches of q's 2 sequences"),
        ({"k_scale": lambda a: torch.ones(4)}, "no k_scale unless"),
        ({"sinks": lambda a: torch.ones(3)}, r"float sinks \[16\]"),
        ({"window_size": lambda a: (3, 1)}, "right window of 0 or -1"),
        ({"window_size": lambda a: (-2, 0)}, "window_size"),
        ({"q": lambda a: a["q"].clone().requires_grad_()}, "require no gradient"),
        ({"sinks": lambda a: torch.ones(16, requires_grad=True)}, "require no gradient"),
    ],
)  # fmt: skip
def test_refuses(changes, message):
    arguments = _changed(**changes)
    with pytest.raises(ValueError, match=f"^decode_attention: .*{message}"):
        mk.decode_attention(**arguments)


def test_refuses_scales_that_do_not_fit():
    case = Case([3], fp8=True)
    with pytest.raises(ValueError, match=r"k_scale float32 \[4\]"):
        case.run("cpu", k_scale=torch.ones(3))


def test_unknown_arguments_raise():
    with pytest.raises(TypeError):
        mk.decode_attention(**_changed(), softcap=lambda a: 30.0)


# Dispatch and compilation


def _operands(case):
    o = case.options
    cos, sin = o.get("rotary", (None, None))
    return (
        case.q, *(c.clone() for c in case.caches), case.lengths, o.get("block_table"), o.get("k"),
        o.get("v"), o.get("k_scale"), o.get("v_scale"), o.get("sinks"), cos, sin,
        o.get("window_size", (-1, 0))[0], D**-0.5,
    )  # fmt: skip


@pytest.mark.parametrize("page", [None, 16], ids=["dense", "paged"])
def test_opcheck(page):
    case = Case([3, -1, 20], 2, page=page, capacity=64)
    torch.library.opcheck(torch.ops.medgpt_kernels.decode_attention.default, _operands(case))


def test_compiles_at_most_twice_over_random_batches():
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(mk.decode_attention, fullgraph=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        batch = int(torch.randint(2, 6, (1,), generator=generator))
        lengths = torch.randint(-1, 60, (batch,), generator=generator).tolist()
        case = Case(lengths, page=16, capacity=64, seed=i)
        expected, caches = case.run("cpu")
        own = [c.clone() for c in case.caches]
        with torch.no_grad():
            out = compiled(case.q, *own, case.lengths, **case.options)
        assert torch.equal(out, expected)
        assert torch.equal(own[0], caches[0])
    assert graphs <= 2


def test_compiled_call_checks_lengths():
    case = Case([630])
    compiled = torch.compile(mk.decode_attention, fullgraph=True, backend="eager")
    lengths = torch.tensor([640], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"-1 ... 639, got 640"):
        compiled(case.q, *case.caches, lengths, **case.options)
