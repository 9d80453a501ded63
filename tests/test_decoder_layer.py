"""A decoding step of a layer in one call, and projections in 8 bits, against the modules."""

import copy

import pytest
import torch

from medgpt_kernels import native
from medgpt_kernels.mxfp4.op import Mxfp4Tensor, mxfp4_quantize
from medgpt_kernels.testing import ToleranceError, assert_close

transformers = pytest.importorskip("transformers")

from test_transformers import exact  # noqa: E402

from medgpt_kernels.integrations import transformers as integration  # noqa: E402
from medgpt_kernels.integrations.decoder_layer import FusedGptOssLayer  # noqa: E402
from medgpt_kernels.integrations.int8 import Int8Linear  # noqa: E402
from medgpt_kernels.integrations.packed import PackedExperts  # noqa: E402
from medgpt_kernels.integrations.paged_cache import PagedCache  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning"),
    pytest.mark.skipif(not native.supported_isas(), reason="nothing was built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
linear = torch.nn.functional.linear


def dense(outputs: int, inputs: int, dtype=torch.bfloat16, bias=True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def widened(layer: Int8Linear) -> torch.Tensor:
    """w[n][k] from the byte of output n % 16 and input k % 4 in unit n / 16."""
    n = torch.arange(layer.out_features)[:, None]
    k = torch.arange(layer.in_features)
    codes = layer.values[n // 16, k // 4, n % 16, k % 4].double() - 128
    return codes * layer.scales[n // 16, k // 32, n % 16].double()


def rows(tokens: int, width: int, dtype, outlier: bool = False) -> torch.Tensor:
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))
    if outlier:
        x[..., 3] = 2.0**12
    return x.to(dtype)


# 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("shape", [(70, 96), (33, 2880), (1, 32), (300, 544)])
def test_int8_on_every_instruction_set(dtype, tokens, shape):
    out, width = shape
    for bias in (True, False):
        layer = Int8Linear.quantize(dense(out, width, dtype, bias))
        x, wide = rows(tokens, width, dtype, outlier=tokens % 2 == 0), widened(layer)
        truth = linear(x.double(), wide, layer.bias.double() if bias else None)
        eager = linear(x, wide.to(dtype), layer.bias)
        for isa in native.supported_isas():
            y = torch.full_like(eager, float("nan"))
            pointers = map(native.pointer, (x, layer.values, layer.scales, layer.bias, y))
            code = native.DTYPE_CODES[dtype]
            native.cpu_library(isa).linear_int8(code, tokens, width, out, *pointers)
            assert_close(y, eager, truth, name=isa)


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["scales", "bias", "order"])
def test_int8_check_notices(wrong):
    layer = Int8Linear.quantize(dense(33, 96))
    x = rows(2, 96, torch.bfloat16)
    truth = linear(x.double(), widened(layer), layer.bias.double())
    eager = linear(x, widened(layer).bfloat16(), layer.bias)
    assert_close(layer(x), eager, truth)
    if wrong == "scales":
        layer.scales[:, 0] = layer.scales[:, 1].clone()
    elif wrong == "bias":
        layer.bias.zero_()
    else:
        layer.values = layer.values.flip(2).contiguous()
    with pytest.raises(ToleranceError):
        assert_close(layer(x), eager, truth)


@torch.no_grad()
@DTYPES
def test_int8_does_not_depend_on_the_rows_beside(dtype):
    layer, x = Int8Linear.quantize(dense(37, 544, dtype)), rows(16, 544, dtype)
    whole = layer(x)
    for t in (1, 2, 3, 7):
        assert torch.equal(layer(x[:, :t].contiguous()), whole[:, :t])


@torch.no_grad()
@DTYPES
def test_int8_of_many_rows_and_its_gradient(dtype):
    layer, x = Int8Linear.quantize(dense(37, 96, dtype)), rows(40, 96, dtype)
    wide = widened(layer)
    eager = linear(x, wide.to(dtype), layer.bias)
    assert_close(layer(x), eager, linear(x.double(), wide, layer.bias.double()))
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        layer(given).sum().backward()
    assert_close(given.grad, wide.to(dtype).sum(0).expand_as(x), wide.sum(0).expand_as(x))


@torch.no_grad()
def test_int8_is_within_half_a_step_and_a_scale():
    layer = dense(40, 96, torch.float32)
    layer.weight[3] = 0  # a block of zeros
    layer.weight[4, :32] = 1e-8
    packed = Int8Linear.quantize(layer)
    most = layer.weight.unflatten(1, (-1, 32)).abs().amax(-1).double()
    # half a step of the block, and the fp16 rounding of its scale; none is finer than 2^-14
    allowed = most / 254 + most * 2.0**-11 + (most < 127 * 2.0**-14) * 2.0**-15
    apart = (widened(packed) - layer.weight.double()).abs().unflatten(1, (-1, 32)).amax(-1)
    assert (apart <= allowed).all()
    assert packed.values.min() >= 1  # -127, and -128 never
    assert max(packed.values.max() - 128, 128 - packed.values.min()) == 127
    assert torch.equal(packed.dequantize(torch.float32), widened(packed).float())


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@DTYPES
def test_int8_hands_on_what_is_not_finite(value, dtype):
    layer, x = Int8Linear.quantize(dense(37, 96, dtype)), rows(3, 96, dtype)
    x[0, 1, 40] = value
    y = layer(x)
    assert not y[0, 1].isfinite().any()
    assert y[0, ::2].isfinite().all()


def test_int8_keeps_its_scales_in_another_dtype():
    layer = Int8Linear.quantize(dense(37, 96))
    wide = widened(layer)
    layer.to(torch.bfloat16).float()
    assert layer.scales.dtype == torch.float16
    assert layer.bias.dtype == torch.float32
    assert torch.equal(widened(layer), wide)


def test_int8_refuses():
    with pytest.raises(ValueError, match="expected rows in blocks of 32, got 83"):
        Int8Linear.quantize(dense(4, 83))
    layer = dense(4, 64)
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="expected finite weights"):
        Int8Linear.quantize(layer)
    values = torch.zeros(2, 16, 16, 4, dtype=torch.uint8)
    scales = torch.zeros(2, 2, 16, dtype=torch.float16)
    for wrong in (
        (values.short(), scales),
        (values, scales.float()),
        (values, scales[:, :1]),
        (values[:, :15], scales),
        (values[:1], scales),
        (values, scales[..., :4]),
        (values, scales[0]),
        (values, scales[0, 0, 0]),
    ):
        with pytest.raises(ValueError, match="expected values"):
            Int8Linear(*wrong, None, 32)
    with pytest.raises(ValueError, match=r"expected a bias \[17\], got \[32\]"):
        Int8Linear(values, scales, torch.zeros(32), 17)


