"""Memory in huge pages: of tensors that are as others are, and hold what they are given."""

import copy
import gc
from pathlib import Path

import pytest
import torch

from medgpt_kernels import huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that a tensor begins in, as the system counts them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            first, end = (int(x, 16) for x in name.split("-"))
            inside = first <= tensor.data_ptr() < end
        elif inside and name == "AnonHugePages:":
            return 1024 * int(rest.split()[0])
    return 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_tensor_like_any_other(dtype):
    made = huge_pages.empty(3, 1 << 20, 2, dtype=dtype)
    assert made.shape == (3, 1 << 20, 2)
    assert made.dtype == dtype
    assert made.is_contiguous()
    assert not made.count_nonzero()
    part = made.fill_(3)[1:]
    others = [huge_pages.empty(3, 1 << 20, 2, dtype=dtype).fill_(5) for _ in range(3)]
    again = copy.deepcopy(made)
    del made
    gc.collect()
    assert (part == 3).all()
    assert (again == 3).all()
    assert all((other == 5).all() for other in others)


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="a system without huge pages"
)
def test_pages_are_huge():
    made = huge_pages.empty(1 << 25, dtype=torch.uint8).fill_(1)
    if not huge_bytes(made):
        pytest.skip("no huge page is free")
    assert made.data_ptr() % huge_pages.PAGE == 0
    assert huge_bytes(made) > made.nbytes // 2


def test_small_ones_and_other_devices_are_torchs():
    small = huge_pages.empty(5, 7, dtype=torch.float32)
    assert small.untyped_storage().nbytes() == small.nbytes
    with torch.device("meta"):
        assert huge_pages.empty(1 << 25, dtype=torch.uint8).is_meta


def test_a_module_moves_with_its_values():
    torch.manual_seed(0)
    layer = torch.nn.Linear(2048, 1024, dtype=torch.bfloat16)
    layer.register_buffer("table", torch.arange(1 << 20, dtype=torch.int64))
    tied = torch.nn.ModuleList([layer, torch.nn.Linear(2048, 1024)])
    tied[1].weight = layer.weight
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    weight, small = layer.weight.data_ptr(), layer.bias.data_ptr()
    huge_pages.move(tied)
    assert layer.weight.data_ptr() != weight
    assert layer.bias.data_ptr() == small
    assert tied[1].weight is layer.weight
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert layer.weight.requires_grad
    after = tied.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    layer(torch.ones(2, 2048, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None
