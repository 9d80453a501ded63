"""Packed experts are never expanded: both passes hold rows, and no dense weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medgpt_kernels import native, registry

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory_experts.py"


def test_both_passes_hold_rows_and_no_dense_weights():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs")
    try:
        native.cpu()
    except registry.Unsupported as reason:
        pytest.skip(str(reason))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tokens", "64", "--hidden", "1536"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    tiles = 8  # MB: two threads' panels of rows and of 256 x 256 weights
    assert result["growth_mb"] < result["rows_mb"] + tiles, result
    assert result["growth_mb"] < result["dense_mb"] / 10, result
