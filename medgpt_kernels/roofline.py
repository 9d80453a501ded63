"""What this device can do at best, and how near to it a measured time comes.

A roof is measured, not read from a data sheet: the copy rate and the matrix-product rate that
torch reaches here. An op's cost is the least traffic and work that any implementation needs.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

COPY_BYTES = 256 << 20
GEMM_SHAPE = (2048, 2880, 5760)
DTYPES = (torch.float32, torch.bfloat16)


class Roofs(NamedTuple):
    """Measured limits of one device."""

    copy_gbs: float  # bytes read plus bytes written, in GB/s
    gemm_gflops: dict[torch.dtype, float]


class Cost(NamedTuple):
    """The least bytes moved to or from memory, and the floating-point operations, of a call."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def time_call(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call; on a GPU between two events, so queued work is counted."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _median(function: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    function()
    return statistics.median(time_call(function, device) for _ in range(rounds))


@functools.cache
def measure(device: str = "cpu") -> Roofs:
    """Measure a device's roofs; once a process, about two seconds on a small CPU.

    Args:
        device: "cpu", "cuda" or "cuda:1".

    Returns:
        Roofs: medians of five rounds of a 256 MB copy and of a 2048 x 2880 x 5760 product a dtype.
        fp32 products are full fp32 (torch's default), never TF32.
    """
    where = torch.device(device)
    return Roofs(_copy_gbs(where), {dtype: _gemm_gflops(where, dtype) for dtype in DTYPES})


def measure_again(roofs: Roofs, device: str = "cpu") -> Roofs:
    """The higher of `roofs` and a second measurement: something may have run beside the first."""
    again = measure.__wrapped__(device)
    gemm = {k: max(v, again.gemm_gflops[k]) for k, v in roofs.gemm_gflops.items()}
    return Roofs(max(roofs.copy_gbs, again.copy_gbs), gemm)


def _copy_gbs(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median(functools.partial(target.copy_, source), device) / 1e9


def _gemm_gflops(device: torch.device, dtype: torch.dtype) -> float:
    m, k, n = GEMM_SHAPE
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2 * m * k * n / _median(functools.partial(torch.mm, a, b, out=out), device) / 1e9


def bound_seconds(cost: Cost, roofs: Roofs, dtype: torch.dtype = torch.float32) -> float:
    """The time that the nearer roof allows: traffic and arithmetic overlap perfectly."""
    return max(cost.bytes / roofs.copy_gbs, cost.flops / roofs.gemm_gflops[dtype]) / 1e9


def attention_cost(
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
) -> Cost:
    """Causal sequences: q, k, v read and out written once; gradients too in the backward.

    Args:
        lengths: tokens of each packed sequence.
        window: keys a query sees, itself included; 0 for all before it.
        backward: the backward alone: five products for the forward's two.
    """
    seen = 0
    for n in lengths:
        short = min(n, window or n)  # the first queries see fewer keys than the window holds
        seen += short * (short + 1) // 2 + (n - short) * short
    rows = sum(lengths) * head_dim * dtype.itemsize
    flops = (5 if backward else 2) * 2 * seen * heads * head_dim
    q_like, k_like = (4, 4) if backward else (2, 2)
    return Cost(bytes=rows * (q_like * heads + k_like * kv_heads), flops=flops)


def decode_attention_cost(
    seen: int, heads: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype = torch.float32
) -> Cost:
    """One new token over `seen` cached keys: keys and values read once, q and out beside them."""
    elements = 2 * (seen * kv_heads + heads) * head_dim
    return Cost(bytes=elements * dtype.itemsize, flops=4 * seen * heads * head_dim)


def rotary_cost(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Cost:
    """q and k of `heads` heads together, read and written once, and the two fp32 tables."""
    elements = tokens * heads * head_dim
    return Cost(bytes=2 * elements * dtype.itemsize + 4 * tokens * head_dim, flops=3 * elements)


def routing_cost(
    tokens: int,
    hidden: int,
    num_experts: int,
    topk: int,
    *,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
) -> Cost:
    """x, weight and bias read once; fp32 logits, weights and int32 indices written once.

    Backward alone: x and weight are read and their gradients written, two products for one.
    """
    x, weight = tokens * hidden * dtype.itemsize, num_experts * (hidden + 1) * dtype.itemsize
    logits, slots = 4 * tokens * num_experts, 4 * tokens * topk
    products = 2 * tokens * hidden * num_experts
    if backward:
        return Cost(2 * x + 2 * weight + logits + 3 * slots, 2 * products)
    return Cost(x + weight + logits + 4 * slots + 4 * (2 * num_experts + 1), products)


def mxfp4_cost(values: int, dtype: torch.dtype) -> Cost:
    """Values in dtype on one side, 17 bytes for 32 of them on the other; an operation each."""
    return Cost(bytes=values * dtype.itemsize + values // 32 * 17, flops=values)


def percent_of_roof(
    cost: Cost, seconds: float, roofs: Roofs, dtype: torch.dtype = torch.float32
) -> float:
    """How much of the nearer roof a measured time reaches, in percent."""
    return 100 * bound_seconds(cost, roofs, dtype) / seconds


def patch_embed_cost(
    patches: int,
    patch_size: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    pixel_bytes: int = 1,
    table_cells: int = 0,
    prefix_rows: int = 0,
    images: int = 1,
    backward: bool = False,
    d_pixels: bool = False,
) -> Cost:
    """The cost of patch_embed's forward, or of its backward alone.

    Forward: pixels, weight, bias, table and prefix are read once and every token is written once.
    Backward: token gradients and pixels are read once, each parameter's gradient is written once;
    pixel gradients, where wanted, read the weight too and double the products. The interpolation
    of positions is not counted as work: it is a few operations a token element.

    Args:
        patches: in all images. patch_size: side. width: of a token.
        dtype: of weight and tokens; the table counts as fp32.
        pixel_bytes: 1 for uint8.
        table_cells: G * G, or 0 without a table.
        prefix_rows: rows before each of `images` images.
        d_pixels: whether the pixels, then float, want a gradient (backward only).
    """
    depth = 3 * patch_size * patch_size
    pixels = patches * depth * pixel_bytes
    weight = (depth + 1) * width * dtype.itemsize
    positions = table_cells * width * 4
    prefix = prefix_rows * width * dtype.itemsize
    tokens = (patches + images * prefix_rows) * width * dtype.itemsize
    products = 2 * patches * depth * width
    cost = Cost(pixels + weight + positions + prefix + tokens, products)
    if backward and d_pixels:
        cost += Cost(pixels + depth * width * dtype.itemsize, products)
    return cost


def experts_cost(
    tokens: int,
    topk: int,
    hit: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    backward: str | None = None,
) -> Cost:
    """The cost of a layer of experts forward, or of its backward alone.

    Forward: the weights of experts that have tokens and x are read once, y is written once.
    Backward: the weights and d_y are read, d_x is written; "trainable" also writes a gradient as
    large as the weights, and reads x. What a forward keeps for its backward is not counted.

    Args:
        hit: experts that have tokens, summed over calls.
        dtype: of x and of dense weights.
        packed: MXFP4 weights, 17 bytes for 32 values.
        backward: None, "frozen" or "trainable".
    """
    weights = 3 * hit * hidden * intermediate
    weight_bytes = weights * 17 // 32 if packed else weights * dtype.itemsize
    products = 6 * tokens * topk * hidden * intermediate
    row_bytes = tokens * hidden * dtype.itemsize
    cost = Cost(weight_bytes + 2 * row_bytes, products)
    if backward == "trainable":
        cost += Cost(weight_bytes + row_bytes, products)
    return cost