@torch.no_grad()
@DTYPES
def test_int8_takes_inputs_of_any_rank_to_its_kernel(dtype, monkeypatch):
    layer, x = Int8Linear.quantize(dense(37, 96, dtype, bias=False)), rows(3, 96, dtype)
    monkeypatch.setattr(Int8Linear, "dequantize", None)  # the way of many rows
    whole = layer(x)
    assert whole.shape == (1, 3, 37)
    assert torch.equal(layer(x[0]), whole[0])
    assert torch.equal(layer(x[0, 1]), whole[0, 1])
    assert torch.equal(layer(x[:, None]), whole[:, None])
    assert torch.equal(layer(torch.stack([x, x], 1)[:, 1:]), whole[:, None])  # with gaps
    layer.bias = torch.nn.Parameter(torch.ones(37, dtype=dtype), requires_grad=False)
    assert_close(layer(x), whole + 1, whole.double() + 1)
    layer.bias = None
    assert torch.equal(layer(x), whole)


@torch.no_grad()
def test_int8_is_copied_and_stored():
    layer, x = Int8Linear.quantize(dense(37, 96, bias=False)), rows(3, 96, torch.bfloat16)
    for other in (copy.deepcopy(layer), Int8Linear.quantize(dense(37, 96, bias=False))):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
    tiny = rows(3, 96, torch.float32) * 2.0**-120  # below what a float's second digit reaches
    wide = widened(layer)
    apart = (layer(tiny).double() - linear(tiny.double(), wide)).abs().max()
    assert apart <= 96 * 2.0**-128


