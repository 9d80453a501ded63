"""Which tile a Triton kernel takes on which card: committed tables, so that no call is a trial.

configs/FAMILY.json holds {kernel: {key: {"BLOCK_M": 128, ..., "num_warps": 4, "num_stages": 3}}}. A
kernel is named as its function without "_" and "_kernel". A launcher asks by keys, the most
particular first; "*" serves what has no key of its own. `benchmarks/tune.py` writes the tables.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "configs"
# families of cards, and those that the ahead-of-time gate compiles each table for
FAMILIES = {
    "sm_80": ("sm_80",),
    "sm_86": ("sm_86", "sm_89", "sm_120"),  # 99 KB of shared memory
    "sm_90": ("sm_90",),
    "sm_100": ("sm_100",),
    "gfx942": ("gfx942",),
}
INTERPRETER = "interpreter"
Tile = dict[str, int]
Table = Mapping[str, Mapping[str, Tile]]


@functools.cache
def table(family: str) -> Table:
    """The committed choices of one family, of "interpreter" too."""
    return json.loads((FOLDER / f"{family}.json").read_text())


def nearest_family(capability: tuple[int, int], shared: int) -> str:
    """The family whose tiles a card takes, known or not.

    Args:
        capability: (major, minor) of an NVIDIA card.
        shared: bytes of shared memory that one block may have.
    """
    if shared < 160 * 1024:
        return "sm_86"
    if capability[0] < 9:
        return "sm_80"
    return "sm_90" if capability[0] == 9 else "sm_100"


@functools.cache
def device_family(index: int) -> str:
    """The family of one CUDA or ROCm device."""
    if torch.version.hip is not None:
        return "gfx942"
    from triton.runtime import driver

    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return nearest_family(torch.cuda.get_device_capability(index), shared)


_recorded = ["sm_80"]
_overridden: list[tuple[str, str, Tile]] = []


@contextlib.contextmanager
def recording(family: str) -> Iterator[None]:
    """Launch on meta tensors as on this family's cards."""
    _recorded.append(family)
    try:
        yield
    finally:
        _recorded.pop()


def each_family() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every family and its cards; launches on meta tensors in the loop's body are for it."""
    for family, cards in FAMILIES.items():
        with recording(family):
            yield family, cards


def card_family(x: torch.Tensor) -> str:
    """Whose tiles serve this tensor's device."""
    if x.device.type == "meta":
        return _recorded[-1]
    if x.device.type == "cpu":
        return INTERPRETER
    return device_family(x.device.index)


@contextlib.contextmanager
def overriding(kernel: str, key: str, tile: Tile) -> Iterator[None]:
    """Take `tile` where the table's entry would be taken, to measure it."""
    _overridden.append((kernel, key, tile))
    try:
        yield
    finally:
        _overridden.pop()


def entry(family: str, kernel: str, keys: tuple[str, ...]) -> tuple[str, Tile]:
    """The first of `keys`, or else "*", that the family's table has for a kernel, and its tile."""
    choices = table(family)[kernel]
    key = next(key for key in (*keys, "*") if key in choices)
    return key, choices[key]


def choose(kernel: str, x: torch.Tensor, *keys: str) -> Tile:
    """The tile of a kernel for x's device, as a dict of the caller's own.

    Args:
        kernel: as the table names it, "attention_fwd".
        keys: what sets the call apart, the most particular first.
    """
    key, tile = entry(card_family(x), kernel, keys)
    for at in _overridden:
        if at[:2] == (kernel, key):
            tile = at[2]
    return dict(tile)


def bits(x: torch.Tensor) -> int:
    return x.dtype.itemsize * 8


def head_limit(head_dim: int) -> int:
    """The head_dim up to which an entry goes: 64, 128 or 256."""
    return next((limit for limit in (64, 128) if head_dim <= limit), 256)
