"""The GPU report: python benchmarks/gpu_report.py [PART ...], or make gpu-report.

On a machine with an NVIDIA card, torch, triton, transformers, nvcc and pytest, nothing to install:
builds, tests, measures every op and the whole model against every peer that imports, and writes
benchmarks/results/gpu-CARD.json and .md. Each part runs in a process of its own, is written at
once, and is skipped where the same source was measured on this card before. Exit status 1 where a
part failed, 2 where the arguments are wrong.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "tests")]

from gpu.page import page  # noqa: E402
from gpu.store import Store, environment, python  # noqa: E402

# name: after how many seconds it is stopped, in the order of their worth
PARTS = {
    "build": 300, "roofs": 60, "tests": 240, "attention": 240, "experts": 180, "decode": 120,
    "train": 240, "generate": 120, "routing": 90, "rotary": 60, "mxfp4": 60, "patch_embed": 90,
    "sanitizer": 300,
}  # fmt: skip
LEAST_SECONDS = 15  # with less left a part is not started


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    add("--again", action="store_true", help="measure what is known already as well")
    add("--time-limit", type=float, default=540.0, metavar="S", help="in all; default 540")
    add("--tune", action="store_true", help="first choose tiles for this card (tune.py)")
    add("--dry-run", action="store_true", help="all parts on the CPU, tiny, without any times")
    add("--out", type=Path, default=None, help="folder of results")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name}; expected of {', '.join(PARTS)}")
    dry_folder = ROOT / "build" / "gpu_report_dry_run"
    folder = dry_folder if options.dry_run else ROOT / "benchmarks" / "results"
    options.out = options.out or folder
    options.parts = options.parts or list(PARTS)
    return options


def run_part(name: str, seconds: float, dry: bool, roofs: dict | None) -> tuple[dict, float]:
    """A part's findings, with a failure where it died or was stopped, and how long it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = python("-m", "gpu.part", name, str(out))
        command += ["--dry-run"] if dry else []
        command += ["--roofs", json.dumps(roofs)] if roofs else []
        process = subprocess.Popen(command, cwd=ROOT, env=environment(dry), start_new_session=True)
        failure = ""
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: compilers and pytest too
            process.wait()
            status, failure = None, f"stopped after {seconds:.0f} s"
        empty = {"findings": [], "failures": [], "complete": False}
        found = json.loads(out.read_text()) if out.exists() else empty
    if status is not None and status != 0 and not found["failures"]:
        failure = f"exit status {status}"
    if failure:
        found |= {"complete": False, "failures": [*found["failures"], failure]}
    return found, time.monotonic() - start


class Report:
    """One run: which parts, until when."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.store = Store(options.out, options.dry_run)
        self.deadline = time.monotonic() + options.time_limit
        self.missing: dict[str, str] = {}
        self.failed: list[str] = []

    def run(self, name: str) -> None:
        """One part, unless it is known or there is no time left."""
        known = None if self.options.again else self.store.known(name)
        if known:
            print(f"{name}: known from {known['date']}, {known['seconds']:.0f} s", flush=True)
            return
        left = self.deadline - time.monotonic()
        if left < LEAST_SECONDS:
            self.missing[name] = "no time left; run the same command again"
            print(f"{name}: skipped, the time limit of {self.options.time_limit:.0f} s", flush=True)
            return
        print(f"{name}:", flush=True)
        limit = min(PARTS[name], left)
        found, seconds = run_part(name, limit, self.options.dry_run, self.store.roofs())
        self.store.put(name, found, seconds)
        if found["failures"]:
            self.failed.append(name)
        for failure in found["failures"]:
            print(f"  FAILED {name}: {failure}", flush=True)
        print(f"{name}: {seconds:.0f} s", flush=True)

    def finish(self) -> int:
        """Write the page; 1 where something failed."""
        path = self.store.path.with_suffix(".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(self.store.record, self.missing))
        print(f"wrote {self.store.path} and {path.name}")
        if self.missing:
            print(f"not run: {', '.join(self.missing)}")
        if self.failed:
            print(f"FAILED: {', '.join(self.failed)}")
        return int(bool(self.failed))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device; --dry-run goes through all parts on the CPU", file=sys.stderr)
            return 2
    failed = []
    if options.tune:
        command = python(str(ROOT / "benchmarks" / "tune.py"))
        command += ["--dry-run"] if options.dry_run else []
        if subprocess.run(command, cwd=ROOT, env=environment(options.dry_run)).returncode:
            failed.append("tune")
    report = Report(options)  # its clock starts here, and its source has the new tiles
    report.failed += failed
    # without times to disturb, two parts at once
    with ThreadPoolExecutor(2 if options.dry_run else 1) as pool:
        list(pool.map(report.run, options.parts))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
