"""Peak memory of MXFP4 experts on the CPU: python benchmarks/memory_experts.py [--tokens 512]

gpt-oss's 32 experts and top-4, forward and backward to x. Prints one JSON line: what the resident
set grows by, beside the packed weights, the rows that are kept or passed on in fp32 (T K rows of
5 I + 3 H at most), and what the weights would take in fp32. Linux only.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from bench_experts import EXPERTS, NAMES, TOPK, packed_weights  # noqa: E402
from memory_patch_embed import peak_growth  # noqa: E402

import medgpt_kernels as mk  # noqa: E402


def measure(tokens: int, hidden: int, contender: str) -> dict:
    weights = [packed_weights(EXPERTS, hidden, torch.device("cpu"))[n] for n in NAMES]
    x = torch.randn(tokens, hidden, requires_grad=True)
    d_y = torch.randn(tokens, hidden)
    ids = torch.rand(tokens, EXPERTS).argsort(1)[:, :TOPK]
    topk_weights = torch.rand(tokens, TOPK)

    def run(rows: int):
        data = mk.routing_from_topk(ids[:rows], topk_weights[:rows], EXPERTS)
        y = mk.experts(x[:rows], data, *weights)
        return torch.autograd.grad(y, x, d_y[:rows])

    with mk.backend(contender):
        run(2)  # thread pools, lazy imports
        growth = peak_growth(lambda: run(tokens))
    mega = 2**20
    return {
        "contender": contender,
        "tokens": tokens,
        "hidden": hidden,
        "growth_mb": round(growth / mega, 1),
        "packed_mb": round(sum(t.nbytes for w in weights[::2] for t in w) / mega, 1),
        "rows_mb": round(tokens * TOPK * 8 * hidden * 4 / mega, 1),
        "dense_mb": round(EXPERTS * 3 * hidden * hidden * 4 / mega, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--contender", choices=("cpu", "reference"), default="cpu")
    options = parser.parse_args()
    print(json.dumps(measure(options.tokens, options.hidden, options.contender)))


if __name__ == "__main__":
    main()
