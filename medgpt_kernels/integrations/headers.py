"""What the safetensors files of a checkpoint say they hold, read without their tensors."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from medgpt_kernels.integrations import refuse

INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """Where a tensor lies, its dtype in safetensors' words ("BF16", "U8") and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(directory: str | os.PathLike, op: str) -> dict[str, Stored]:
    """Every tensor of the files that from_pretrained reads, all of them inside the directory.

    Raises:
        ValueError: "op: ...", on pickles, an index that leads out of the directory or to files
            that are not there, files cut short, and tensors that are there twice.
    """
    directory, found = Path(directory), {}
    for file in _files(directory, op):
        try:
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                held = {
                    name: Stored(file, part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            refuse(f"a whole safetensors file {file}", error, op)
        if twice := found.keys() & held.keys():
            refuse("each tensor in one file", f"{min(twice)} twice", op)
        found |= held
    return found


def _files(directory: Path, op: str) -> list[Path]:
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / INDEX
    if not index.is_file():
        if pickles := sorted(p.name for p in directory.glob("*.bin")):
            refuse(
                "safetensors, which cannot run code when they are read",
                f"{pickles[0]} in {directory}: save that model again with safetensors",
                op,
            )
        refuse("model.safetensors or its index", f"neither in {directory}", op)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"a weight_map in {index}", repr(error), op)
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            refuse("names of .safetensors files beside the index", repr(name), op)
        if not (directory / name).is_file():
            refuse(f"{name} in {directory}", "none", op)
    return [directory / name for name in names]
