"""The CPU path holds little more than what goes in and what comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medgpt_kernels import native, registry

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory_patch_embed.py"


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_holds_at_most_1_3_times_the_least(dtype):
    result = measured("--count", "8", "--dtype", dtype)
    assert result["patches"] == 9_693
    assert 0.9 < result["ratio"] <= 1.3, result


def test_the_measurement_sees_what_eager_holds():
    """Negative control: eager keeps float patches beside its tokens."""
    assert measured("--count", "8", "--contender", "packed_mm")["ratio"] > 1.8
