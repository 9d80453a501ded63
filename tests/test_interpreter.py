"""Triton's interpreter: that it computes as hardware does, and every op's tests under it.

Whether kernels are interpreted is decided when they are decorated, so TRITON_INTERPRET=1 belongs to
a process: the tests here that need it run in one of their own, as do the ops' tests.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from medgpt_kernels import testing

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(p.parent.name for p in (ROOT / "medgpt_kernels").glob("*/triton.py"))
FILES = ["test_interpreter.py", *(f"test_{op}.py" for op in OPS)]
SHARE = 4  # of an op's tests, one in so many runs by default, all of them under `slow`
EVERY_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)

pytest.importorskip("triton")
inside = pytest.mark.skipif(not testing.interpreting(), reason="runs under TRITON_INTERPRET=1")
outside = pytest.mark.skipif(testing.interpreting(), reason="starts the interpreter itself")


def interpret(*command: str, share: int = 1) -> subprocess.CompletedProcess:
    """Run Python with Triton interpreted; a backend that cannot serve a call is an error there."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MEDGPT_KERNELS_")}
    return subprocess.run(
        [sys.executable, *command],
        env=inherited
        | {
            "TRITON_INTERPRET": "1",
            "MEDGPT_KERNELS_STRICT": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MEDGPT_TEST_SHARE": str(share),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def interpreted(request):
    """The runs of all selected files, started at once, one thread each on every core."""
    chosen = [i.callspec.params for i in request.session.items if "interpreted" in i.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (file, share): pool.submit(
                interpret, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}",
                "-k", "triton", share=share,
            )
            for file, share in ((params["file"], params["share"]) for params in chosen)
        }  # fmt: skip


@outside
@pytest.mark.parametrize(
    ("file", "share"),
    [(FILES[0], 1)]
    + [(file, SHARE) for file in FILES[1:]]
    + [pytest.param(file, 1, marks=pytest.mark.slow) for file in FILES[1:]],
)
def test_under_the_interpreter(file, share, interpreted):
    done = interpreted[file, share].result()
    closing = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", closing)}
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert counts.get("passed", 0) >= (4 if file == FILES[0] else 12 // share), closing
    assert not counts.keys() & {"failed", "error", "errors", "skipped", "xfailed"}, done.stdout


def kernels():
    """A rounding and a product, decorated under whatever the process is."""
    import triton
    import triton.language as tl

    @triton.jit
    def convert(Out, In, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(In + at, mask=at < n)
        tl.store(Out + at, value.to(Out.dtype.element_ty), mask=at < n)

    @triton.jit
    def product(Out, A, B, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(Out + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision="ieee"))

    return convert, product


def round_to_bf16(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    kernels()[0][(-(-x.numel() // 8192),)](out, x, x.numel(), BLOCK=8192)
    return out


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(16, 16)
    kernels()[1][(1,)](out, a, b, BLOCK=16)
    return out


@inside
def test_triton_rounds_to_bf16_as_torch():
    """Ties, subnormals, infinities, NaN: every bf16 value, and half a place beside each."""
    testing.patch_interpreter_bf16()
    bits = EVERY_BF16.float().view(torch.int32)
    x = torch.cat([bits + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001)]).view(torch.float32)
    found, expected = round_to_bf16(x), x.to(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(found[keep].view(torch.int16), expected[keep].view(torch.int16))


@inside
def test_triton_widens_bf16_exactly():
    testing.patch_interpreter_bf16()
    out = torch.empty(EVERY_BF16.shape)
    kernels()[0][(8,)](out, EVERY_BF16, EVERY_BF16.numel(), BLOCK=8192)
    keep = ~EVERY_BF16.isnan()
    assert torch.equal(out[keep], EVERY_BF16.float()[keep])
    assert out[~keep].isnan().all()


@inside
def test_triton_multiplies_bf16():
    testing.patch_interpreter_bf16()
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    truth = a.double() @ b.double()
    testing.assert_close(multiply(a, b), a.float() @ b.float(), truth)


@inside
def test_triton_patch_is_applied_once():
    from triton.runtime import interpreter

    testing.patch_interpreter_bf16()
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    testing.patch_interpreter_bf16()
    assert interpreter._convert_float is convert
    assert interpreter.InterpreterBuilder.create_dot is dot


@outside
def test_without_the_patch_the_interpreter_is_wrong():
    """Once this fails, Triton rounds and multiplies as hardware does and the patch can go."""
    code = (
        "import sys, torch; sys.path.insert(0, 'tests'); import test_interpreter as t\n"
        "x = torch.full((1,), 1 + 3 * 2**-9)\n"
        "assert t.round_to_bf16(x).item() == 1 != x.bfloat16().item(), 'rounds right'\n"
        "one = torch.ones(16, 16, dtype=torch.bfloat16)\n"
        "assert t.multiply(one, one)[0, 0] != 16, 'multiplies right'\n"
    )
    done = interpret("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
