"""Peak memory of attention on the CPU: python benchmarks/memory_attention.py [--window 128]

gpt-oss's 64 / 8 heads, head_dim 64, forward and backward. Prints one JSON line. The least is the
inputs, the outputs and the gradients; `ratio` is all of them plus what the resident set grows by
beyond outputs and gradients, over the least; the bar for ours is 1.25. Linux only.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import peers_attention as peers  # noqa: E402
from memory_patch_embed import peak_growth  # noqa: E402

from medgpt_kernels import attention, backend  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM = 64, 8, 64
PEERS = ("lse", "lse_chunk")  # of a full layer, of one with a window


def measure(tokens: int, window: int, dtype: torch.dtype, contender: str) -> dict:
    shapes = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    leaves = {n: torch.randn(tokens, h, HEAD_DIM).to(dtype) for n, h in shapes.items()}
    leaves["sinks"] = torch.randn(HEADS)
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    d_out = torch.randn(tokens, HEADS, HEAD_DIM).to(dtype)

    window_size = (window - 1, 0) if window else (-1, -1)
    if contender == "lse_chunk":
        call = partial(peers.lse_chunk, mask=peers.band_mask(tokens // window, window, dtype))
    else:
        call = peers.lse if contender == "lse" else partial(attention, window_size=window_size)

    def run(rows: int):
        inputs = {n: t if n == "sinks" else t[:rows] for n, t in leaves.items()}
        out = call(**inputs)
        return out, torch.autograd.grad(out, list(inputs.values()), d_out[:rows])

    with backend(contender) if contender not in PEERS else nullcontext():
        run(8 if contender != "lse_chunk" else tokens)  # thread pools, lazy imports
        growth = peak_growth(lambda: run(tokens))
    given = sum(t.nbytes for t in leaves.values()) + d_out.nbytes
    made = sum(t.nbytes for t in leaves.values()) + d_out.nbytes + 4 * HEADS * tokens  # out, lse
    return {
        "contender": contender,
        "dtype": str(dtype).split(".")[-1],
        "tokens": tokens,
        "window": window,
        "threads": torch.get_num_threads(),
        "least_mb": round((given + made) / 2**20, 1),
        "peak_mb": round((given + growth) / 2**20, 1),
        "ratio": round((given + growth) / (given + made), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=128, help="0: none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--contender", choices=("cpu", "reference", *PEERS), default="cpu")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(json.dumps(measure(options.tokens, options.window, dtype, options.contender)))


if __name__ == "__main__":
    main()
