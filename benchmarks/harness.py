"""What every benchmark shares: contenders, the correctness gate, interleaved timing, results.

A group is one shape; its contenders do the same work. All contenders of a group that a session
selected are timed together, one call each a round, the order reversed every second round, so that
their medians see the same weather. pytest-benchmark then gets the recorded durations (its clock is
`replay_clock`), which keeps its statistics, files and comparison.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from results import BASELINE, Measured, Outcome

from medgpt_kernels import registry, roofline, testing
from medgpt_kernels.roofline import Cost

OURS = ("cpu", "triton", "cuda")
SLOW_SECONDS = 1.0  # a contender slower than this runs fewer rounds
FAST_SECONDS = 0.02  # one faster than this runs three times as many
REPEATED_SECONDS = 0.3  # one faster than this is called once, untimed, before each timed call
Outputs = dict[str, torch.Tensor]


class Unavailable(Exception):
    """A contender cannot run here; the text says why."""


class Contender(NamedTuple):
    """One way to do a group's work."""

    run: Callable[[], object]  # what is timed
    outputs: Callable[[object], Outputs]  # what `run` gave, packed as the truth is
    is_bound: bool = False  # does less than the op: a limit, neither checked nor a peer
    warmups: int = 1


@dataclass
class Group:
    """One shape of one op.

    Attributes:
        name: op, case and shape.
        cost: the least traffic and work, for the roof.
        contenders: a function each that builds it; it may raise Unavailable.
        truth: outputs in fp64 from the inputs as rounded.
        peer_bound: the largest error of a peer, as a fraction of the largest truth, per output.
    """

    name: str
    cost: Cost
    dtype: torch.dtype
    device: torch.device
    contenders: dict[str, Callable[[], Contender]]
    truth: Callable[[], Outputs]
    peer_bound: float


@dataclass
class Job:
    """One call of an op on one input, forward only or (with d_out) forward and backward.

    Attributes:
        op: the operator whose backends serve the call.
        call: the public function on this input; takes `parameters` by name, gives tokens.
        parameters: leaves whose gradients a backward gives, each under "d_<name>".
        d_out: the gradient of the tokens, or None.
    """

    op: str
    call: Callable[..., torch.Tensor]
    parameters: Outputs
    d_out: torch.Tensor | None = None

    def contender(self, call: Callable[[], torch.Tensor], pack=None, pad=None, **options):
        """`call` as a contender; pack and pad carry tokens to and gradients from packed rows."""
        pack = pack or (lambda tokens: tokens)
        leaves = self.parameters

        def forward():
            with torch.no_grad():
                return call()

        if self.d_out is None:
            return Contender(forward, lambda tokens: {"tokens": pack(tokens)}, **options)
        d_out = pad(self.d_out) if pad else self.d_out

        def forward_backward():
            for leaf in leaves.values():
                leaf.grad = None
            tokens = call()
            tokens.backward(d_out)
            return tokens.detach()

        def outputs(tokens):
            grads = {f"d_{n}": p.grad for n, p in leaves.items() if p.grad is not None}
            return {"tokens": pack(tokens), **grads}

        return Contender(forward_backward, outputs, **options)

    def backend(self, name: str) -> Contender:
        """The public call narrowed to one of our backends."""
        try:
            registry.operators[self.op].kernel(name)
        except registry.Unsupported as reason:
            raise Unavailable(str(reason)) from None

        made = self.contender(partial(self.call, **self.parameters))

        def run():  # the backward too chooses its backend as it runs
            with registry.backend(name):
                return made.run()

        return made._replace(run=run)

    def backends(self) -> dict[str, Callable[[], Contender]]:
        """The reference and every backend of ours for the parameters' device."""
        device = next(iter(self.parameters.values())).device
        return {n: partial(self.backend, n) for n in (BASELINE, *registry.candidates(device.type))}

    def truth(self) -> Outputs:
        """The reference in fp64 from the parameters as rounded."""
        leaves = {n: p.detach().double().requires_grad_() for n, p in self.parameters.items()}
        d_out = None if self.d_out is None else self.d_out.double()
        wide = Job(self.op, self.call, leaves, d_out).backend(BASELINE)
        return wide.outputs(wide.run())


