"""Attention's two passes hold little more than what goes in and what comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medgpt_kernels import native, registry

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory_attention.py"


def measured(*options: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "MEDGPT_KERNELS_STRICT": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def needs_linux_and_native_code():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs")
    try:
        native.cpu()
    except registry.Unsupported as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("window", [128, 0])
def test_both_passes_hold_at_most_1_25_times_the_least(window):
    result = measured("--tokens", "2048" if window == 0 else "4096", "--window", str(window))
    assert 0.95 < result["ratio"] <= 1.25, result


def test_the_measurement_sees_what_eager_holds():
    """Negative control: eager keeps scores of T x T."""
    assert measured("--tokens", "512", "--contender", "reference")["ratio"] > 2
