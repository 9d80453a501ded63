"""Times on a card with a cold L2, peak memory, CUDA graphs; in a dry run everything but the times.

A comparison is one shape of one op. Its contenders are checked against fp64 at a small size, then
timed at the full one in turn, one call each a round, the queue filled while the card is kept busy,
so that a time is the card's own and none of Python's.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from results import BASELINE, Measured, Outcome

from medgpt_kernels import roofline

SECONDS = 1.5  # of timed calls for one contender
ROUNDS = 30
BUSY_CYCLES = 4_000_000  # some two milliseconds, in which Python enqueues a call
HOST_CALLS = 30


@dataclass(frozen=True)
class Place:
    """Where a part runs, and at what size."""

    dry: bool
    roofs: roofline.Roofs | None = None  # None: measured where they are needed

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def size(self, full, dry):
        return dry if self.dry else full

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, backend="eager" if self.dry else "inductor", dynamic=False)


@dataclass(frozen=True)
class Comparison:
    """One shape of one op.

    Attributes:
        build: the harness.Group for so many tokens (or cached keys).
        tokens: the size that is timed.
        checked_tokens: the size whose outputs are compared with fp64.
        few: a call so short that Python's part and CUDA graphs matter.
    """

    build: Callable[[int], harness.Group]
    tokens: int
    checked_tokens: int
    few: bool = False


def one_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:300]


def reason(error: BaseException) -> str:
    """One line of an error, for the report."""
    return one_line(f"{type(error).__name__}: {error}")


class ColdL2:
    """Overwrites more than the L2 cache holds."""

    def __init__(self):
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.empty(max(4 * size, 64 << 20), dtype=torch.uint8, device="cuda")

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, between two events, with a cold L2 and a full queue."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of the call, already warm."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def host_seconds(run: Callable[[], object]) -> float:
    """Of one call among many in a row: what Python can keep up with."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / HOST_CALLS


def peak_bytes(run: Callable[[], object]) -> int:
    """Beyond what is there before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _attempt(make: Callable, outcome: Outcome):
    """make(), or None with the reason noted: a contender that fails costs only its own line."""
    try:
        return make()
    except harness.Unavailable as error:
        outcome.skipped = str(error)
    except Exception as error:
        outcome.refused = reason(error)
        if "illegal memory access" in str(error) or "unspecified launch" in str(error):
            raise  # nothing on this card can be believed in this process any more
    return None


def _first_call(make: Callable[[], harness.Contender], dry: bool):
    """A warm contender, and the peak memory of one call (None in a dry run)."""
    contender = make()
    for _ in range(1 if dry else max(contender.warmups, 2)):
        contender.run()
    return contender, None if dry else peak_bytes(contender.run)


def _time(ready: dict[str, harness.Contender], outcomes: dict[str, Outcome]) -> None:
    """Rounds of one cold call each, the order reversed every second round."""
    cold = ColdL2()
    once = {name: cold.seconds(contender.run) for name, contender in ready.items()}
    rounds = {name: max(3, min(ROUNDS, int(SECONDS / s))) for name, s in once.items()}
    for n in range(max(rounds.values(), default=0)):
        due = [name for name in ready if rounds[name] > n]
        for name in due if n % 2 == 0 else due[::-1]:
            outcomes[name].times.append(cold.seconds(ready[name].run))


def compare(comparison: Comparison, place: Place, names: list[str] | None = None) -> dict:
    """Check, then time; one group of the report.

    Args:
        names: which contenders; default all that the group has.
    """
    small = comparison.build(comparison.checked_tokens)
    names = [n for n in small.contenders if names is None or n in names]
    _, outcomes = harness.prepare(small, names)
    for outcome in outcomes.values():
        outcome.refused = one_line(outcome.refused)
    del small
    group = comparison.build(comparison.tokens)
    ready, more = {}, {name: {} for name in names}
    for name in names:
        outcome = outcomes[name]
        if outcome.skipped or outcome.refused:
            continue
        made = _attempt(lambda name=name: _first_call(group.contenders[name], place.dry), outcome)
        if made is not None:
            ready[name], more[name]["peak_bytes"] = made
        if not place.dry:
            gc.collect()
            torch.cuda.empty_cache()
    roofs = place.roofs or roofline.Roofs(1.0, {})
    if not place.dry and place.roofs is None:
        roofs = roofline.measure("cuda")
    if not place.dry:
        _time(ready, outcomes)
        if comparison.few:
            _time_few(ready, more)
    measured = Measured(group.name, group.cost, group.dtype, roofs, outcomes)
    return describe(measured, more, comparison, place.dry)


def _time_few(ready: dict[str, harness.Contender], more: dict[str, dict]) -> None:
    """What Python can keep up with, and the same call in a CUDA graph."""
    cold = ColdL2()
    for name, contender in ready.items():
        more[name]["host_ms"] = host_seconds(contender.run) * 1e3
        outcome = Outcome("")
        replay = _attempt(lambda contender=contender: captured(contender.run), outcome)
        if replay is None:
            more[name]["graph_error"] = outcome.refused
            continue
        times = sorted(cold.seconds(replay) for _ in range(ROUNDS))
        more[name]["graph_ms"] = times[ROUNDS // 2] * 1e3


def describe(measured: Measured, more: dict[str, dict], comparison: Comparison, dry: bool) -> dict:
    """JSON of one comparison: figures, and the reason where there are none."""
    rows = {}
    for name, outcome in measured.outcomes.items():
        row = {"kind": outcome.kind}
        if outcome.skipped or outcome.refused:
            row |= {"skipped": outcome.skipped} if outcome.skipped else {"failed": outcome.refused}
        elif dry:
            row["ran"] = True
        elif outcome.times:
            row |= measured.figures(name) | more[name]
        rows[name] = row
    return {
        "name": measured.name,
        "tokens": comparison.tokens,
        "checked_tokens": comparison.checked_tokens,
        "dtype": str(measured.dtype)[6:],
        "bytes": measured.cost.bytes,
        "flops": measured.cost.flops,
        "baseline": BASELINE,
        "strongest_peer": measured.strongest_peer(),
        "contenders": rows,
    }
