"""A saved run against another: what counts as a regression, and what the record looks like."""

import copy
import json

import compare
import pytest
import results
import torch
from results import Measured, Outcome

from medgpt_kernels.roofline import Cost, Roofs

ROOFS = Roofs(10.0, {torch.float32: 100.0, torch.bfloat16: 200.0})


def made_up_run(ours_ms=50.0, baseline_ms=100.0) -> dict:
    outcomes = {
        "reference": Outcome("baseline", [baseline_ms / 1e3] * 3),
        "cpu": Outcome("ours", [ours_ms / 1e3] * 3),
        "packed": Outcome("peer", [baseline_ms / 2e3] * 3),
        "product": Outcome("bound", [baseline_ms / 1e4] * 3),
    }
    groups = [
        Measured(f"op {case}", Cost(10**6, 10**9), torch.float32, ROOFS, copy.deepcopy(outcomes))
        for case in ("fwd", "bwd")
    ]
    return json.loads(json.dumps(results.record(groups, "cpu", short=False)))


@pytest.fixture
def run_main(tmp_path, capsys):
    def run(old, new, *options):
        paths = []
        for name, content in (("old", old), ("new", new)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(content))
        status = compare.main([*map(str, paths), *options])
        return status, capsys.readouterr()

    return run


def test_the_same_run_passes(run_main):
    status, printed = run_main(made_up_run(), made_up_run())
    assert status == 0
    assert "op fwd / cpu: 0.500 -> 0.500 of the baseline (+0%)" in printed.out


def test_a_planted_regression_fails_and_is_named(run_main):
    new = made_up_run()
    new["groups"]["op bwd"]["contenders"]["cpu"]["median_ms"] *= 1.2
    status, printed = run_main(made_up_run(), new)
    assert status == 1
    assert "1 regressed by more than 15%" in printed.out
    assert "  op bwd / cpu: 0.500 -> 0.600 of the baseline (+20%)" in printed.out
    assert "  op fwd" not in printed.out
    assert run_main(made_up_run(), new, "--tolerance", "0.25")[0] == 0


def test_a_noisy_run_says_so(run_main):
    new = made_up_run()
    new["groups"]["op bwd"]["contenders"]["reference"]["q3_ms"] *= 2
    status, printed = run_main(made_up_run(), new)
    assert status == 0
    assert printed.out.count("noisy") == 1


def test_a_slower_machine_is_no_regression(run_main):
    assert run_main(made_up_run(), made_up_run(ours_ms=500.0, baseline_ms=1000.0))[0] == 0


def test_a_contender_that_is_gone_or_refused_fails(run_main):
    new = made_up_run()
    del new["groups"]["op fwd"]
    del new["groups"]["op bwd"]["contenders"]["cpu"]
    new["groups"]["op bwd"]["refused"]["cpu"] = "ToleranceError: tokens"
    status, printed = run_main(made_up_run(), new)
    assert status == 1
    assert "op fwd / cpu: gone (not timed)" in printed.out
    assert "op bwd / cpu: gone (ToleranceError: tokens)" in printed.out


@pytest.mark.parametrize(("key", "value"), [("short", True), ("device", "cuda")])
def test_runs_of_different_kinds_are_not_compared(run_main, key, value):
    status, printed = run_main(made_up_run(), {**made_up_run(), key: value})
    assert status == 2
    assert "cannot compare" in printed.err


def test_nothing_to_compare_is_an_error(run_main):
    assert run_main({**made_up_run(), "groups": {}}, made_up_run())[0] == 2


def test_record_rates_against_roof_baseline_and_best_peer():
    group = made_up_run()["groups"]["op fwd"]
    ours = group["contenders"]["cpu"]
    assert group["strongest_peer"] == "packed"  # a bound is not a peer
    assert ours["gflops"] == pytest.approx(20.0)
    assert ours["percent_of_roof"] == pytest.approx(20.0)
    assert ours["vs_baseline"] == pytest.approx(2.0)
    assert ours["vs_peer"] == pytest.approx(1.0)


def test_saved_as_json_and_markdown(tmp_path):
    run = made_up_run()
    data, page = results.save(run, tmp_path)
    assert json.loads(data.read_text()) == run
    assert data.stem == page.stem
    assert run["date"] in data.stem
    assert "| cpu * | 50.0 |" in page.read_text()
    assert "cpu *" in results.table(run)
