"""One schema per operator, bound to its backends through PyTorch's dispatcher.

An op folder holds one module per backend: reference.py, cpu.py, triton.py, cuda.py. Each has a
function of the operator's name and signature. Which one serves a call is decided when the operator
runs, so a compiled graph follows `backend(...)` and the environment as eager code does.
"""

import contextlib
import contextvars
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

_library = torch.library.Library("medgpt_kernels", "DEF")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
_warned: set[tuple[str, str, str]] = set()


class Unsupported(Exception):
    """A backend cannot honour this call; the text says why. Raised before any work is done."""


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot serve this call."""


@dataclass
class Operator:
    """One schema and the modules that implement it, fastest first per device type."""

    name: str
    modules: dict[str, str]
    loaded: dict[str, Callable | Unsupported] = field(default_factory=dict)

    def kernel(self, backend_name: str) -> Callable:
        """The function of one backend. Raises Unsupported with the reason it is not there."""
        if backend_name not in self.loaded:
            self.loaded[backend_name] = self._load(backend_name)
        found = self.loaded[backend_name]
        if isinstance(found, Unsupported):
            raise found
        return found

    def _load(self, backend_name: str) -> Callable | Unsupported:
        if backend_name not in self.modules:
            return Unsupported(f"{self.name} has no {backend_name} backend")
        try:
            return getattr(importlib.import_module(self.modules[backend_name]), self.name)
        except ImportError as error:
            return Unsupported(str(error))
        except Unsupported as reason:
            return reason


operators: dict[str, Operator] = {}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Narrow every operator to one backend inside the block, for A/B runs and tests.

    Args:
        name: "reference", "cpu", "triton" or "cuda". A call that this backend cannot serve falls
            back to the reference with a warning, or raises under MEDGPT_KERNELS_STRICT=1.

    The same choice for a whole process: MEDGPT_KERNELS_BACKEND=name.
    """
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def chosen_backend() -> str | None:
    """The backend asked for by the innermost `backend` block or by the environment, if any."""
    name = _chosen.get() or os.environ.get("MEDGPT_KERNELS_BACKEND") or None
    return name and _checked(name)


def strict() -> bool:
    return os.environ.get("MEDGPT_KERNELS_STRICT", "0") == "1"


def candidates(device_type: str) -> tuple[str, ...]:
    """Backends that can serve this device type, fastest first."""
    if device_type == "cpu":
        return ("cpu", "reference")
    if device_type == "cuda":
        return ("cuda", "triton", "reference")
    return ("reference",)


def select(operator: Operator, device_type: str) -> tuple[str, Callable, list[str]]:
    """The backend that serves a device type now, its function, and why no faster one does."""
    wanted = chosen_backend()
    order = (wanted, "reference") if wanted else candidates(device_type)
    reasons = []
    for name in dict.fromkeys(order):
        try:
            return name, operator.kernel(name), reasons
        except Unsupported as reason:
            reasons.append(f"{name}: {reason}")
    raise BackendError(f"{operator.name}: no backend for {device_type} ({'; '.join(reasons)})")


def _fall_back(operator: Operator, name: str, reason: str) -> None:
    """Say once that the reference takes over, or raise under MEDGPT_KERNELS_STRICT=1."""
    text = f"{operator.name}: the {name} backend cannot serve this call ({reason})"
    if strict():
        raise BackendError(text)
    key = (operator.name, name, reason)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"{text}; the reference takes over", stacklevel=3)


def _absent(operator: Operator, device_type: str, name: str, reasons: list[str]) -> None:
    """A missing backend is worth a word where it was asked for, or where only reference is left."""
    missing = [r for r in reasons if chosen_backend() or "has no" not in r]
    if missing and name == "reference":
        _fall_back(operator, missing[0].split(":")[0], "; ".join(missing))


def dispatch(operator: Operator, device_type: str, args: tuple):
    """Run the operator with the fastest backend that can serve this call."""
    name, kernel, reasons = select(operator, device_type)
    if reasons:
        _absent(operator, device_type, name, reasons)
    try:
        return kernel(*args)
    except Unsupported as reason:
        _fall_back(operator, name, str(reason))
    for other in candidates(device_type):
        if other not in (name, "reference") and chosen_backend() is None:
            with contextlib.suppress(Unsupported):
                return operator.kernel(other)(*args)
    return operator.kernel("reference")(*args)


def register(
    schema: str,
    *,
    package: str,
    fake: Callable,
    backends: tuple[str, ...] = ("reference", "cpu", "triton"),
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define one operator and bind its backends; returns the callable operator.

    Args:
        schema: "name(Tensor x, ...) -> ..." with every size a SymInt.
        package: the op's package; `package.<backend>` holds a function `name` of this signature.
        fake: shapes and dtypes of the outputs, for torch.compile.
        backends: which backend modules exist.
        setup_context, backward: the autograd formula; without one a gradient raises.
    """
    name = schema.split("(")[0]
    operator = Operator(name, {b: f"{package}.{b}" for b in backends})
    operators[name] = operator
    _library.define(schema)
    for key, device_type in (("CPU", "cpu"), ("CUDA", "cuda"), ("CompositeExplicitAutograd", "")):
        _library.impl(name, _bind(operator, device_type), key)
    torch.library.register_fake(f"medgpt_kernels::{name}", fake, lib=_library)
    if "!" not in schema:
        torch.library.register_autograd(
            f"medgpt_kernels::{name}",
            backward or _no_gradient(name),
            setup_context=setup_context,
            lib=_library,
        )
    return getattr(torch.ops.medgpt_kernels, name).default


def _no_gradient(name: str) -> Callable:
    """The formula of an operator that has none: an error, where silence would drop gradients."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{name} has no gradient (double backward is not supported)")

    return backward


def _bind(operator: Operator, device_type: str) -> Callable:
    def kernel(*args):
        return dispatch(operator, device_type, args)

    return kernel
