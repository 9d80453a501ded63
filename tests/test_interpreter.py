"""Every Triton kernel's semantics, under Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "medgpt_kernels"
OPS = sorted(p.parent.name for p in PACKAGE.glob("*/triton.py"))
CHECK_ROUNDING = """
import numpy as np, torch, triton, triton.language as tl
from medgpt_kernels import testing

@triton.jit
def cast(In, Out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Out + at, tl.load(In + at).to(tl.bfloat16))

def wrong():
    x = torch.randn(4096)
    out = torch.empty(4096, dtype=torch.bfloat16)
    cast[(1,)](x, out, 4096)
    return int((out != x.to(torch.bfloat16)).sum())

before = wrong()
testing.patch_interpreter_bf16()
print(before, wrong())
"""

pytest.importorskip("triton")


def interpret(*arguments: str) -> subprocess.CompletedProcess:
    """A fresh process: interpretation is decided when a kernel is decorated."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("op", OPS)
def test_op_in_the_interpreter(op):
    """The op's own tests, those of its triton backend."""
    done = interpret(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{op}.py", "-k", "triton"
    )
    closing = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", closing)
    assert passed, closing
    assert int(passed.group(1)) >= 20, closing
    assert "skipped" not in closing, done.stdout[-2000:]


def test_the_bf16_patch_rounds_as_hardware_does():
    """Unpatched, the interpreter truncates: about half of all values differ from nearest even."""
    done = interpret("-c", CHECK_ROUNDING)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 1000
    assert after == 0


def test_without_the_interpreter_triton_says_why_it_cannot_serve_the_cpu():
    code = """
import torch, medgpt_kernels as mk
with mk.backend("triton"):
    mk.patch_embed(mk.pack_images([torch.zeros(16, 16, 3, dtype=torch.uint8)]),
                   torch.zeros(8, 768), None, patch_size=16, weight_layout="linear",
                   mean=[0.5] * 3, std=[0.5] * 3)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"MEDGPT_KERNELS_STRICT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "BackendError: patch_embed_fwd: the triton backend cannot serve" in done.stderr
