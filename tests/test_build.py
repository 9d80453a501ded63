"""Installing: again, not editable, without nvcc, without a compiler (each from nothing)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The report without an editable install's import hook, which would find its own modules instead.
REPORT = """
import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
sys.argv = ["medgpt_kernels"]
runpy.run_module("medgpt_kernels", run_name="__main__")
"""
TOOLS = ("c++", "g++", "gcc", "cc", "as", "ld", "ar", "ranlib", "nm", "strip", "uname", "sh")

pytestmark = pytest.mark.slow


@pytest.fixture
def sources(tmp_path):
    """A clean copy of the tracked files."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in done.stdout.splitlines():
        target = tmp_path / "sources" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return tmp_path / "sources"


def install(sources, target, **environment):
    """pip install . into a folder; returns seconds and what the package then says of itself."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    start = time.perf_counter()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(target), str(sources)], env=environment, check=True)
    seconds = time.perf_counter() - start
    report = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=target,
        capture_output=True,
        text=True,
        check=True,
    )
    return seconds, report.stdout


def test_from_nothing_and_again(sources, tmp_path):
    """Within 90 s, and a second install over the first build folder works."""
    seconds, report = install(sources, tmp_path / "first")
    assert "built: cpu:baseline" in report
    assert seconds < 90
    assert "built: cpu:baseline" in install(sources, tmp_path / "first")[1]


def test_without_nvcc(sources, tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (path / tool).symlink_to(found)
    # Without these CMake looks for nvcc beyond the PATH, in the system's own folders.
    environment = {
        "PATH": str(path),
        "CUDA_HOME": "",
        "CUDA_PATH": "",
        "CMAKE_ARGS": "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF -DMEDGPT_CUDA_ROOT=/nonexistent",
    }
    report = install(sources, tmp_path / "out", **environment)[1]
    assert "built: cpu:baseline" in report
    assert "no CUDA module: nvcc not found" in report


def test_cuda_switched_off(sources, tmp_path):
    assert "MEDGPT_CUDA=0" in install(sources, tmp_path / "out", MEDGPT_CUDA="0")[1]


def test_without_a_compiler(sources, tmp_path):
    report = install(sources, tmp_path / "out", CXX="/nonexistent/c++", CC="/nonexistent/cc")[1]
    assert "native code not built" in report
    assert "patch_embed_fwd      cpu   reference" in report


def test_native_code_can_be_required(sources, tmp_path):
    environment = {"CXX": "/nonexistent/c++", "MEDGPT_REQUIRE_NATIVE": "1"}
    with pytest.raises(subprocess.CalledProcessError):
        install(sources, tmp_path / "out", **environment)