# The layer


def pair(dtype, heads=4, **options):
    """Eager gpt-oss with weights that MXFP4 holds exactly, and the same packed and patched."""
    config = transformers.GptOssConfig(
        **{
            "num_hidden_layers": 2,
            "hidden_size": 96,
            "intermediate_size": 64,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 4,  # a token that changes its expert is no rounding error
            "vocab_size": 100,
            "sliding_window": 8,
            "max_position_embeddings": 256,
            "attn_implementation": "eager",
            "experts_implementation": "eager",
            **options,
        }
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.uniform_(0.5, 1.5)
        elif not name.endswith("embed_tokens.weight"):
            p.normal_(std=0.5 if name.endswith("sinks") else 0.1)
    mine = copy.deepcopy(model)
    for eager, packed in zip(model.model.layers, mine.model.layers, strict=True):
        made = PackedExperts(eager.mlp.experts)
        for name in ("gate_up_proj", "down_proj"):
            stored = mxfp4_quantize(getattr(eager.mlp.experts, name).mT.contiguous())
            getattr(made, f"{name}_blocks").data = stored.blocks
            getattr(made, f"{name}_scales").data = stored.scales
            getattr(made, f"{name}_bias").data = getattr(
                eager.mlp.experts, f"{name}_bias"
            ).data.clone()
            same = Mxfp4Tensor(stored.blocks, stored.scales).dequantize(dtype).mT
            getattr(eager.mlp.experts, name).copy_(same)
        packed.mlp.experts = made
    integration.register()
    integration.patch(mine)
    return model, mine.requires_grad_(False)


def steps(model, ids, parts, cache=None, **kwargs) -> torch.Tensor:
    """Logits of all tokens, which are given in parts to one cache."""
    seen, out = 0, []
    for n in parts:
        done = model(ids[:, seen : seen + n], past_key_values=cache, use_cache=True, **kwargs)
        cache, seen = done.past_key_values, seen + n
        out.append(done.logits)
    return torch.cat(out, 1)


@pytest.fixture
def taken(monkeypatch):
    """How many layers went by the one call."""
    counts, decode = [], FusedGptOssLayer._decode

    def counted(self, *args):
        done = decode(self, *args)
        counts.append(done is not None)
        return done

    monkeypatch.setattr(FusedGptOssLayer, "_decode", counted)
    return counts


IDS = torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hold(actual, model, ids, parts, since=0) -> None:
    """Logits by the tolerance rule, from token `since` on."""
    with exact():
        truth = copy.deepcopy(model).double()(ids, use_cache=False).logits
    eager = steps(model, ids, parts)
    assert_close(actual[:, since:], eager[:, since:], truth[:, since:], name="logits")


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("parts", [[20] + [1] * 20, [20, 3, 1, 8, 8]])
def test_layer_gives_eagers_logits(dtype, parts, taken):
    model, mine = pair(dtype)
    cache = PagedCache(model.config, page_size=4, max_length=64)
    actual = steps(mine, IDS, parts, cache)
    assert taken == [False] * 2 + [True] * 2 * (len(parts) - 1)
    hold(actual, model, IDS, parts)


@torch.no_grad()
@DTYPES
def test_layer_with_projections_in_8_bits(dtype, taken):
    model, mine = pair(dtype)
    integration.patch(mine, projections="int8")
    assert type(mine.lm_head) is type(mine.model.layers[0].self_attn.o_proj) is Int8Linear
    parts = [20] + [1] * 20
    actual = steps(mine, IDS, parts, PagedCache(mine.config, page_size=4))
    assert sum(taken) == 2 * 20
    for name, module in mine.named_modules():
        if isinstance(module, Int8Linear):  # as near as the dtype comes to the 8 bits
            model.get_submodule(name).weight.data = widened(module).to(dtype)
    hold(actual, model, IDS, parts)


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    ["input_layernorm", "post_attention_layernorm", "sinks", "router", "down_bias", "o_bias"],
)
def test_layer_check_notices(wrong, taken):
    model, mine = pair(torch.float32)
    layer = mine.model.layers[1]
    if wrong.endswith("layernorm"):
        getattr(layer, wrong).weight.fill_(1)
    elif wrong == "sinks":
        layer.self_attn.sinks.fill_(-1e30)
    elif wrong == "router":
        layer.mlp.router.bias.zero_()
    elif wrong == "down_bias":
        layer.mlp.experts.down_proj_bias.zero_()
    else:
        layer.self_attn.o_proj.bias.zero_()
    parts = [20] + [1] * 20
    actual = steps(mine, IDS, parts, PagedCache(model.config, page_size=4))
    assert any(taken)
    with pytest.raises(ToleranceError):
        hold(actual, model, IDS, parts, since=20)


