"""Roofs are measured, costs are counted by hand here, and a percentage is their quotient."""

import pytest
import torch

from medgpt_kernels import roofline
from medgpt_kernels.roofline import Cost, Roofs

ROOFS = Roofs(copy_gbs=10.0, gemm_gflops={torch.float32: 100.0, torch.bfloat16: 400.0})


def test_forward_cost_counts_every_tensor_once():
    cost = roofline.patch_embed_cost(10, 2, 5, table_cells=9, prefix_rows=1, images=2)
    weight, bias, table, prefix, tokens = 12 * 5 * 4, 5 * 4, 9 * 5 * 4, 5 * 4, (10 + 2) * 5 * 4
    assert cost.bytes == 10 * 12 + weight + bias + table + prefix + tokens
    assert cost.flops == 2 * 10 * 12 * 5


def test_backward_cost_is_the_mirror_of_forward():
    sizes = {"patches": 100, "patch_size": 16, "width": 64, "dtype": torch.bfloat16}
    forward = roofline.patch_embed_cost(**sizes)
    backward = roofline.patch_embed_cost(**sizes, backward=True)
    assert backward == forward
    with_pixels = roofline.patch_embed_cost(**sizes, pixel_bytes=4, backward=True, d_pixels=True)
    assert with_pixels.flops == 2 * forward.flops
    assert with_pixels.bytes > backward.bytes + 2 * 100 * 768


def test_bf16_halves_weight_and_tokens():
    wide = roofline.patch_embed_cost(1000, 16, 128)
    narrow = roofline.patch_embed_cost(1000, 16, 128, dtype=torch.bfloat16)
    pixels = 1000 * 768
    assert narrow.bytes - pixels == (wide.bytes - pixels) / 2


def test_routing_reads_the_tokens_once():
    cost = roofline.routing_cost(10, 7, 4, 2)
    written = 10 * 4 * 4 + 4 * 10 * 2 * 4 + 4 * (4 + 5)
    assert cost == Cost(4 * (10 * 7 + 4 * 8) + written, 2 * 10 * 7 * 4)
    backward = roofline.routing_cost(10, 7, 4, 2, backward=True)
    assert backward.flops == 2 * cost.flops


def test_mxfp4_is_seventeen_bytes_a_block():
    assert roofline.mxfp4_cost(64, torch.bfloat16) == Cost(2 * 64 + 34, 64)


def test_costs_add():
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)


@pytest.mark.parametrize(
    ("cost", "dtype", "seconds"),
    [
        (Cost(10**10, 10**9), torch.float32, 1.0),  # bound by traffic
        (Cost(10**9, 10**11), torch.float32, 1.0),  # bound by arithmetic
        (Cost(10**9, 10**11), torch.bfloat16, 0.25),
    ],
)
def test_the_nearer_roof_bounds(cost, dtype, seconds):
    assert roofline.bound_seconds(cost, ROOFS, dtype) == pytest.approx(seconds)
    assert roofline.percent_of_roof(cost, 2 * seconds, ROOFS, dtype) == pytest.approx(50.0)


def test_measure_small(monkeypatch):
    """The measurement itself, at a size that takes no time."""
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "GEMM_SHAPE", (64, 64, 64))
    roofs = roofline.measure.__wrapped__("cpu")
    assert roofs.copy_gbs > 0
    assert set(roofs.gemm_gflops) == {torch.float32, torch.bfloat16}
    assert all(rate > 0 for rate in roofs.gemm_gflops.values())


def test_experts_cost():
    """6 products of tokens x topk x H x I; 17 bytes for 32 packed weights; each backward twice."""
    dense = roofline.experts_cost(10, 4, 7, 64, 32)
    assert dense.flops == 6 * 10 * 4 * 64 * 32
    assert dense.bytes == 7 * 3 * 64 * 32 * 4 + 2 * 10 * 64 * 4
    packed = roofline.experts_cost(10, 4, 7, 64, 32, packed=True)
    assert packed.bytes == 7 * 3 * 64 * 32 * 17 // 32 + 2 * 10 * 64 * 4
    assert roofline.experts_cost(10, 4, 7, 64, 32, backward="frozen") == dense
    trained = roofline.experts_cost(10, 4, 7, 64, 32, backward="trainable")
    assert trained.flops == 2 * dense.flops
    assert trained.bytes == 2 * dense.bytes - 10 * 64 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_measure_on_a_gpu_waits_for_the_work():
    roofs = roofline.measure("cuda")
    assert 10 < roofs.copy_gbs < 20_000
    assert roofs.gemm_gflops[torch.bfloat16] > roofs.gemm_gflops[torch.float32]
