"""The compiled modules: what this machine can run of them, and why not the rest."""

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import forward_ad

from medgpt_kernels import registry
from medgpt_kernels.registry import PassedOn, Unsupported

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


def build_info() -> str:
    """What the build made, in its own words."""
    path = Path(__file__).with_name("_build_info.txt")
    return path.read_text().strip() if path.exists() else "native code not built"


@functools.cache
def _bindings() -> ModuleType:
    try:
        return importlib.import_module("medgpt_kernels._c")
    except ImportError as error:
        raise Unsupported(f"{error}; {build_info()}") from None


@functools.cache
def cpu_library(isa: str):
    """The CPU kernels compiled for one instruction set: "baseline", "v3", "v4"."""
    path = Path(__file__).with_name(f"_cpu_{isa}.so")
    try:
        return _bindings().open_cpu(str(path))
    except RuntimeError as error:
        raise Unsupported(f"{error}; {build_info()}") from None


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this machine has and this build covers, best first."""
    built = {p.stem.removeprefix("_cpu_") for p in Path(__file__).parent.glob("_cpu_*.so")}
    isas = tuple(isa for isa in _bindings().supported_isas() if isa in built)
    if not isas:
        raise Unsupported(build_info())
    return isas


def cpu():
    """The best CPU library of this machine; MEDGPT_KERNELS_CPU_ISA picks another.

    Raises Unsupported when nothing was built.
    """
    wanted = os.environ.get("MEDGPT_KERNELS_CPU_ISA")
    isas = supported_isas()
    if wanted is None:
        return cpu_library(isas[0])
    if wanted not in isas:
        raise Unsupported(f"MEDGPT_KERNELS_CPU_ISA={wanted}: this machine has {', '.join(isas)}")
    return cpu_library(wanted)


class _LongWay:
    """Where there are no direct calls."""

    @staticmethod
    def routing_direct(*args):
        return None

    decode_attention_direct = linear_direct = routing_direct
    linear_int8_direct = decoder_layer_direct = routing_direct


@functools.cache
def direct():
    """The calls of a decoding step that pass by PyTorch's layers (csrc/bindings_direct.cpp).

    Each gives None to a call that it does not take: with gradients or a mode of PyTorch's on, to be
    converted, or wrong. They serve the best library only.
    """
    functorch = torch._C._functorch
    try:
        facts = {str(dtype)[6:]: dtype for dtype in (*DTYPE_CODES, torch.int32)}
        facts |= {
            "Tensor": torch.Tensor,
            "Parameter": torch.nn.Parameter,
            "modes": (
                torch.is_grad_enabled,
                torch._C._len_torch_dispatch_stack,
                torch._C._len_torch_function_stack,
                torch._C._is_tracing,
                functorch.peek_interpreter_stack,
            ),
            "autocast": torch.is_autocast_enabled,
            "forward_ad": forward_ad,
            "chosen": registry._chosen,
            "take": torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs,
        }
        path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        _bindings().open_direct(cpu_library(supported_isas()[0]), str(path), facts)
        return _bindings()
    except (Unsupported, AttributeError, RuntimeError):
        return _LongWay


@functools.cache
def cuda(device: int = 0):
    """The CUDA library, once a probe launch has run on the device.

    Raises Unsupported with the reason: not built, or what the driver said.
    """
    path = Path(__file__).with_name("_cuda.so")
    if not path.exists():
        raise Unsupported(build_info())
    try:
        library = _bindings().open_cuda(str(path))
    except RuntimeError as error:
        raise Unsupported(str(error)) from None
    reason = library.probe(device)
    if reason:
        raise Unsupported(f"probe launch on device {device}: {reason}")
    return library


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """The ordinal of a CUDA tensor's device, and the handle of torch's current stream there."""
    device = tensor.device.index
    return device, torch._C._cuda_getCurrentRawStream(device)


def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself where its last dimension is contiguous, as the kernels need."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def fp32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself where it is contiguous and fp32; else made so."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def check_rows(*tensors: torch.Tensor) -> None:
    """Raise PassedOn unless every row of these tensors can be read 16 bytes at a time."""
    for t in tensors:
        if t.data_ptr() % 16 or t.shape[-1] * t.itemsize % 16:
            raise PassedOn(f"rows of {t.shape[-1]} {t.dtype} that do not start on 16 bytes")


def problem(name: str, **fields):
    """One of the C++ argument structs, by name."""
    return getattr(_bindings(), name)(**fields)


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