@torch.no_grad()
def test_a_rows_numbers_do_not_depend_on_the_others(taken):
    _, mine = pair(torch.bfloat16)
    integration.patch(mine, projections="int8")
    parts = [20] + [1] * 20
    together = steps(mine, IDS, parts, PagedCache(mine.config, page_size=4))
    for row in (0, 1):
        alone = steps(mine, IDS[row : row + 1], parts, PagedCache(mine.config, page_size=4))
        assert torch.equal(alone[0, 20:], together[row, 20:])
    assert sum(taken) == 3 * 2 * 20


@torch.no_grad()
@pytest.mark.parametrize(
    "why", ["hook", "lora", "other class", "strides", "gradients", "eager", "recorded"]
)
def test_the_modules_run_where_the_call_does_not(why, taken):
    model, mine = pair(torch.float32)
    attention, parts, seen = mine.model.layers[0].self_attn, [20, 1, 1], []
    if why == "hook":
        attention.register_forward_hook(lambda *args: seen.append(1))
    elif why == "lora":
        integration.add_expert_lora(mine, 2)
        mine.requires_grad_(False)
    elif why == "other class":
        attention.q_proj.__class__ = torch.nn.Linear
    elif why == "strides":
        attention.o_proj.weight.data = attention.o_proj.weight.data.t().contiguous().t()
    elif why == "eager":
        mine.set_attn_implementation("eager")
    elif why == "recorded":
        mine.config.output_router_logits = True
    with torch.set_grad_enabled(why == "gradients"):
        cache = PagedCache(model.config, page_size=4)
        actual = steps(mine, IDS[:, :22], parts, cache)
    first = why in ("hook", "other class", "strides")
    assert taken == [False, False] + [False, first] * 2
    assert len(seen) == (3 if why == "hook" else 0)
    hold(actual, model, IDS[:, :22], parts)


@torch.no_grad()
def test_padding_goes_the_long_way(taken):
    model, mine = pair(torch.float32)
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, parts = PagedCache(model.config, page_size=4), ((0, 20), (20, 22))
    for start, end in parts:
        done = mine(
            IDS[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
    assert taken[2:] == [True, True]  # padding before the new tokens is in no one's way
    with exact():
        wide = copy.deepcopy(model).double()
        truth, eager = (
            m(IDS[:, :22], attention_mask=mask, position_ids=positions).logits[:, 20:]
            for m in (wide, model)
        )
    assert_close(done.logits, eager, truth)
    taken.clear()
    mask = torch.cat([mask, torch.tensor([[1, 1], [1, 0]])], 1)
    positions = (mask.cumsum(1) - 1)[:, 22:]
    mine(
        IDS[:, 22:24], attention_mask=mask, position_ids=positions, past_key_values=cache
    )  # padding among them is
    assert taken == [False, False]


def test_options_are_named():
    _, mine = pair(torch.bfloat16)
    with pytest.raises(ValueError, match='expected projections None or "int8", got fp8'):
        integration.patch(mine, projections="fp8")
    replaced = integration.patch(mine, projections="int8")
    assert set(replaced.values()) == {"Int8Linear"}
    assert len(replaced) == 2 * 4 + 1
    assert not integration.patch(mine, projections="int8")
