"""One part in a process of its own: python -m gpu.part NAME OUT.json [--dry-run].

What it finds is written at once, so that a part which is stopped keeps what it has. Exit status 1:
a kernel of ours gave a wrong result, could not run, or the part itself failed.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gpu import attention, checks, model, moe, tokens
from gpu.timing import Place, compare, reason
from medgpt_kernels import registry, testing
from medgpt_kernels.roofline import Roofs

Run = Callable[[Place], Iterator[dict]]  # yields its findings


def comparing(comparisons) -> Run:
    """The part that makes all of an op's comparisons."""

    def run(place: Place) -> Iterator[dict]:
        for comparison, names in comparisons(place):
            yield compare(comparison, place, names)

    return run


PARTS: dict[str, Run] = {
    "build": checks.build,
    "roofs": checks.roofs,
    "tests": checks.tests,
    "attention": comparing(attention.comparisons),
    "experts": comparing(moe.comparisons),
    "decode": comparing(attention.decode_comparisons),
    "train": model.train,
    "generate": model.generate,
    "routing": comparing(moe.routing_comparisons),
    "rotary": comparing(tokens.rotary_comparisons),
    "mxfp4": comparing(moe.mxfp4_comparisons),
    "patch_embed": comparing(tokens.patch_comparisons),
    "sanitizer": checks.sanitizer,
}


def stand_in_for_a_card() -> None:
    """The CPU as a card: Triton's interpreter, and the host runtime for CUDA kernels."""
    import cuda_host

    cuda_host.install()
    testing.patch_interpreter_bf16()
    candidates = registry.candidates
    registry.candidates = lambda kind: ("cuda", "triton", "reference") if kind == "cpu" else (
        candidates(kind)
    )  # fmt: skip


def ours_failed(finding: dict) -> list[str]:
    """Backends of ours that a comparison refused; a check says `failed` itself."""
    rows = finding.get("contenders", {})
    ours = {name: row for name, row in rows.items() if row["kind"] == "ours"}
    wrong = [f"{name}: {row['failed']}" for name, row in ours.items() if "failed" in row]
    return wrong + ([str(finding["failed"])] if finding.get("failed") else [])


def summary(finding: dict) -> str:
    """A line of progress."""
    rows = finding.get("contenders", {})
    cells = [f"{n} {r['median_ms']:.3f} ms" for n, r in rows.items() if "median_ms" in r]
    cells += [f"{n} ran" for n, r in rows.items() if "ran" in r]
    cells += [f"{n}: {r['failed']}" for n, r in rows.items() if "failed" in r]
    return f"{finding['name']}: " + ("; ".join(cells) or finding.get("text", ""))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--roofs", type=json.loads, help='{"copy_gbs": ..., "gemm_gflops": ...}')
    options = parser.parse_args(arguments)
    roofs = None
    if options.roofs:
        gemm = {getattr(torch, n): rate for n, rate in options.roofs["gemm_gflops"].items()}
        roofs = Roofs(options.roofs["copy_gbs"], gemm)
    if options.dry_run:
        stand_in_for_a_card()
    record = {"findings": [], "failures": [], "complete": False}
    start = time.perf_counter()
    try:
        for finding in PARTS[options.name](Place(options.dry_run, roofs)):
            record["findings"].append(finding)
            record["failures"] += [f"{finding['name']}: {x}" for x in ours_failed(finding)]
            options.out.write_text(json.dumps(record))
            print(f"  {time.perf_counter() - start:6.1f} s  {summary(finding)}", flush=True)
        record["complete"] = True
    except Exception as error:
        traceback.print_exc()
        record["failures"].append(reason(error))
    options.out.write_text(json.dumps(record))
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
