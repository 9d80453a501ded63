"""The tolerance rule, poisoned memory, realistic inputs, and loops over an op's backends."""

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from medgpt_kernels import registry


class ToleranceError(AssertionError):
    """A kernel's error exceeds what the same computation in eager PyTorch has."""


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_close(
    actual: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    *,
    extra_ulp: float = 0.0,
    name: str = "",
) -> None:
    """Hold `actual` to twice the error of eager plus two roundings of the truth.

    Args:
        actual: what the kernel gave.
        eager: the reference with every intermediate in the input dtype.
        truth: the reference in fp64 from the inputs as rounded.
        extra_ulp: further units in the last place of the largest truth (2 for sinks).
        name: which tensor, for the message.

    Both norms must hold: max |actual - truth| <= 2 max |eager - truth| + eps max |truth|, and the
    same in RMS; eps is the dtype's spacing at 1, which is two roundings of half a spacing each.
    Integers must be equal; infinities and NaN must sit in the same places as in the truth.

    Raises:
        ToleranceError: with both errors, both bounds and the place of the worst element.
    """
    label = f"{name}: " if name else ""
    if actual.shape != truth.shape or actual.dtype != eager.dtype:
        raise ToleranceError(
            f"{label}expected {eager.dtype} {list(truth.shape)}, got {actual.dtype} "
            f"{list(actual.shape)}"
        )
    if not truth.dtype.is_floating_point:
        if not torch.equal(actual, truth.to(actual.dtype)):
            raise ToleranceError(f"{label}integers differ in {(actual != truth).sum()} places")
        return
    a, e, t = (x.detach().to("cpu", torch.float64) for x in (actual, eager, truth))
    finite = t.isfinite()
    same = torch.equal(a.isnan(), t.isnan()) and torch.equal(a[t.isinf()], t[t.isinf()])
    if not same or not a[finite].isfinite().all():
        raise ToleranceError(
            f"{label}not finite where the truth is, or the other way: {int((~a.isfinite()).sum())} "
            f"against {int((~finite).sum())} elements"
        )
    e_finite = e.isfinite() & finite
    a_error, e_error = (a - t)[finite].abs(), (e - t)[e_finite].abs()
    if a_error.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps * (1 + extra_ulp)
    e_max = e_error.max().item() if e_error.numel() else 0.0
    max_bound = 2 * e_max + eps * t[finite].abs().max().item()
    rms_bound = 2 * _rms(e_error) + eps * _rms(t[finite])
    a_max, a_rms = a_error.max().item(), _rms(a_error)
    if a_max > max_bound or a_rms > rms_bound:
        worst = int((a - t).abs().where(finite, torch.zeros_like(t)).argmax())
        raise ToleranceError(
            f"{label}max error {a_max:.3e} (bound {max_bound:.3e}), rms {a_rms:.3e} (bound "
            f"{rms_bound:.3e}); worst at flat index {worst}: {a.flatten()[worst]:.6g} for "
            f"{t.flatten()[worst]:.6g}"
        )


def interpreting() -> bool:
    """True where Triton kernels run on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend_modules(op: str, device_type: str = "cpu") -> dict[str, ModuleType]:
    """The modules of an op that can run on a device type here, reference first.

    On the CPU the triton module counts only under TRITON_INTERPRET=1, and then computes in bf16 as
    hardware does.
    """
    names = ["reference", *(n for n in registry.candidates(device_type) if n != "reference")]
    if device_type == "cpu" and interpreting():
        names.append("triton")
        patch_interpreter_bf16()
    found = {}
    for name in names:
        with contextlib.suppress(ImportError, registry.Unsupported):
            found[name] = importlib.import_module(f"medgpt_kernels.{op}.{name}")
    return found


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every torch.empty inside the block with NaN (or the largest integer).

    A kernel that forgets an element, or reads one it never wrote, then shows it.
    """
    saved = {n: getattr(torch, n) for n in ("empty", "empty_like", "empty_strided")}
    saved_new = torch.Tensor.new_empty

    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            if t.dtype.is_floating_point:
                t.fill_(float("nan"))
            elif t.dtype not in (torch.bool,) and not t.dtype.is_complex:
                t.fill_(torch.iinfo(t.dtype).max)
            return t

        return made

    try:
        for n, make in saved.items():
            setattr(torch, n, poison(make))
        torch.Tensor.new_empty = poison(saved_new)
        yield
    finally:
        for n, make in saved.items():
            setattr(torch, n, make)
        torch.Tensor.new_empty = saved_new


def realistic(*shape: int, dtype=torch.float32, seed: int = 0, outliers: int = 4) -> torch.Tensor:
    """Activations as transformers have them: unit noise with a few channels about 100 times larger.

    Args:
        shape: the last dimension holds the channels.
        outliers: how many channels are large.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g)
    channels = torch.randperm(shape[-1], generator=g)[:outliers]
    x[..., channels] *= 30 + 90 * torch.rand(len(channels), generator=g)
    return x.to(dtype)


def patch_interpreter_bf16() -> None:
    """Make Triton's interpreter compute in bf16 as hardware does.

    It keeps bf16 as raw bits, truncates fp32 to bf16 where hardware rounds to nearest even (half of
    all values differ), and its dot multiplies the bits as integers. Called once in the process,
    before a kernel runs under TRITON_INTERPRET=1; backend_modules does so.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "_medgpt_bf16", False):
        return
    convert_float, create_dot = (
        interpreter._convert_float,
        interpreter.InterpreterBuilder.create_dot,
    )

    def convert(data, source, target, rounding_mode):
        if source.primitive_bitwidth == 32 and target.is_bf16() and rounding_mode is None:
            bits = np.asarray(data, dtype=np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
        return convert_float(data, source, target, rounding_mode)

    def widen(handle):
        if not handle.dtype.scalar.is_bf16():
            return handle
        bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._medgpt_bf16 = True
