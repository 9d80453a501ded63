"""The examples run, at a size for a test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "generate_20b_shape.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MEDGPT_KERNELS_STRICT": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_generates_and_reports(dtype):
    sizes = ("--layers", "2", "--tokens", "70", "--prompt-tokens", "150")
    done = run("--tiny", *sizes, "--dtype", dtype, "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\w+) +([\d.]+) ", done.stdout, re.M))
    ops = ("attention", "routing", "experts", "projections", "norms", "head", "rest")
    parts = [float(rows[op]) for op in ops]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(float(rows["all"]), abs=0.05)
    assert re.search(r"^tokens: [\d.]+ a second", done.stdout, re.M)
    # 289 tokens are cached: five pages, and four in a ring for a window of 128
    assert "289 tokens in pages for 320 a full layer, 256 a sliding one" in done.stdout
    assert "289 tokens" not in run("--tiny", "--layers", "2", "--tokens", "3").stdout


def test_help_and_bad_options():
    assert "--prompt-tokens" in run("--help").stdout
    done = run("--layers", "0")
    assert done.returncode == 2
    assert "--layers" in done.stderr
