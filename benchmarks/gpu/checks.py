"""The parts that say whether results can be believed: build, tests, sanitizer, the card's roofs."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.timing import Place
from medgpt_kernels import native, registry, roofline, selftest

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("triton", "cuda")
LARGE_COPY, LARGE_GEMM = 2 << 30, 8192


def _run(command: list[str], **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the path or where the toolkit lies."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def build(place: Place) -> Iterator[dict]:
    """The extension in place, for this card; in a dry run the host library stands there already."""
    if place.dry:
        native.cuda(0)
        yield {"name": "build", "text": "host library", "ok": True}
        return
    nvcc = _tool("nvcc")
    start = time.perf_counter()
    required = {"MEDGPT_REQUIRE_NATIVE": "1"} if nvcc else {}
    status, text = _run([sys.executable, "setup.py", "build_ext", "--inplace"], **required)
    code = (
        "from medgpt_kernels import native; print(native.build_info())\n"
        f"{'native.cuda(0)' if nvcc else ''}"
    )
    loaded, found = _run([sys.executable, "-c", code])
    failed = text[-2000:] if status else found[-2000:] if loaded else ""
    yield {
        "name": "build",
        "seconds": round(time.perf_counter() - start, 1),
        "nvcc": nvcc or "not found: no CUDA C++ kernels",
        "text": found.strip().splitlines()[0] if found else "",
        "failed": failed,
    }


def roofs(place: Place) -> Iterator[dict]:
    """Copy and products, the better of the usual sizes and of large ones."""
    found = roofline.measure(str(place.device)) if not place.dry else roofline.Roofs(0.0, {})
    rates = {str(dtype)[6:]: rate for dtype, rate in found.gemm_gflops.items()}
    copy = found.copy_gbs
    if not place.dry:
        copy = max(copy, _large_copy_gbs())
        rates["bfloat16"] = max(rates["bfloat16"], _large_gemm_gflops())
    text = f"copy {copy:.0f} GB/s, bf16 {rates.get('bfloat16', 0) / 1e3:.0f} TFLOP/s"
    yield {
        "name": "roofs",
        "copy_gbs": None if place.dry else copy,
        "gemm_gflops": rates,
        "text": "not measured in a dry run" if place.dry else text,
    }


def _best(function) -> float:
    function()
    return min(roofline.time_call(function, "cuda") for _ in range(10))


def _large_copy_gbs() -> float:
    size = min(LARGE_COPY, torch.cuda.mem_get_info()[0] // 4)
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source)) / 1e9


def _large_gemm_gflops() -> float:
    shape = (LARGE_GEMM, LARGE_GEMM)
    a, b = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * LARGE_GEMM**3 / _best(lambda: torch.mm(a, b, out=out)) / 1e9


def tests(place: Place) -> Iterator[dict]:
    """The marker gpu: forward and backward of all ops, dtypes and backends; wrong ones refused."""
    # those files alone: others need packages of the model and its data
    files = [str(p) for p in ROOT.glob("tests/test_*.py") if "pytest.mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files]
    environment = {}
    if place.dry:
        bounded = "nothing or mxfp4 or (rotary and not attention) or decode or bias-cuda"
        command += ["-p", "cuda_host.plugin", "-k", bounded]
        environment = {"MEDGPT_DRY_RUN": "1"}
    status, text = _run(command, **environment)
    closing = text.strip().splitlines()[-1] if text.strip() else ""
    words = re.findall(r"(\d+) (passed|failed|skipped|error)", closing)
    counts = {word: int(n) for n, word in words}
    failing = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    failed = ""
    if status or not counts.get("passed"):
        failed = f"exit status {status}: {', '.join(failing[:20]) or text[-1500:]}"
    yield {"name": "tests", "counts": counts, "text": closing, "failed": failed}


def small_cases(device: str, backend: str, ops=tuple(selftest.OPS)) -> None:
    """Every op once, forward and backward, on small inputs, and nothing but this backend."""
    for op in ops:
        for dtype in (torch.bfloat16, torch.float32):
            try:
                registry.operators[MAIN_OPERATOR.get(op, f"{op}_fwd")].kernel(backend)
            except registry.Unsupported:
                continue
            with registry.backend(backend):
                selftest.OPS[op](device, dtype, dtype)


MAIN_OPERATOR = {"decode_attention": "decode_attention", "mxfp4": "mxfp4_quantize"}


def sanitizer(place: Place) -> Iterator[dict]:
    """compute-sanitizer over the small cases; without torch's caching, which hides overruns."""
    tool = _tool("compute-sanitizer")
    for check in ("memcheck", "racecheck"):
        for backend in BACKENDS:
            name = f"{check} {backend}"
            if place.dry:
                small_cases("cpu", backend, ("rotary",))
                yield {"name": name, "text": "not in a dry run"}
                continue
            if tool is None:
                yield {"name": name, "text": "compute-sanitizer not found", "skipped": True}
                continue
            code = f"from gpu.checks import small_cases; small_cases('cuda', '{backend}')"
            command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code]
            status, text = _run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            lines = re.findall(r".*(?:ERROR|RACECHECK) SUMMARY.*", text)
            closing = lines[-1].strip("= ") if lines else text[-300:]
            yield {"name": name, "text": closing, "failed": text[-2000:] if status else ""}
