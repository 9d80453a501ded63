"""Peak memory and time of the loss on the CPU: python benchmarks/memory_loss.py [--tokens 8192]

gpt-oss's vocabulary, forward and backward to hidden states and head. Prints one JSON line: what the
resident set grows by, beside the whole logits and the floor (both gradients and one chunk of
logits), and the seconds. Linux only.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from memory_patch_embed import peak_growth  # noqa: E402

from medgpt.train import loss as ours  # noqa: E402

VOCABULARY = 201088


def measure(tokens: int, hidden: int, contender: str) -> dict:
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, requires_grad=True)
    weight = (torch.randn(VOCABULARY, hidden) * hidden**-0.5).requires_grad_()
    labels = torch.randint(VOCABULARY, (tokens,))

    def run(rows: int) -> None:
        if contender == "eager":
            loss = F.cross_entropy(F.linear(x[:rows], weight), labels[:rows])
        else:
            loss = ours.linear_cross_entropy(x[:rows], weight, labels[:rows])[0]
        torch.autograd.grad(loss, (x, weight))

    run(2)  # thread pools, lazy imports
    start = time.perf_counter()
    growth = peak_growth(lambda: run(tokens))
    mega = 2**20
    row = {
        "contender": contender,
        "tokens": tokens,
        "hidden": hidden,
        "seconds": round(time.perf_counter() - start, 2),
        "growth_mb": round(growth / mega, 1),
        "logits_mb": round(tokens * VOCABULARY * 4 / mega, 1),
        "floor_mb": round((x.nbytes + weight.nbytes + ours.LOGITS_BYTES) / mega, 1),
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--contender", choices=("chunked", "eager"), default="chunked")
    options = parser.parse_args()
    print(json.dumps(measure(options.tokens, options.hidden, options.contender)))


if __name__ == "__main__":
    main()
