"""The kernels' inline assembly against the arithmetic that it stands for, on a host's PTX."""

import math
import re

import pytest
import torch
from ptx_host import bits_of, float_of, run

from medgpt_kernels import Mxfp4Tensor

pytest.importorskip("triton")


def powers(text, scores, scale, m):
    """In packs, as the kernel's threads take them."""
    from medgpt_kernels.attention.triton_exp2 import PACK

    found, pack = [], PACK.value
    for i in range(0, len(scores), pack):
        part = scores[i : i + pack]
        inputs = [*part, *[-m] * pack, *[scale] * pack]
        found += map(float_of, run(text, pack, [bits_of(x) for x in inputs]))
    return found


def exponent(score):
    """s scale - m, rounded once as fma does."""
    s, scale, m = (float_of(bits_of(x)) for x in (score, 0.18, 7.3))
    return float_of(bits_of(s * scale - m))


def test_exponentials():
    """Below 2^-126 the polynomial's share stays there; all else is 3e-6 from the truth."""
    from medgpt_kernels.attention.triton_exp2 import PTX

    scores = torch.linspace(-1100, 40, 4096).tolist()
    scores[:512] = torch.linspace(39, 40, 512).tolist()
    found = powers(PTX.value, scores, 0.18, 7.3)
    for s, p in zip(scores, found, strict=True):
        assert p == pytest.approx(2 ** exponent(s), rel=4e-6, abs=2**-126)


def test_exponentials_of_nan_are_loud():
    from medgpt_kernels.attention.triton_exp2 import PACK, PTX

    found = powers(PTX.value, [math.nan] * PACK.value, 0.18, 7.3)
    assert all(p != p or p > 3e38 for p in found)


def test_a_wrong_coefficient_is_seen():
    from medgpt_kernels.attention.triton_exp2 import COEFFICIENTS, PTX

    right = f"{bits_of(COEFFICIENTS[2]):08X}"
    wrong = re.sub(right, f"{bits_of(COEFFICIENTS[2] * 1.01):08X}", PTX.value)
    assert wrong != PTX.value
    scores = torch.linspace(-20, 40, 256).tolist()
    pairs = zip(powers(wrong, scores, 0.18, 7.3), scores, strict=True)
    assert any(abs(p / 2 ** exponent(s) - 1) > 1e-5 for p, s in pairs)


def test_pairs_of_mxfp4():
    """Every byte under scales at both ends and between, bit for bit."""
    from medgpt_kernels.experts.triton_unpack import SCALE_PAIR

    scales = [0, 1, 2, 100, 127, 128, 129, 200, 252, 253, 254]
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(len(scales), 1, 1)
    column = torch.tensor(scales, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = Mxfp4Tensor(blocks, column).dequantize(torch.bfloat16).view(torch.int16)
    expected = (expected.reshape(len(scales), 256, 2).int() & 0xFFFF).tolist()
    for scale, rows in zip(scales, expected, strict=True):
        factor = 0x40 if scale == 0 else scale << 7
        for byte, values in enumerate(rows):
            pair = byte * 0x40040 & 0x1C001C0 | byte * 0x1001000 & 0x80008000
            assert run(SCALE_PAIR.value, 2, [pair, factor * 0x10001]) == values, (scale, byte)
