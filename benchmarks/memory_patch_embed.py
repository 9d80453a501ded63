"""Peak memory of patch_embed on the CPU: python benchmarks/memory_patch_embed.py [--dtype bfloat16]

Prints one JSON line. The least is what any implementation must hold at once: tokens, the packed
pixels and one tile's normalised rows (with --backward also the gradients). `ratio` is the growth of
the resident set at its highest over that least; the bar for ours is 1.3. Linux only.
"""

import argparse
import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import material  # noqa: E402
import peers_patch_embed as peers  # noqa: E402

from medgpt_kernels import backend, pack_images, patch_embed  # noqa: E402

PATCH, WIDTH, CELLS = 16, 1152, 16
DEPTH = 3 * PATCH * PATCH
TILE_ROWS = 96  # patches that one thread normalises at a time
HALF = (0.5, 0.5, 0.5)


def status_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (resident at most) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_growth(function) -> int:
    """How far the resident set rises above its present size while `function` runs, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status_bytes("VmRSS")
    function()
    return status_bytes("VmHWM") - before


def make_call(images, weight, bias, table, contender):
    """The whole way from uint8 images to tokens."""
    if contender == "packed_mm":
        flat = table.view(CELLS * CELLS, WIDTH)
        return peers.packed_mm(images, weight, bias, flat, PATCH, HALF, HALF)
    return patch_embed(
        pack_images(images),
        weight,
        bias,
        patch_size=PATCH,
        weight_layout="linear",
        mean=HALF,
        std=HALF,
        position_embedding=table,
    ).tokens


def measure(count: int, dtype: torch.dtype, backward: bool, contender: str) -> dict:
    batch = material.mixed_batch(count, PATCH)
    images = [torch.from_numpy(picture.copy()) for picture in batch]
    shapes = {"weight": (WIDTH, DEPTH), "bias": (WIDTH,), "table": (CELLS, CELLS, WIDTH)}
    leaves = {
        n: (torch.randn(s) * 0.02).to(dtype).requires_grad_(backward) for n, s in shapes.items()
    }
    patches = sum(i.shape[0] * i.shape[1] for i in images) // PATCH**2
    d_out = torch.randn(patches, WIDTH).to(dtype) if backward else None

    def run(images, d_out):
        tokens = make_call(images, **leaves, contender=contender)
        if d_out is not None:
            tokens.backward(d_out)

    with backend("reference" if contender == "packed_mm" else contender):
        tiny = images[0][:PATCH, :PATCH]
        run([tiny], None if d_out is None else d_out[:1])  # thread pools, lazy imports
        for leaf in leaves.values():
            leaf.grad = None
        growth = peak_growth(lambda: run(images, d_out))
    least = patches * (WIDTH * dtype.itemsize + DEPTH) + TILE_ROWS * DEPTH * 4
    if backward:
        least += sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    return {
        "contender": contender,
        "dtype": str(dtype).split(".")[-1],
        "backward": backward,
        "patches": patches,
        "threads": torch.get_num_threads(),
        "peak_growth_mb": round(growth / 2**20, 1),
        "least_mb": round(least / 2**20, 1),
        "ratio": round(growth / least, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=16, help="images of the mixed batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--contender", choices=("cpu", "reference", "packed_mm"), default="cpu")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(json.dumps(measure(options.count, dtype, options.backward, options.contender)))


if __name__ == "__main__":
    main()
