"""The host runtime that executes the CUDA kernels: what it must catch, and the ops' tests on it.

Which library serves is decided for a process, so the ops' tests run in one of their own.
"""

import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_host
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(p.parent.name for p in (ROOT / "medgpt_kernels").glob("*/cuda.py"))
SEEDS = [0, 1, 2]
# Experts serve without a gradient only. The first order of threads runs everything.
SELECTED = {"experts": ("cuda and decoding", "cuda and decoding_of_uneven")}
SELECTED |= {"routing": ("cuda", "cuda and (few or tiles)"), "rotary": ("cuda", "cuda")}
SELECTED |= {"decode_attention": ("cuda", "cuda and (paged or fp8)")}
LEAST_LAUNCHES = {"experts": (100, 16), "rotary": (20, 20), "routing": (50, 20)}
LEAST_LAUNCHES |= {"decode_attention": (100, 3)}

seeds = pytest.mark.parametrize("seed", SEEDS)


@pytest.fixture(scope="session")
def planted():
    """Run a planted kernel by name on [n] floats: what it wrote, and the runtime's complaint."""
    library = cuda_host.build([cuda_host.HERE / "planted.cu"], "planted")
    runtime = cuda_host.Runtime(library)
    launch = runtime.functions.planted
    launch.restype = ctypes.c_char_p

    def run(name: str, seed: int, n: int = 128):
        runtime.seed(seed)
        given, out = torch.arange(1.0, n + 1), torch.full((n,), -1.0)
        addresses = [ctypes.c_void_p(runtime.pointer(t)) for t in (out, given)]
        reason = launch(name.encode(), *addresses, n).decode()
        runtime.forget()
        return out, reason

    return run


def reverse(n):
    return torch.cat([chunk.flip(0) for chunk in torch.arange(1.0, n + 1).split(64)])


x = torch.arange(1.0, 129)
SOUND = {
    "reverse": reverse(128),
    "twice": (x[:64] + x[64:]).flip(0),
    "barrier": x[:64],
    "unwritten": x[:64].flip(0),
    "warp sum": torch.stack([x[:32].sum(), x[32:64].sum()]),
    "shuffle": x[:64].view(32, 2).flip(1).flatten(),
    "lane": torch.where(torch.arange(64) % 32 < 16, x[3] + torch.arange(64) // 32 * 32, x[:64]),
    "dynamic": x[:64].roll(-1),
    "vector": x[:124],
    "greedy": x[:64],
    "count": torch.tensor([64.0]),
}
FAULTS = {
    "reverse without its barrier": r"(race on shared memory: .*|uninitialised read of) byte \d+ of",
    "reverse that writes past the end": "out of bounds: write of 4 bytes at 512 of a tensor of 512",
    "reverse that reads past the end": "out of bounds: read of 4 bytes at 512 of a tensor of 512",
    "twice without the barrier between": r"race on shared memory: (reads|writes) byte \d+ of tile",
    "barrier after some have returned": "divergent barrier: .*16 threads have returned",
    "barrier in both branches": r"divergent barrier: 16 threads wait at .*, 48 threads wait at",
    "barrier in one branch": "divergent barrier: .*48 threads have returned",
    "unwritten element": r"uninitialised read of byte 68 of tile",
    "warp sum without barriers": r"race on shared memory: .* of part|uninitialised read",
    "shuffle of half a warp": "deadlock: lanes wait for others of their warp",
    "lane outside the mask": "shuffle from lane 20, which takes no part",
    "dynamic past its size": "out of bounds: 4 bytes at 256 of tile of 256 bytes",
    "vector that is not aligned": "misaligned read of 16 bytes",
    "greedy beyond a block's memory": "shared memory of 52",
    "count without atomics": "race on shared memory: .* of sum",
}  # fmt: skip


@seeds
@pytest.mark.parametrize("name", SOUND)
def test_sound_kernels_pass(planted, name, seed):
    out, reason = planted(name, seed)
    assert reason == ""
    assert torch.equal(out[: len(SOUND[name])], SOUND[name])


@seeds
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(planted, name, seed):
    assert re.search(FAULTS[name], planted(name, seed)[1])


@seeds
@pytest.mark.parametrize("n", [1, 63, 65])
def test_out_of_bounds_depends_on_the_tensor_not_the_grid(planted, n, seed):
    out, reason = planted("reverse", seed, n)
    assert reason == ""
    assert torch.equal(out, reverse(n))
    assert "out of bounds: write" in planted("reverse that writes past the end", seed, n)[1]


def test_memory_that_was_not_given_is_refused():
    library = cuda_host.build([cuda_host.HERE / "planted.cu"], "planted")
    runtime = cuda_host.Runtime(library)
    runtime.forget()
    whole = torch.zeros(64)
    runtime.pointer(whole[:32])
    assert runtime.pointer(None) == 0
    launch = runtime.functions.planted
    launch.restype = ctypes.c_char_p
    address = ctypes.c_void_p(whole.data_ptr())
    reason = launch(b"barrier", address, address, 64).decode()
    assert re.search(r"out of bounds: .* of a tensor of 128 bytes", reason)
    runtime.forget()


# The ops' own tests, with the launchers of <op>/cuda.py


def run_on_host(
    op: str, seed: int, *options: str, library: str = ""
) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MEDGPT_KERNELS_")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p",
            "cuda_host.plugin", f"tests/test_{op}.py", "-k", SELECTED[op][seed > 0], *options,
        ],
        env=inherited
        | {
            "MEDGPT_KERNELS_STRICT": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
            "CUDA_HOST_SEED": str(seed),
            "CUDA_HOST_LIBRARY": library,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def on_host(request):
    """The runs of all selected files, started at once."""
    cuda_host.kernels()
    chosen = [i.callspec.params for i in request.session.items if "on_host" in i.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(p["op"], p["seed"]): pool.submit(run_on_host, p["op"], p["seed"]) for p in chosen}


@seeds
@pytest.mark.parametrize("op", OPS)
def test_ops_on_the_host(op, seed, on_host):
    done = on_host[op, seed].result()
    closing = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", closing)}
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert counts.get("passed", 0) >= 2, closing
    assert not counts.keys() & {"failed", "error", "errors", "skipped", "xfailed"}, done.stdout
    launches = re.search(rf"launches: .*'{op}': (\d+)", done.stdout)
    assert launches, done.stdout[-2000:]
    assert int(launches.group(1)) >= LEAST_LAUNCHES[op][seed > 0]


BARRIER = re.compile(r"^ *__sync(threads|warp)\(\);\n", re.M)
# Orders what other blocks read, which blocks in turn cannot tell: comes_last's before its count.
BETWEEN_BLOCKS = {("routing", 6)}
BARRIERS = [
    pytest.param(path, n, id=f"{path.stem}-{n}")
    for path in cuda_host.SOURCES
    for n in range(len(BARRIER.findall(path.read_text())))
    if (path.stem, n) not in BETWEEN_BLOCKS
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "n"), BARRIERS)
def test_every_barrier_is_missed(path, n, tmp_path):
    """The kernels with one barrier left out fail their op's tests."""
    text = path.read_text()
    match = list(BARRIER.finditer(text))[n]
    mutant = tmp_path / path.name
    mutant.write_text(text[: match.start()] + ";\n" + text[match.end() :])
    others = [p for p in cuda_host.SOURCES if p != path]
    library = cuda_host.build([*others, mutant], "mutant")
    done = run_on_host(path.stem, 1, "-x", library=str(library))
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout
