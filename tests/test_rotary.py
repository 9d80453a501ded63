"""rotary: tables against transformers, rotation by every backend against fp64."""

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import testing
from medgpt_kernels.rotary import reference

BACKENDS = [b for b in testing.backend_modules("rotary") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])

GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# rope parameters of published configs: head_dim, then what their config.json says
PUBLISHED = {
    "gpt-oss": (64, GPT_OSS),
    "gpt-oss, truncated": (64, {**GPT_OSS, "truncate": True}),
    "qwen3-yarn": (
        128,
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    "deepseek-v3": (
        64,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    "yarn-llama-2-128k": (
        128,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    "default": (64, {"rope_type": "default", "rope_theta": 10000.0}),
    "linear": (64, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}),
    "llama3": (
        128,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    # Phi-3.5-mini's form; its 48 factors a list are rounded steps between the same ends
    "longrope": (
        96,
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": torch.linspace(1.0, 2.8, 48).tolist(),
            "long_factor": torch.linspace(1.08, 64.6, 48).tolist(),
            "original_max_position_embeddings": 4096,
        },
    ),
}
YARN = [name for name, (_, p) in PUBLISHED.items() if p["rope_type"] == "yarn"]


def config(head_dim, parameters, max_position_embeddings=131072):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=dict(parameters),
    )


def make(dtype, *, heads=(4, 2), head_dim=64, shape=(37,), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, h, head_dim, generator=g).to(dtype) for h in heads]


def check(backend, q, k, rotary, **options):
    """q, k and both gradients by the tolerance rule."""
    d_q, d_k = (testing.realistic(*t.shape, dtype=t.dtype, seed=5) for t in (q, k))

    def run(name, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (q, k)]
        with mk.backend(name), testing.poisoned_empty():
            outs = mk.apply_rotary(*leaves, rotary, **options)
            grads = torch.autograd.grad(outs, leaves, [d.to(dtype) for d in (d_q, d_k)])
        return (*outs, *grads)

    truth, eager = run("reference", torch.float64), run("reference", q.dtype)
    for name, a, e, t in zip(
        ("q", "k", "d_q", "d_k"), run(backend, q.dtype), eager, truth, strict=True
    ):
        testing.assert_close(a, e, t, name=name)


# Tables


