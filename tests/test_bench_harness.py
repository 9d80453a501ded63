"""The benchmark's gate and its clock: wrong results are refused, right ones timed in turn."""

import harness
import pytest
import torch
from harness import Contender, Group, Unavailable

from medgpt_kernels import roofline
from medgpt_kernels.roofline import Cost, Roofs

TRUTH = torch.linspace(1, 2, 64, dtype=torch.float64)


@pytest.fixture(autouse=True)
def made_up_roofs(monkeypatch):
    monkeypatch.setattr(harness, "FAST_SECONDS", 0.0)
    monkeypatch.setattr(roofline, "measure", lambda device: Roofs(10.0, {torch.float32: 100.0}))


def gives(values, calls=None, name=""):
    """A contender whose tokens are `values`; it notes its name at each call."""

    def run():
        if calls is not None:
            calls.append(name)
        return values

    return Contender(run, lambda tokens: {"tokens": tokens})


def absent():
    raise Unavailable("not built")


def broken():
    raise RuntimeError("no such file")


def group(**contenders) -> Group:
    exact = TRUTH.float()
    every = {"reference": lambda: gives(exact), **contenders}
    return Group(
        name="op case",
        cost=Cost(1, 1),
        dtype=torch.float32,
        device=torch.device("cpu"),
        contenders=every,
        truth=lambda: {"tokens": TRUTH},
        peer_bound=1e-3,
    )


def test_wrong_results_are_refused_and_right_ones_timed():
    right, wrong = TRUTH.float(), TRUTH.float()
    wrong[17] += 1e-5
    found = harness.measure(
        group(cpu=lambda: gives(wrong), triton=lambda: gives(right)), ["cpu", "triton"], 3, 2
    )
    assert "tokens: max error" in found.outcomes["cpu"].refused
    assert found.outcomes["cpu"].times == []
    assert found.outcomes["triton"].refused == ""
    assert len(found.outcomes["triton"].times) == 3


def test_a_peer_is_held_to_its_stated_bound():
    near, far = TRUTH.float() + 1e-3, TRUTH.float() + 1e-2
    missing = TRUTH.float()
    missing[0] = float("nan")
    made = group(near=lambda: gives(near), far=lambda: gives(far), missing=lambda: gives(missing))
    found = harness.measure(made, ["near", "far", "missing"], 1, 1)
    assert [bool(found.outcomes[n].refused) for n in ("near", "far", "missing")] == [
        False,
        True,
        True,
    ]


def test_absent_is_skipped_and_broken_is_refused():
    found = harness.measure(group(cuda=absent, peer=broken), ["cuda", "peer"], 1, 1)
    assert found.outcomes["cuda"].skipped == "not built"
    assert found.outcomes["peer"].refused == "RuntimeError: no such file"


def test_contenders_take_turns_in_both_directions():
    calls, exact = [], TRUTH.float()
    made = group(a=lambda: gives(exact, calls, "a"), b=lambda: gives(exact, calls, "b"))
    harness.measure(made, ["a", "b"], rounds=2, slow_rounds=1)
    checked, warm = ["a", "b"], ["a", "b"]
    assert calls == [*checked, *warm, *"aabbbbaa"]


def test_a_slow_contender_runs_fewer_rounds(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_SECONDS", -1.0)
    found = harness.measure(group(), ["reference"], rounds=5, slow_rounds=2)
    assert len(found.outcomes["reference"].times) == 2


def test_a_bound_is_neither_checked_nor_a_peer():
    half = gives(TRUTH.float() / 2)._replace(is_bound=True)
    found = harness.measure(group(product=lambda: half), ["reference", "product"], 2, 1)
    assert found.outcomes["product"].kind == "bound"
    assert len(found.outcomes["product"].times) == 2
    assert found.strongest_peer() == "reference"


def test_replay_gives_the_recorded_durations():
    class Benchmark:
        enabled = True

        def pedantic(self, target, rounds, iterations):
            self.seen = []
            for _ in range(rounds):
                start = harness.replay_clock()
                target()
                self.seen.append(harness.replay_clock() - start)

    benchmark = Benchmark()
    harness.replay(benchmark, [0.25, 0.5, 0.125])
    assert benchmark.seen == [0.25, 0.5, 0.125]


def test_a_fast_contender_runs_more_rounds(monkeypatch):
    monkeypatch.setattr(harness, "FAST_SECONDS", 10.0)
    found = harness.measure(group(), ["reference"], rounds=2, slow_rounds=1)
    assert len(found.outcomes["reference"].times) == 6
