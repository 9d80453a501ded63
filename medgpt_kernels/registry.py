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
from torch.autograd import forward_ad

BACKENDS = ("reference", "cpu", "triton", "cuda")

_library = torch.library.Library("medgpt_kernels", "DEF")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
_warned: set[str] = set()


class Unsupported(Exception):
    """A backend cannot honour this call; the text says why. Raised before any work is done."""


class PassedOn(Unsupported):
    """By design another backend serves this call, also where this one was asked for by name."""


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot serve this call."""


@dataclass
class Operator:
    """One schema and the modules that implement it, fastest first per device type."""

    name: str
    modules: dict[str, str]
    loaded: dict[str, Callable | str] = field(default_factory=dict)  # a text: why it is not there

    def kernel(self, backend_name: str) -> Callable:
        """The function of one backend. Raises Unsupported with the reason it is not there."""
        if backend_name not in self.loaded:
            self.loaded[backend_name] = self._load(backend_name)
        found = self.loaded[backend_name]
        if isinstance(found, str):  # raised anew: a kept exception would keep every call's tensors
            raise Unsupported(found)
        return found

    def _load(self, backend_name: str) -> Callable | str:
        if backend_name not in self.modules:
            return f"{self.name} has no {backend_name} backend"
        try:
            return getattr(importlib.import_module(self.modules[backend_name]), self.name)
        except (ImportError, Unsupported) as reason:
            return str(reason)


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
    """MEDGPT_KERNELS_STRICT, which is 0 or 1."""
    value = os.environ.get("MEDGPT_KERNELS_STRICT", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"MEDGPT_KERNELS_STRICT: expected 0 or 1, got {value!r}")
    return value == "1"


def candidates(device_type: str) -> tuple[str, ...]:
    """Backends that can serve this device type, fastest first."""
    if device_type == "cpu":
        return ("cpu", "reference")
    if device_type == "cuda":
        return ("cuda", "triton", "reference")
    return ("reference",)


def _order(device_type: str) -> tuple[str, ...]:
    """Backends to try, fastest first; the one asked for, alone; the reference last."""
    wanted = chosen_backend()
    return tuple(dict.fromkeys((wanted, "reference") if wanted else candidates(device_type)))


def _kernel(operator: Operator, device_type: str, name: str) -> Callable:
    # Triton's interpreter takes CPU tensors; its modules say themselves when it is off.
    fits = name in candidates(device_type) or (name, device_type) == ("triton", "cpu")
    if not fits:
        raise Unsupported(f"the {name} backend takes no tensors on {device_type or 'this device'}")
    return operator.kernel(name)


def select(operator: Operator, device_type: str) -> tuple[str, list[str]]:
    """The backend that serves a device type now, and why no faster one does."""
    reasons = []
    for name in _order(device_type):
        try:
            _kernel(operator, device_type, name)
            return name, reasons
        except Unsupported as reason:
            reasons.append(f"{name}: {reason}")
    raise BackendError(f"{operator.name}: no backend for {device_type} ({'; '.join(reasons)})")


def dispatch(operator: Operator, device_type: str, args: tuple):
    """Run the operator with the fastest backend that can serve this call.

    Where only the reference is left although another backend was asked for, failed to load or
    refused this call, one warning says why, or MEDGPT_KERNELS_STRICT=1 makes it an error.
    """
    reasons = {}
    names = list(_order(device_type))
    for name in names:  # may grow
        try:
            kernel = _kernel(operator, device_type, name)
            if name == "reference" and reasons:
                _fall_back(operator, reasons)
            return kernel(*args)
        except Unsupported as reason:
            if chosen_backend() or name in operator.modules:
                reasons[name] = str(reason)
            if isinstance(reason, PassedOn):
                names[names.index(name) + 1 :] = (n for n in candidates(device_type) if n != name)
    raise BackendError(f"{operator.name}: no backend for {device_type} ({reasons})")


def _fall_back(operator: Operator, reasons: dict[str, str]) -> None:
    """Say once that the reference takes over, or raise under MEDGPT_KERNELS_STRICT=1."""
    text = f"{operator.name}: " + "; ".join(
        f"the {name} backend cannot serve this call ({reason})" for name, reason in reasons.items()
    )
    if strict():
        raise BackendError(text)
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"{text}; the reference takes over", stacklevel=2)


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
            _with_the_forwards_backend(backward) if backward else _no_gradient(name),
            setup_context=_keeping_the_backend(setup_context),
            lib=_library,
        )
    operation = getattr(torch.ops.medgpt_kernels, name).default

    def call(*args):
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            _refuse_forward_mode(name, args)
        return operation(*args)

    call.operator = operator
    return call


def _refuse_forward_mode(name: str, args: tuple) -> None:
    """torch drops the tangents of an operator without a jvp where no input requires a gradient."""
    for t in args:
        if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(f"{name} has no forward-mode derivative")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on this device type now; None where it is off, or unknown ("meta")."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast wants them where it is on: float ones cast, all but fp64."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    narrow = (t.dtype.is_floating_point and t.dtype != torch.float64 for t in tensors)
    return tuple(t.to(dtype) if cast else t for t, cast in zip(tensors, narrow, strict=True))


def direct(op: Callable) -> Callable:
    """`op`, called past PyTorch's dispatcher where that has nothing to do.

    Its Python layers cost more than some kernels of a decoding step. They are left out for plain
    CPU tensors under torch.no_grad(), outside torch.compile, torch.jit.trace, dispatch modes and
    transforms.
    """
    operator = op.operator
    kernel = _bind(operator, "cpu")

    def call(*args):
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _plain(args):
            return op(*args)
        fastest = operator.loaded.get("cpu")
        elsewhere = chosen_backend() not in (None, "cpu")
        if elsewhere or not callable(fastest) or torch.is_autocast_enabled("cpu"):
            return kernel(*args)
        try:
            return fastest(*args)
        except Unsupported:
            return kernel(*args)

    return call


_PLAIN = (type(None), int, float, bool, str)


def _plain(args: tuple) -> bool:
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
    ):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for a in args:
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if not a.is_cpu or a.is_neg():  # pointers know nothing of a lazy minus
                return False
        elif kind not in _PLAIN and isinstance(a, torch.Tensor):  # the latter takes long
            return False
    return True


def _keeping_the_backend(setup_context: Callable | None) -> Callable:
    """Note which backend the forward was narrowed to: autograd's threads cannot see it."""

    def setup(ctx, inputs, output):
        ctx.chosen_backend = chosen_backend()
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def _with_the_forwards_backend(backward: Callable) -> Callable:
    def run(ctx, *grads):
        if ctx.chosen_backend is None or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with backend(ctx.chosen_backend):
            return backward(ctx, *grads)

    return run


def _no_gradient(name: str) -> Callable:
    """The formula of an operator that has none: an error, where silence would drop gradients."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{name} has no gradient (double backward is not supported)")

    return backward


def _bind(operator: Operator, device_type: str) -> Callable:
    def kernel(*args):
        if device_type and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):  # the public function has cast
                return dispatch(operator, device_type, args)
        return dispatch(operator, device_type, args)

    return kernel
