"""What a GPU kernel can reach at best, predicted from its machine code; never a measurement.

One round of the hot loop of a block of threads asks each unit of a multiprocessor for so many
cycles. The busiest unit sets the ceiling: all others are taken to work beside it. Latency,
dependencies, barriers, bank conflicts, caches and memory are not seen (docs/static_model.md).
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from medgpt_kernels import sass

LABEL = "predicted ceiling from machine code, not a measurement"
UNITS = ("matrix", "exp", "fma", "imad", "int", "shared", "fill", "issue")


class Rates(NamedTuple):
    """What one multiprocessor does in a cycle, and how many there are."""

    device: str
    multiprocessors: int
    mhz: float  # at which the maker's figure for 16-bit products holds
    matrix: int  # operations of dense bf16 products summed in fp32
    fma: int  # results, of fp32 additions, products and both at once
    half: int  # of two bf16 values at once
    memory_gbs: float
    exp: int = 16
    int_: int = 64
    imad: int = 64
    shared: int = sass.BANKS_BYTES
    fill: int = 64  # bytes from L2
    issue: int = 4  # instructions of a warp

    @property
    def peak_tflops(self) -> float:
        return self.matrix * self.multiprocessors * self.mhz / 1e6


# CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; products from the
# makers' figures of the cards named: GeForce cards sum bf16 products in fp32 at half their rate
RATES = {
    "sm_80": Rates("A100 SXM", 108, 1410, 2048, 64, 64, 2039),
    "sm_86": Rates("RTX 3090", 82, 1695, 512, 128, 64, 936),
    "sm_89": Rates("RTX 4090", 128, 2520, 512, 128, 64, 1008),
    "sm_90": Rates("H100 SXM", 132, 1830, 4096, 128, 128, 3350),
    "sm_100": Rates("B200", 148, 1850, 8192, 128, 128, 8000),
    "sm_120": Rates("RTX 5090", 170, 2407, 512, 128, 64, 1792),
}


class Static(NamedTuple):
    """The bounds on one kernel on one card."""

    kernel: str
    card: str
    flops: int  # of a round of the hot loop of one block of threads, padding included
    cycles: dict[str, float]  # that a round takes each of UNITS
    limit: str  # the busiest of them
    tflops: float  # the ceiling
    percent: float  # of the card's peak
    serial_tflops: float  # were the matrix unit to wait for all else
    load_gbs: float  # what memory and caches must give for the ceiling
    counts: dict[str, int]  # a round's instructions by unit


def cycles(counts: sass.Counts, rates: Rates) -> dict[str, float]:
    """Cycles of one multiprocessor that a round takes each unit."""
    n = counts.instructions
    return {
        "matrix": counts.flops / rates.matrix,
        "exp": 32 * n["exp"] / rates.exp,
        "fma": 32 * ((n["fma"] + n["imad"]) / rates.fma + n["half"] / rates.half),
        "imad": 32 * n["imad"] / rates.imad,
        "int": 32 * n["int"] / rates.int_,
        "shared": counts.shared_bytes / rates.shared,
        "fill": counts.global_bytes / rates.fill,
        "issue": counts.issued / rates.issue,
    }


def bound(kernel: str, card: str, counts: sass.Counts) -> Static:
    """The ceiling that a round's counts leave."""
    rates = RATES[card]
    taken = cycles(counts, rates)
    limit = max(taken, key=taken.get)
    per_second = rates.multiprocessors * rates.mhz * 1e6
    rest = max(value for unit, value in taken.items() if unit != "matrix")
    tflops = counts.flops / taken[limit] * per_second / 1e12
    return Static(
        kernel, card, counts.flops, taken, limit, tflops, 100 * tflops / rates.peak_tflops,
        counts.flops / (taken["matrix"] + rest) * per_second / 1e12,
        counts.global_bytes / taken[limit] * per_second / 1e9, dict(counts.instructions),
    )  # fmt: skip


def disassemble(cubin: bytes) -> str:
    """A kernel's machine code by the nvdisasm in Triton's package."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of_cubin(kernel: str, card: str, cubin: bytes, warps: int) -> Static | None:
    """The bounds on a compiled kernel; None where it has no loop."""
    loop = sass.hot_loop(disassemble(cubin), warps)
    return loop and bound(kernel, card, sass.count(loop, warps))


def _row(s: Static) -> str:
    units = " | ".join(f"{s.cycles[unit]:.0f}" for unit in UNITS)
    ceiling = f"{s.tflops:.0f} | {s.percent:.0f} % | {s.serial_tflops:.0f}"
    return f"| {s.kernel} | {s.card} | {units} | {s.limit} | {ceiling} | {s.load_gbs / 1e3:.1f} |"


def table(statics: Iterable[Static]) -> str:
    """One line a kernel and card, cycles of a multiprocessor for a round by unit."""
    head = (
        f"| kernel | card | {' | '.join(UNITS)} | limit | TFLOP/s | of peak | unoverlapped | "
        "loads TB/s |"
    )
    rule = "|---" * (head.count("|") - 1) + "|"
    return "\n".join([LABEL, "", head, rule, *map(_row, statics)])


def markdown(statics: Iterable[Static]) -> str:
    """The limiting unit and the share of the peak by matrix kernel and card, for docs/."""
    statics = [s for s in statics if s.flops]
    cards = [card for card in RATES if any(s.card == card for s in statics)]
    cells: dict[str, dict[str, str]] = {}
    for s in statics:
        name = re.sub(r"-sm_\d+((-\d+)?\])$", r"\1", s.kernel)
        cells.setdefault(name, {})[s.card] = f"{s.limit} {s.percent:.0f} %"
    lines = [f"| kernel | {' | '.join(cards)} |", "|---" * (len(cards) + 1) + "|"]
    for name, row in sorted(cells.items()):
        lines.append(f"| `{name}` | {' | '.join(row.get(card, '') for card in cards)} |")
    peaks = ", ".join(
        f"{c}: {RATES[c].device}, {RATES[c].peak_tflops:.0f} TFLOP/s, "
        f"{RATES[c].memory_gbs / 1e3:.2g} TB/s"
        for c in cards
    )
    return "\n".join([f"{LABEL.capitalize()} ({peaks}).", "", *lines])
