"""mxfp4: every byte and scale by OpenAI's table and transformers, rounding by exact fractions."""

import math
from fractions import Fraction

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import testing
from medgpt_kernels.mxfp4 import reference

BACKENDS = [b for b in testing.backend_modules("mxfp4") if b != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# openai/gpt-oss, gpt_oss/torch/weights.py
OPENAI = [+0.0, +0.5, +1.0, +1.5, +2.0, +3.0, +4.0, +6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0,
          -6.0]  # fmt: skip

every = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def bits(t: torch.Tensor) -> torch.Tensor:
    """Equal only where signs of zeros are equal too; every NaN alike."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]
    return t.nan_to_num(nan=12345.0, posinf=torch.inf, neginf=-torch.inf).view(kind)


def every_byte_and_scale() -> mk.Mxfp4Tensor:
    """Logical [256, 16, 32]: scale s, then all 256 bytes."""
    byte = torch.arange(256, dtype=torch.uint8)
    return mk.Mxfp4Tensor(
        byte.view(1, 16, 1, 16).expand(256, 16, 1, 16).contiguous(),
        byte.view(256, 1, 1).expand(256, 16, 1).contiguous(),
    )


def block_of(*values: float, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * (32 - len(values))], dtype=dtype)


def quantize(w: torch.Tensor, backend: str = "reference") -> mk.Mxfp4Tensor:
    with mk.backend(backend), testing.poisoned_empty():
        return mk.mxfp4_quantize(w)


def codes(q: mk.Mxfp4Tensor) -> torch.Tensor:
    """[..., K], low nibble first."""
    return torch.stack([q.blocks & 15, q.blocks >> 4], -1).flatten(-3)


def nearest(value: Fraction) -> int:
    """The nearest E2M1 code, ties to the even code, by exact arithmetic."""
    magnitude = [Fraction(v) for v in OPENAI[:8]]
    distance = [abs(abs(value) - m) for m in magnitude]
    best = min(distance)
    ties = [c for c in range(8) if distance[c] == best]
    return ties[0] if len(ties) == 1 else next(c for c in ties if c % 2 == 0)


# Dequantisation


@every
@dtypes
def test_every_byte_and_scale(backend, dtype):
    """By OpenAI's table: 65,536 combinations, bit for bit; a scale of 255 is NaN."""
    packed = every_byte_and_scale()
    with mk.backend(backend), testing.poisoned_empty():
        found = packed.dequantize(dtype)
    table = torch.tensor(OPENAI, dtype=torch.float64)
    code = torch.stack([packed.blocks & 15, packed.blocks >> 4], -1).flatten(-2).long()
    scale = torch.exp2(packed.scales.double() - 127)[..., None]
    expected = (table[code] * scale).flatten(-2).to(dtype)
    expected[255] = torch.nan
    assert torch.equal(bits(found), bits(expected))


@every
@dtypes
def test_equals_transformers(backend, dtype):
    """Its converter, for every byte and scale but 255, which it takes for 2^128."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = every_byte_and_scale()
    with mk.backend(backend):
        found = packed.dequantize(dtype)
    theirs = convert_moe_packed_tensors(packed.blocks, packed.scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(bits(found[:255]), bits(theirs[:255].contiguous()))
    assert found[255].isnan().all()
    assert not theirs[255].isnan().all()


@every
def test_fp64_values_are_exact(backend):
    """No overflow, and where a backend has no fp64 the reference takes over with its warning."""
    packed = every_byte_and_scale()
    if backend == "reference":
        with mk.backend(backend):
            found = packed.dequantize(torch.float64)
    else:
        found = reference.mxfp4_dequantize(*packed, torch.float64)
    assert found[:255].isfinite().all()
    assert found[254].abs().max() == 6 * 2.0**127


@backends
@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 3, 5, 96), (0, 64), (4, 0), (70, 32 * 9)])
@dtypes
def test_any_leading_shape(backend, shape, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, expected = quantize(w, backend), quantize(w)
    assert found.shape == w.shape
    assert found.ndim == w.ndim
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with mk.backend(backend), testing.poisoned_empty():
        assert torch.equal(bits(found.dequantize(dtype)), bits(expected.dequantize(dtype)))


# Quantisation


@every
@dtypes
def test_rounds_to_nearest_even_by_the_ocp_scale(backend, dtype):
    """Random blocks over the whole range, each value against exact rational arithmetic."""
    g = torch.Generator().manual_seed(0)
    exponents = torch.randint(-14, 15, (64, 1), generator=g).float()
    w = (torch.randn(64, 32, generator=g) * torch.exp2(exponents)).to(dtype)
    w[:8] = w[:8] * torch.exp2(torch.tensor(-9.0))  # subnormal halves among them
    found = quantize(w, backend)
    found_codes = codes(found)
    for row in range(64):
        values = [Fraction(v) for v in w[row].tolist()]
        largest = max(abs(v) for v in values)
        exponent = math.frexp(float(largest))[1] - 1 - 2 if largest else -127
        assert found.scales[row].item() == max(exponent + 127, 0)
        for i, v in enumerate(values):
            code = nearest(v / Fraction(2) ** exponent)
            assert (found_codes[row, i].item() & 7) == code, (row, i, w[row, i])
            assert found_codes[row, i].item() >> 3 == int(math.copysign(1, w[row, i]) < 0)


@every
def test_ties_and_clipping(backend):
    """Each midpoint between two codes, and what lies between 6 and 8, at scale 1."""
    ties = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
    beside = {v * (1 + s * 2**-20): nearest(Fraction(v * (1 + s * 2**-20)))
              for v in ties for s in (-1, 1)}  # fmt: skip
    clipped = {6.5: 7, 7.0: 7, 7.999: 7}
    wanted = ties | beside | clipped
    for sign, bit in ((1, 0), (-1, 8)):
        found = quantize(block_of(4.0, *(sign * v for v in wanted)), backend)
        assert found.scales.tolist() == [127]
        assert codes(found)[1 : 1 + len(wanted)].tolist() == [c | bit for c in wanted.values()]


@every
@dtypes
def test_zeros_and_their_signs(backend, dtype):
    found = quantize(block_of(0.0, -0.0, dtype=dtype), backend)
    assert found.scales.tolist() == [0]
    assert codes(found).tolist() == [0, 8, *[0] * 30]
    again = quantize(block_of(-1e-3, 4.0, -0.0, dtype=dtype), backend)  # rounds to -0
    assert codes(again)[:3].tolist() == [8, 6, 8]
    with mk.backend(backend):
        assert again.dequantize(dtype)[:3].signbit().tolist() == [True, False, True]


@every
@dtypes
def test_nan_makes_its_block_nan(backend, dtype):
    w = torch.ones(3, 64, dtype=dtype)
    w[1, 40] = torch.nan
    w[2, 3] = -torch.tensor(torch.nan)
    w[1, 41] = torch.inf
    found = quantize(w, backend)
    assert found.scales.tolist() == [[125, 125], [125, 255], [255, 125]]
    assert (found.blocks[found.scales == 255] == 0).all()
    with mk.backend(backend):
        values = found.dequantize(dtype).unflatten(-1, (2, 32))
    assert values[found.scales == 255].isnan().all()
    assert (values[found.scales != 255] == 1).all()


@every
@dtypes
def test_infinities_stay(backend, dtype):
    found = quantize(block_of(torch.inf, 1.0, -torch.inf, -2.0, dtype=dtype), backend)
    assert found.scales.tolist() == [253]
    assert codes(found)[:4].tolist() == [7, 0, 15, 8]
    with mk.backend(backend):
        assert found.dequantize(dtype)[:3].tolist() == [torch.inf, 0, -torch.inf]


@every
def test_ends_of_the_scale(backend):
    """The largest finite floats, and subnormals, whose scale byte would be below 0."""
    largest = torch.finfo(torch.float32).max
    found = quantize(torch.stack([block_of(largest), block_of(2.0**-149), block_of(2.0**-125)]),
                     backend)  # fmt: skip
    assert found.scales.flatten().tolist() == [252, 0, 0]
    assert codes(found)[:, 0].tolist() == [7, 0, 6]
    with mk.backend(backend):
        values = found.dequantize(torch.float32)[:, 0].tolist()
    assert values == [6 * 2.0**125, 0.0, 2.0**-125]


@every
def test_representable_values_survive(backend):
    """Every block that holds a 4 or a 6 comes back byte for byte."""
    packed = every_byte_and_scale()
    blocks, scales = packed.blocks[1:253].clone(), packed.scales[1:253]
    blocks[..., 0] = blocks[..., 0] & 0xF0 | 6
    with mk.backend(backend):
        values = mk.Mxfp4Tensor(blocks, scales).dequantize(torch.float32)
    found = quantize(values, backend)
    assert torch.equal(found.blocks, blocks)
    assert torch.equal(found.scales, scales)


@backends
def test_any_strides(backend):
    w = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    found, expected = quantize(w.T, backend), quantize(w.T.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    wide = mk.Mxfp4Tensor(*(torch.stack([t, t], 1)[:, 1] for t in expected))
    strided = mk.Mxfp4Tensor(wide.blocks.transpose(-1, -2).contiguous().transpose(-1, -2), wide[1])
    with mk.backend(backend):
        assert torch.equal(strided.dequantize(torch.float32), expected.dequantize(torch.float32))


@backends
def test_many_blocks(backend):
    """More than one thread or program, and a last one that is not full."""
    w = testing.realistic(67, 32 * 13, seed=4)
    found, expected = quantize(w, backend), quantize(w)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Negative controls


@pytest.mark.parametrize("wrong", ["nibble order", "scale off by one", "sign bit", "table"])
def test_wrong_dequantisation_is_noticed(wrong):
    packed = every_byte_and_scale()
    right = packed.dequantize(torch.float32)[1:254]
    blocks, scales = packed.blocks[1:254], packed.scales[1:254]
    if wrong == "nibble order":
        blocks = blocks << 4 | blocks >> 4
    elif wrong == "scale off by one":
        scales = scales + 1
    elif wrong == "sign bit":
        blocks = blocks ^ 0x88
    else:  # 1.5 and 2 change places
        blocks = torch.where(blocks & 15 == 3, blocks + 1, blocks)
    found = mk.Mxfp4Tensor(blocks, scales).dequantize(torch.float32)
    assert not torch.equal(bits(found), bits(right))


@pytest.mark.parametrize("wrong", ["ties away", "scale rounded up", "truncated"])
def test_wrong_quantisation_is_noticed(wrong):
    """On the blocks that the tests above use, each mistake changes a code or a scale."""
    w = torch.cat([block_of(4.0, 0.25, 1.25, 2.5, 5.0, 2.9), block_of(7.0, 6.5)]).view(2, 32)
    right = quantize(w)
    a = w.abs()
    edges = {"ties away": [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], "truncated": OPENAI[1:8]}
    if wrong == "scale rounded up":  # so that nothing clips
        a = a / torch.tensor([[1.0], [2.0]])
        other = reference.code_of(a)
    else:
        other = sum((a >= edge).to(torch.uint8) for edge in edges[wrong])
    assert not torch.equal(other, codes(right))


# Bad input, the dispatcher's own checks, and compilation


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(3, 33), r"multiples of 32, got \[3, 33\]"),
        (torch.tensor(1.0), r"multiples of 32, got \[\]"),
        (torch.zeros(3, 32).int(), "a float tensor of 16 bits or more, got torch.int32"),
    ],
)
def test_quantize_refuses(w, message):
    with pytest.raises(ValueError, match="mxfp4_quantize: expected.*" + message):
        mk.mxfp4_quantize(w)


@pytest.mark.parametrize(
    ("blocks", "scales", "dtype", "message"),
    [
        ((3, 2, 16), (3, 3), torch.float32, r"\[3, 2, 16\] and \[3, 3\]"),
        ((3, 2, 32), (3, 2), torch.float32, r"blocks \[\.\.\., K/32, 16\]"),
        ((3, 2, 16), (3, 2), torch.int32, "float32, bfloat16, float16 or float64, got torch.int"),
    ],
)
def test_dequantize_refuses(blocks, scales, dtype, message):
    packed = mk.Mxfp4Tensor(*(torch.zeros(s, dtype=torch.uint8) for s in (blocks, scales)))
    with pytest.raises(ValueError, match="mxfp4: expected.*" + message):
        packed.dequantize(dtype)


def test_dequantize_refuses_other_dtypes_of_bytes():
    packed = mk.Mxfp4Tensor(torch.zeros(2, 16).int(), torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="mxfp4: expected uint8 blocks and scales, got"):
        packed.dequantize()


def test_gradients_stop():
    w = torch.randn(2, 32, requires_grad=True)
    assert not mk.mxfp4_quantize(w).dequantize(torch.float32).requires_grad


def test_to_another_device():
    moved = mk.mxfp4_quantize(torch.randn(2, 64)).to("meta")
    assert moved.device.type == "meta"
    assert moved.shape == (2, 64)


def test_opcheck():
    ops = torch.ops.medgpt_kernels
    torch.library.opcheck(ops.mxfp4_quantize.default, (torch.randn(3, 2, 64),))
    packed = mk.mxfp4_quantize(torch.randn(3, 2, 64))
    torch.library.opcheck(ops.mxfp4_dequantize.default, (*packed, torch.bfloat16))


def test_compiles_at_most_twice():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(w):
        packed = mk.mxfp4_quantize(w)
        return packed, packed.dequantize(torch.bfloat16)

    for n in torch.randint(2, 99, (50,), generator=torch.Generator().manual_seed(0)).tolist():
        w = torch.randn(n, 64)
        packed, values = step(w)
        expected = mk.mxfp4_quantize(w)
        assert torch.equal(packed.blocks, expected.blocks)
        assert torch.equal(values, expected.dequantize(torch.bfloat16))
    assert counter.frame_count <= 2