@pytest.mark.parametrize("length", [4096, 8192])
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_equal_transformers(name, truncate, length):
    """Inverse frequencies and factor to fp32 rounding, read back from the tables' first angles.

    Where a YaRN ramp is almost over, transformers rounds a share of the frequency in fp32 that is
    `factor` times larger than what is left.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim, parameters = PUBLISHED[name]
    if name in YARN:
        parameters = {**parameters, "truncate": truncate}
    made = config(head_dim, parameters)
    if parameters["rope_type"] == "default":
        inv_freq = parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        factor = 1.0
    else:
        init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        inv_freq, factor = init(made, "cpu", seq_len=length)
    found = mk.rotary_from_config(made, length)
    angles = torch.atan2(found.sin[1].double(), found.cos[1].double())
    rounding = 4 * max(1, parameters.get("factor", 1)) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(angles, inv_freq.double(), rtol=rounding, atol=0)
    torch.testing.assert_close(found.cos[0].double(), torch.full((head_dim // 2,), factor).double())
    direct = mk.rotary_from_inv_freq(inv_freq, length, factor)
    # at the last position, a rounding of the frequency has grown `length` times
    bound = factor * length * rounding * inv_freq.double() + 3e-7
    assert ((found.cos[-1] - direct.cos[-1]).abs() <= bound).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_equal_transformers(name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    head_dim, parameters = PUBLISHED[name]
    module = LlamaRotaryEmbedding(config(head_dim, parameters))
    positions = torch.tensor([[0, 1, 127, 128, 4095]])
    cos, sin = module(torch.zeros(1), positions)
    found = mk.rotary_from_config(config(head_dim, parameters), 4096)
    # fp32 phases up to 4095 carry 4095 * eps of rounding on transformers' side
    half = head_dim // 2
    for ours, theirs in ((found.cos, cos), (found.sin, sin)):
        assert (ours[positions[0]] - theirs[0, :, :half]).abs().max() < 4095 * 1.2e-7 * 1.4
        assert torch.equal(theirs[0, :, :half], theirs[0, :, half:])


def test_gpt_oss_yarn_numbers():
    """Ramp from 8.09 to 17.40 and factor 1.3465736, as the published architecture has them."""
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    assert rotary.cos.shape == (64, 32)
    assert rotary.cos.dtype == torch.float32
    torch.testing.assert_close(rotary.cos[0], torch.full((32,), 1.3465735902799727))
    frequency = torch.atan2(rotary.sin[1], rotary.cos[1]).double()
    plain = 150000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    ratio = plain / frequency
    torch.testing.assert_close(ratio[:9], torch.ones(9).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(ratio[18:], torch.full((14,), 32.0).double(), atol=0, rtol=1e-3)
    assert ((ratio[9:18] > 1) & (ratio[9:18] < 32)).all()


def test_truncate_and_factor_are_noticed():
    """Negative controls: rounding the ramp or dropping the attention factor changes tables."""
    right = mk.yarn_rotary(64, 4096, truncate=False)
    for wrong in (
        mk.yarn_rotary(64, 4096, truncate=True),
        mk.yarn_rotary(64, 4096, truncate=False, attention_factor=1.0),
    ):
        assert (right.cos - wrong.cos).abs().max() > 0.1
    with pytest.raises(TypeError, match="truncate"):
        mk.yarn_rotary(64, 4096)


def test_configs_that_are_refused():
    _, parameters = PUBLISHED["default"]
    made = config(64, parameters)
    made.rope_parameters = {"rope_type": "axial", "rope_theta": 10000.0}
    with pytest.raises(
        ValueError, match=r"rotary_from_config: expected rope_type default.*'axial'"
    ):
        mk.rotary_from_config(made, 16)
    made.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"expected 'factor' in the rope parameters of type lin"):
        mk.rotary_from_config(made, 16)
    made.rope_parameters = {"full_attention": parameters, "sliding_attention": parameters}
    with pytest.raises(ValueError, match="expected layer_type to choose among"):
        mk.rotary_from_config(made, 16)
    found = mk.rotary_from_config(made, 16, layer_type="full_attention")
    assert found.cos.shape == (16, 32)


def test_transformers_4_configs():
    """rope_scaling and rope_theta beside each other, as transformers 4 kept them."""

    class Config:
        head_dim = 64
        max_position_embeddings = 131072
        rope_theta = 150000.0
        rope_scaling = {**GPT_OSS}  # noqa: RUF012

    del Config.rope_scaling["rope_theta"]
    found, expected = mk.rotary_from_config(Config, 64), mk.yarn_rotary(64, 64, truncate=False)
    assert torch.equal(found.cos, expected.cos)
    assert torch.equal(found.sin, expected.sin)


# Rotation


@backends
@dtypes
@pytest.mark.parametrize("shape", [(37,), (2, 19)], ids=["packed", "batched"])
def test_rotation_and_gradients(backend, dtype, shape):
    check(backend, *make(dtype, shape=shape), mk.yarn_rotary(64, 64, truncate=False))


@backends
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 32), (72, 72), (80, 20), (128, 64)])
def test_partial_rotary_dims(backend, head_dim, rotary_dim):
    rotary = mk.yarn_rotary(rotary_dim, 64, truncate=False)
    check(backend, *make(torch.float32, head_dim=head_dim), rotary)


@backends
def test_packed_positions_start_again(backend):
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    q, k = make(torch.float32)
    cu_seqlens = torch.tensor([0, 5, 5, 6, 37], dtype=torch.int32)
    check(backend, q, k, rotary, cu_seqlens=cu_seqlens)
    at = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])
    with mk.backend(backend):
        packed = mk.apply_rotary(q, k, rotary, cu_seqlens=cu_seqlens)
        given = mk.apply_rotary(q, k, rotary, position_ids=at)
    assert all(torch.equal(a, b) for a, b in zip(packed, given, strict=True))


@backends
def test_strided_views_are_read_in_place(backend):
    """Transposed [B, H, S, D] as transformers holds them, and slices of a fused projection."""
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    fused = torch.randn(2, 19, 8, 64)
    q, k = fused[:, :, :4], fused.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 4:6]
    with mk.backend(backend):
        found = mk.apply_rotary(q, k, rotary)
        expected = mk.apply_rotary(q.contiguous(), k.contiguous(), rotary)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_outputs_written_past_the_caches(dtype, monkeypatch):
    """Above 16 MB the CPU writes around its caches: the same bits as below, on every ISA."""
    from medgpt_kernels import native

    rotary = mk.yarn_rotary(64, 4096, truncate=False)
    q, k = make(dtype, heads=(64, 8), shape=(2100,))
    assert q.nbytes + k.nbytes > 16 << 20
    at = torch.arange(2100)
    for isa in native.supported_isas():
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        with testing.poisoned_empty():
            whole = mk.apply_rotary(q, k, rotary)
            parts = [
                mk.apply_rotary(q[s], k[s], rotary, position_ids=at[s])
                for s in (slice(0, 700), slice(700, 1400), slice(1400, 2100))
            ]
        for found, expected in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert torch.equal(found, expected)


@backends
def test_equals_transformers(backend):
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    rotary = mk.yarn_rotary(64, 64, truncate=False)
    q, k = make(torch.float32, shape=(1, 33))
    cos, sin = (t[:33][None] for t in rotary)
    wide = [t.double() for t in (q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
    truth = [t.transpose(1, 2) for t in apply_rotary_pos_emb(*wide)]
    eager = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    with mk.backend(backend):
        found = mk.apply_rotary(q, k, rotary)
    for a, e, t in zip(found, eager, truth, strict=True):
        testing.assert_close(a, e.transpose(1, 2), t)


def test_interleaved_rotation_is_noticed():
    """Negative control: pairing neighbours instead of halves must fail the rule."""
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    q, k = make(torch.float32)
    truth = reference.rotary_fwd(q.double(), k.double(), *rotary, None, torch.tensor([0, 37]))[0]
    eager = mk.apply_rotary(q, k, rotary, cu_seqlens=torch.tensor([0, 37], dtype=torch.int32))[0]
    order = torch.arange(64).view(32, 2).T.flatten()
    wrong = torch.empty_like(eager)
    wrong[..., order] = mk.apply_rotary(
        q[..., order], k, rotary, cu_seqlens=torch.tensor([0, 37], dtype=torch.int32)
    )[0]
    testing.assert_close(eager, eager, truth)
    with pytest.raises(testing.ToleranceError):
        testing.assert_close(wrong, eager, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(36, 2, 64)}, "of the same tokens"),
        ({"k": torch.zeros(37, 2, 32)}, "of one head_dim"),
        ({"position_ids": torch.zeros(37)}, "position_ids int32 or int64"),
        ({"position_ids": torch.full((37,), 64)}, "positions in 0 ... 63, got 64 ... 64"),
        ({"cu_seqlens": torch.tensor([0, 36], dtype=torch.int32)}, "rising from 0 to 37"),
        ({"cu_seqlens": torch.tensor([0, 37])}, "int32"),
        ({"cu_seqlens": torch.tensor([0, 20, 10, 37], dtype=torch.int32)}, "rising from 0 to 37"),
        ({"rotary": mk.yarn_rotary(64, 16, truncate=False)}, "at least 37 positions, got 16"),
        ({"rotary": mk.yarn_rotary(128, 64, truncate=False)}, "at most head_dim 64, got 128"),
    ],
)
def test_refuses(change, message):
    q, k = make(torch.float32)
    arguments = {"q": q, "k": k, "rotary": mk.yarn_rotary(64, 64, truncate=False)} | change
    with pytest.raises(ValueError, match="apply_rotary: expected.*" + message):
        mk.apply_rotary(**arguments)


def test_tables_with_a_gradient_are_refused():
    q, k = make(torch.float32)
    cos, sin = mk.yarn_rotary(64, 64, truncate=False)
    with pytest.raises(ValueError, match="tables without gradient"):
        mk.apply_rotary(q, k, mk.Rotary(cos.requires_grad_(), sin))


def test_cu_seqlens_are_checked_beside_positions():
    q, k = make(torch.float32)
    rotary, at = mk.yarn_rotary(64, 64, truncate=False), torch.arange(37)
    wrong = torch.tensor([0, 36], dtype=torch.int32)
    with pytest.raises(ValueError, match="rising from 0 to 37"):
        mk.apply_rotary(q, k, rotary, position_ids=at, cu_seqlens=wrong)


# The dispatcher's own checks, and compilation


def test_compiles_at_most_twice_over_random_packings():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    rotary = mk.yarn_rotary(64, 256, truncate=False)
    g = torch.Generator().manual_seed(0)

    @torch.compile(backend=counter, fullgraph=True)
    def step(q, k, cu_seqlens):
        return mk.apply_rotary(q, k, rotary, cu_seqlens=cu_seqlens)

    for i in range(50):
        lengths = torch.randint(1, 30, (3 + i % 5,), generator=g)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        q, k = make(torch.float32, shape=(int(lengths.sum()),), seed=i)
        expected = mk.apply_rotary(q, k, rotary, cu_seqlens=bounds)
        found = step(q, k, bounds)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count <= 2


def test_opcheck():
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    q, k = (t.requires_grad_() for t in make(torch.float32, shape=(2, 9)))
    positions = torch.arange(18).view(2, 9)
    forward = torch.ops.medgpt_kernels.rotary_fwd.default
    torch.library.opcheck(forward, (q, k, *rotary, None, None))
    torch.library.opcheck(forward, (q, k, *rotary, positions, None))
    backward = torch.ops.medgpt_kernels.rotary_bwd.default
    torch.library.opcheck(backward, (q.detach(), k.detach(), *rotary, positions, None))


def test_reference_gradcheck():
    rotary = mk.yarn_rotary(4, 8, truncate=False)
    q, k = (torch.randn(5, h, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    with mk.backend("reference"):
        assert torch.autograd.gradcheck(lambda q, k: mk.apply_rotary(q, k, rotary), (q, k))


def test_compiled_call_checks_lengths():
    """A compiled graph cannot look at values; the CPU kernel does before it reads."""
    rotary = mk.yarn_rotary(64, 64, truncate=False)
    q, k = make(torch.float32)
    step = torch.compile(
        lambda q, k, c: mk.apply_rotary(q, k, rotary, cu_seqlens=c), backend="aot_eager",
        fullgraph=True,
    )  # fmt: skip
    right = torch.tensor([0, 5, 37], dtype=torch.int32)
    expected = mk.apply_rotary(q, k, rotary, cu_seqlens=right)
    assert all(torch.equal(a, b) for a, b in zip(step(q, k, right), expected, strict=True))
    for wrong in ([0, 5, 36], [0, 40, 37]):
        with pytest.raises(ValueError, match="apply_rotary: expected"):
            step(q, k, torch.tensor(wrong, dtype=torch.int32))
