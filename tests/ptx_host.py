"""PTX of inline assembly, run on the CPU: the few instructions that our kernels write themselves.

A register is an int of its bits; fp32 and bf16 arithmetic is exact in double before it is rounded.
"""

import re
import struct

import numpy as np
import torch


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def bits_of(x: float) -> int:
    with np.errstate(over="ignore"):
        return int(np.float32(x).view(np.uint32))


def bf16_of(bits: int) -> float:
    return float_of((bits & 0xFFFF) << 16)


def bits_of_bf16(x: float) -> int:
    """To nearest even in one step, from a value that fp32 holds."""
    assert float_of(bits_of(x)) == x or x != x or abs(x) > 3.4e38
    return int(torch.tensor(x, dtype=torch.float32).bfloat16().view(torch.int16)) & 0xFFFF


def _halves(value: int, width: int) -> list[int]:
    return [value & (1 << width) - 1, value >> width]


def _packed(operation, *operands: int, width: int, read, write) -> int:
    lanes = zip(*(_halves(x, width) for x in operands), strict=True)
    low, high = (write(operation(*map(read, lane))) for lane in lanes)
    return low | high << width


def _maximum(a: int, b: int) -> int:
    x, y = float_of(a), float_of(b)
    return 0x7FFFFFFF if x != x or y != y else (a if x > y else b)


FP32 = {"width": 32, "read": float_of, "write": bits_of}
BF16 = {"width": 16, "read": bf16_of, "write": bits_of_bf16}
OPERATIONS = {
    "fma.rn.f32x2": lambda a, b, c: _packed(lambda x, y, z: x * y + z, a, b, c, **FP32),
    "add.rn.f32x2": lambda a, b: _packed(lambda x, y: x + y, a, b, **FP32),
    "fma.rn.bf16x2": lambda a, b, c: _packed(lambda x, y, z: x * y + z, a, b, c, **BF16),
    "max.NaN.f32": _maximum,
    "ex2.approx.ftz.f32": lambda a: bits_of(np.exp2(np.float64(float_of(a)))),
    "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
    "add.s32": lambda a, b: a + b & 0xFFFFFFFF,
}


def run(text: str, outputs: int, inputs: list[int]) -> list[int]:
    """The bits of $0 ... from those of the inputs that follow them."""
    registers = {f"${outputs + i}": bits for i, bits in enumerate(inputs)}

    def read(operand: str) -> int:
        if operand.startswith("0f"):
            return int(operand[2:], 16)
        return registers[operand] if operand in registers else int(operand, 0)

    for line in text.strip("{}\n").split("\n"):
        name, _, rest = line.strip().rstrip(";").split("//")[0].partition(" ")
        if name == ".reg":
            continue
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest.split(";")[0])
        if not name.startswith("mov."):
            registers[operands[0]] = OPERATIONS[name](*map(read, operands[1:]))
            continue
        target, source = operands
        pair = re.findall(r"[$\w]+", target if target.startswith("{") else source)
        half = int(name[5:]) // 2
        if target.startswith("{"):
            registers |= dict(zip(pair, _halves(read(source), half), strict=True))
        elif source.startswith("{"):
            registers[target] = read(pair[0]) | read(pair[1]) << half
        else:
            registers[target] = read(source)
    return [registers[f"${i}"] for i in range(outputs)]
