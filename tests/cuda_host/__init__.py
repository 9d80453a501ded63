"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against a checking cuda_runtime.h.

docs/cuda.md says what this catches and what it cannot.
"""

import collections
import ctypes
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")


def build(sources: list[Path], name: str) -> Path:
    """One shared object of .cu sources and the runtime; what has not changed is kept."""
    headers = sorted([*HERE.glob("*.h"), *(ROOT / "csrc").rglob("*.h")])
    common = hashlib.sha256(repr(FLAGS).encode() + b"".join(p.read_bytes() for p in headers))
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)

    def made(stem: str, suffix: str, content: bytes, *command: str) -> Path:
        digest = common.copy()
        digest.update(content)
        path = folder / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}.part")
            _run("g++", *FLAGS, *command, "-o", str(part))
            part.replace(path)
        return path

    def compile_one(source: Path) -> Path:
        include = ("-I", str(HERE), "-I", str(ROOT / "csrc" / "cuda"))
        command = ("-x", "c++", *include, "-c", str(source))
        return made(source.stem, ".o", source.read_bytes(), *command)

    with ThreadPoolExecutor(2) as pool:
        objects = [str(p) for p in pool.map(compile_one, [HERE / "runtime.cpp", *sources])]
    return made(name, ".so", repr(objects).encode(), "-shared", *objects)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")


SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def kernels() -> Path:
    """The library that stands in for _cuda.so, or the one that CUDA_HOST_LIBRARY names."""
    given = os.environ.get("CUDA_HOST_LIBRARY")
    return Path(given) if given else build(SOURCES, "kernels")


class Runtime:
    """The order of threads, and what memory kernels may touch, in one host library."""

    def __init__(self, library: Path):
        self.functions = ctypes.CDLL(str(library))
        self.functions.cuda_host_register.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def seed(self, seed: int) -> None:
        """Draw blocks and threads in another order from now on."""
        self.functions.cuda_host_seed(ctypes.c_uint(seed))

    def pointer(self, tensor: torch.Tensor | None) -> int:
        """native.pointer, and from now on kernels may touch this tensor."""
        if tensor is None:
            return 0
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        count = last + 1 if tensor.numel() else 0
        self.functions.cuda_host_register(tensor.data_ptr(), count * tensor.itemsize)
        return tensor.data_ptr()

    def forget(self) -> None:
        """No memory may be touched any more."""
        self.functions.cuda_host_forget()


class Library:
    """A table of launchers; each call ends what its pointers allowed."""

    def __init__(self, table, runtime: Runtime):
        self._table, self.runtime = table, runtime
        self.launches = collections.Counter()

    def __getattr__(self, name: str):
        launcher = getattr(self._table, name)

        def call(*args, **kwargs):
            self.launches[name] += 1
            try:
                return launcher(*args, **kwargs)
            finally:
                self.runtime.forget()

        return call


def install() -> Library:
    """Make the CUDA backend take CPU tensors in this process, by the library compiled by g++."""
    from medgpt_kernels import native, registry

    path = kernels()
    runtime = Runtime(path)
    library = Library(native._bindings().open_cuda(str(path)), runtime)
    candidates = registry.candidates
    native.cuda = lambda device=0: library
    native.place = lambda tensor: (0, 0)
    native.pointer = runtime.pointer
    registry.candidates = lambda device_type: (
        ("cpu", "cuda", "reference") if device_type == "cpu" else candidates(device_type)
    )
    return library