def check(name: str, actual: Outputs, eager: Outputs, truth: Outputs, peer_bound: float) -> None:
    """Ours by the tolerance rule; a peer by its stated bound. Raises AssertionError."""
    if name in OURS and actual.keys() != truth.keys():
        raise AssertionError(f"expected outputs {sorted(truth)}, got {sorted(actual)}")
    for key, value in actual.items():
        if name in OURS:
            testing.assert_close(value, eager[key], truth[key], name=key)
            continue
        wanted = truth[key].reshape(value.shape)
        largest = wanted.abs().max().item()
        error = (value.double() - wanted).abs().max().item()
        if not error <= peer_bound * largest:
            raise AssertionError(f"{key}: error {error:.3e} of {largest:.3e}, bound {peer_bound}")


def _kind(name: str, contender: Contender | None) -> str:
    if name == BASELINE:
        return "baseline"
    if name in OURS:
        return "ours"
    return "bound" if contender is not None and contender.is_bound else "peer"


class Ready(NamedTuple):
    """A contender that gave right outputs, and how long that first call took."""

    contender: Contender
    seconds: float


def prepare(group: Group, names: Sequence[str]) -> tuple[dict[str, Ready], dict[str, Outcome]]:
    """Build each contender and let it through only if its outputs on this very input are right."""
    ready, outcomes = {}, {}
    truth = group.truth()
    eager = group.contenders[BASELINE]()
    eager_outputs, eager_seconds = _first_call(eager)
    eager_outputs = {n: t.clone() for n, t in eager_outputs.items()}
    for name in names:
        contender, outcome = None, Outcome(_kind(name, None))
        try:
            if name == BASELINE:
                contender, outputs, seconds = eager, eager_outputs, eager_seconds
            else:
                contender = group.contenders[name]()
                outputs, seconds = _first_call(contender)
            outcome = Outcome(_kind(name, contender))
            check(name, outputs, eager_outputs, truth, group.peer_bound)
            ready[name] = Ready(contender, seconds)
        except Unavailable as reason:
            outcome.skipped = str(reason)
        except Exception as error:
            outcome.refused = f"{type(error).__name__}: {error}"
        outcomes[name] = outcome
    return ready, outcomes


def _first_call(contender: Contender) -> tuple[Outputs, float]:
    begin = time.perf_counter()
    made = contender.run()
    return {} if contender.is_bound else contender.outputs(made), time.perf_counter() - begin


def measure(group: Group, names: Sequence[str], rounds: int, slow_rounds: int) -> Measured:
    """Check, then time the named contenders of a group round-robin.

    Right before its timed call a fast contender runs once untimed, so that the fresh memory it gets
    is what it has just given back. A virtual machine may take 6 ms for 2 MB that no one used for a
    while, be it a kernel's or a peer's.
    """
    roofs = roofline.measure(str(group.device))
    ready, outcomes = prepare(group, names)
    left, repeated = {}, set()
    for name, (contender, first) in ready.items():
        # the checked call has warmed up what is slow for its own size
        slow = first >= SLOW_SECONDS and contender.warmups == 1
        seconds = first
        for _ in range(0 if slow else contender.warmups):
            seconds = roofline.time_call(contender.run, group.device)
        left[name] = rounds if seconds < SLOW_SECONDS else slow_rounds
        if seconds < FAST_SECONDS and group.device.type == "cpu":
            left[name] = 3 * rounds
        if seconds < REPEATED_SECONDS:
            repeated.add(name)
    for r in range(max(left.values(), default=0)):
        gc.collect()
        due = [name for name in ready if left[name] > r]
        for name in due if r % 2 == 0 else due[::-1]:
            if name in repeated:
                ready[name].contender.run()
            run = ready[name].contender.run
            outcomes[name].times.append(roofline.time_call(run, group.device))
    return Measured(group.name, group.cost, group.dtype, roofs, outcomes)


def our_backends() -> tuple[str, ...]:
    """The reference and the backends that could serve a device of this machine."""
    return (BASELINE, "cpu", *(("triton", "cuda") if torch.cuda.is_available() else ()))


_replayed = 0.0


def replay_clock() -> float:
    """The clock of pytest-benchmark here: it moves by recorded durations only."""
    return _replayed


def replay(benchmark, times: Sequence[float]) -> None:
    """Hand recorded durations to pytest-benchmark as its own rounds."""

    durations = iter(times)

    def advance():
        global _replayed
        _replayed += next(durations)

    if benchmark.enabled:
        benchmark.pedantic(advance, rounds=len(times), iterations=1)
    else:
        benchmark.pedantic(time.perf_counter)
