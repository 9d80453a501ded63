"""Sharded safetensors, read and written a piece at a time, whatever the size of the model."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from medgpt_kernels.integrations.headers import INDEX, read_headers

PIECE = 64 << 20  # bytes that are held at once
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Planned(NamedTuple):
    """A tensor to be written: its pieces, one behind the other, are its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source:
    """The tensors of a safetensors directory; `headers` says which, `rows` reads some of one."""

    def __init__(self, directory: Path, op: str):
        self.headers = read_headers(directory, op)
        for name, stored in self.headers.items():
            if stored.dtype not in DTYPES:
                raise ValueError(f"{op}: expected {name} in {list(DTYPES)}, got {stored.dtype}")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """tensor[start:stop]; the file is closed again, or its pages would count as memory."""
        with safe_open(self.headers[name].file, "pt") as opened:
            return opened.get_slice(name)[start:stop]

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        shape = self.headers[name].shape
        if not shape:
            with safe_open(self.headers[name].file, "pt") as opened:
                yield opened.get_tensor(name).to(dtype)
            return
        row = math.prod(shape[1:]) * DTYPES[self.headers[name].dtype].itemsize
        step = max(1, PIECE // max(row, 1))
        for start in range(0, shape[0], step):
            yield self.rows(name, start, min(start + step, shape[0])).to(dtype)

    def planned(self, name: str, dtype: torch.dtype) -> Planned:
        """The tensor as it is, floats in `dtype`."""
        stored = self.headers[name]
        own = DTYPES[stored.dtype]
        dtype = dtype if own.is_floating_point else own
        return Planned(dtype, stored.shape, lambda: self.pieces(name, dtype))


def size_of(text: str | int) -> int:
    """Bytes of "4GB", "500MB" (powers of ten) or a number."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", str(text).strip().upper())
    if found is None or not int(found[1]):
        raise ValueError(f"max_shard_size: expected a size as 4GB, got {text!r}")
    return int(found[1]) * 1000 ** " KMGT".index(found[2] or " ")


def write_shards(
    directory: Path, tensors: dict[str, Planned], max_shard_size: str | int, progress: bool
) -> None:
    """model.safetensors, or model-00001-of-N.safetensors and their index."""
    shards = _split(tensors, size_of(max_shard_size))
    total, placed = sum(t.nbytes for t in tensors.values()), {}
    bar = _Bar(total, progress)
    for i, names in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_file(directory / file, {name: tensors[name] for name in names}, bar)
        placed |= dict.fromkeys(names, file)
    bar.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: dict[str, Planned], limit: int) -> list[list[str]]:
    """Names of each shard, layer after layer; one beyond the limit has a shard of its own."""
    shards, size = [], limit + 1
    for name in sorted(tensors, key=_by_layer):
        if size + tensors[name].nbytes > limit:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    return shards


def _by_layer(name: str) -> list:
    return [part.zfill(6) if part.isdigit() else part for part in name.split(".")]


def _write_file(file: Path, tensors: dict[str, Planned], bar) -> None:
    # the widest first, so that each lies at a multiple of its own width
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            written = 0
            for piece in tensors[name].pieces():
                assert piece.dtype == tensors[name].dtype, name
                data = piece.contiguous().reshape(-1).view(torch.uint8).numpy()
                written += out.write(data)
                bar.update(len(data))
            assert written == tensors[name].nbytes, name


class _Bar:
    """tqdm's bar, where there is someone to see it."""

    def __init__(self, total: int, shown: bool):
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, unit="B", unit_scale=True, desc="weights", disable=None if shown else True
        )
        self.update, self.close = self.bar.update, self.bar.close
