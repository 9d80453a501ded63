"""Intervals that cover, tests that keep their level, and scores worked by hand."""

import numpy as np
import pytest
from scipy import stats

from medgpt.eval.statistics import (
    accuracy,
    baselines,
    compare,
    estimate,
    f1_parts,
    holm,
    macro_f1,
    subgroups,
)

RUNS = 1000
# clusters, questions of one on average, accuracy, correlation within one
DESIGNS = [(80, 4, 0.6, 0.3), (150, 1, 0.6, 0.0), (60, 3, 0.85, 0.2)]
FEW = 150  # runs of the bounded part


def error(runs: int) -> float:
    """Three standard deviations of a share of 5 % in so many runs."""
    return 3 * np.sqrt(0.05 * 0.95 / runs)


def one_run(rng, clusters, size, p, rho):
    """Correct or not [N] and clusters [N]; each cluster has its own difficulty."""
    sizes = rng.integers(1, 2 * size, clusters) if size > 1 else np.ones(clusters, int)
    own = rng.beta(p * (1 - rho) / rho, (1 - p) * (1 - rho) / rho, clusters) if rho else p
    index = np.repeat(np.arange(clusters), sizes)
    return (rng.random(len(index)) < np.broadcast_to(own, clusters)[index]).astype(float), index


def covered(design, runs: int, clustered: bool = True, replicates: int = 500) -> float:
    """Share of runs whose 95 % interval holds the truth."""
    rng, inside = np.random.default_rng(0), 0
    for seed in range(runs):
        correct, clusters = one_run(rng, *design)
        found = accuracy(correct, clusters if clustered else None, replicates=replicates, seed=seed)
        inside += found.low <= design[2] <= found.high
    return inside / runs


def rejected(design, runs: int, clustered: bool = True, replicates: int = 300) -> float:
    """Share of p <= 5 % between two runs equally good on average, each better at other clusters."""
    clusters, size, p, _ = design
    rng, found = np.random.default_rng(1), 0
    for seed in range(runs):
        _, index = one_run(rng, clusters, size, 0.5, 0.0)
        taste = rng.normal(0, 0.2, clusters)[index] if size > 1 else 0
        a, b = (rng.random(len(index)) < np.clip(p + s * taste, 0, 1) for s in (1, -1))
        names = index if clustered else None
        found += compare(a, b, names, replicates=replicates, seed=seed).p <= 0.05
    return found / runs


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_cover(design):
    assert 0.93 <= covered(design, RUNS) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_the_paired_test_keeps_its_level(design):
    assert abs(rejected(design, RUNS) - 0.05) <= error(RUNS)


def test_intervals_and_the_paired_test_within_simulation_error():
    """A bounded part of the two above, and both are wrong where clusters are left out."""
    design = DESIGNS[0]
    assert abs(covered(design, FEW) - 0.95) <= error(FEW)
    assert covered(design, FEW, clustered=False, replicates=200) < 0.95 - error(FEW)
    assert abs(rejected(design, FEW) - 0.05) <= error(FEW)
    assert rejected(design, FEW, clustered=False, replicates=200) > 0.05 + error(FEW)


def test_the_paired_test_finds_a_difference():
    rng = np.random.default_rng(2)
    found = 0
    for seed in range(50):
        base, index = one_run(rng, 200, 1, 0.5, 0.0)
        better = np.where(rng.random(len(base)) < 0.25, 1.0, base)
        found += compare(better, base, index, replicates=300, seed=seed).p <= 0.05
    assert found == 50


def test_mcnemar_rejects_as_often_as_its_own_distribution_says():
    """Exact, so below 5 % by a known amount; the theory is a binomial of the discordant pairs."""
    rng, n, rate = np.random.default_rng(3), 60, 0.4
    level = {k: sum(stats.binom.pmf(i, k, 0.5) for i in range(k + 1)
                    if stats.binomtest(i, k).pvalue <= 0.05) for k in range(1, n + 1)}  # fmt: skip
    expected = sum(stats.binom.pmf(k, n, rate) * level[k] for k in level)
    rejected = 0
    for seed in range(RUNS):
        split, coin = rng.random(n) < rate, rng.random(n) < 0.5
        a, b = (split & coin).astype(float), (split & ~coin).astype(float)
        rejected += compare(a, b, None, replicates=2, seed=seed).p_mcnemar <= 0.05
    assert abs(rejected / RUNS - expected) <= error(RUNS)
    assert rejected / RUNS < 0.05 + error(RUNS)


def test_standard_errors_by_hand():
    correct, clusters = [1, 1, 0, 0, 1, 0], list("aabbcd")
    found = accuracy(correct, clusters)
    # means without a, b, c, d in turn
    left_out = np.array([1 / 4, 3 / 4, 2 / 5, 3 / 5])
    assert found.value == 0.5
    assert found.se == pytest.approx(np.sqrt(3 / 4 * np.square(left_out - 0.5).sum()))
    single = accuracy(np.r_[np.ones(30), np.zeros(70)])
    assert single.se == pytest.approx(np.sqrt(0.3 * 0.7 / 99), rel=1e-9)
    assert (found.n, found.clusters) == (6, 4)


def test_same_seed_same_interval():
    correct = np.random.default_rng(0).random(100)
    assert accuracy(correct, seed=5) == accuracy(correct, seed=5)
    assert accuracy(correct, seed=5) != accuracy(correct, seed=6)
    wide, narrow = accuracy(correct, level=0.99), accuracy(correct, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_all_right_is_not_certainty():
    found = accuracy(np.ones(20))
    exact = stats.binomtest(20, 20).proportion_ci(0.95)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    found = accuracy(np.zeros(20))
    assert found.high == pytest.approx(stats.binomtest(0, 20).proportion_ci(0.95).high)
    ties = compare(np.ones(20), np.ones(20))
    assert (ties.difference.low, ties.difference.high) == (-found.high, found.high)
    assert (ties.p, ties.p_mcnemar) == (1.0, 1.0)
    assert np.isnan(accuracy([1.0]).low)
    assert np.isnan(accuracy([]).value)


def test_macro_f1_by_hand():
    gold = ["yes", "yes", "no", "no", "maybe"]
    said = ["yes", None, "no", "yes", "maybe"]
    parts = f1_parts(said, gold, ("yes", "no", "maybe"))
    # yes: tp 1 fp 1 fn 1; no: tp 1 fp 0 fn 1; maybe: tp 1
    assert macro_f1(parts.sum(0)) == pytest.approx((0.5 + 2 / 3 + 1) / 3)
    # precision and recall are no mirror images here: swapping prediction and gold keeps F1 only
    # where nothing is unparsed
    dropped = f1_parts(said[:1] + said[2:], gold[:1] + gold[2:], ("yes", "no", "maybe"))
    assert macro_f1(dropped.sum(0)) > macro_f1(parts.sum(0))
    assert estimate(parts, macro_f1).value == pytest.approx((0.5 + 2 / 3 + 1) / 3)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_subgroups_and_baselines():
    groups = [{"organ": "lung"}, {"organ": "heart"}, {"organ": "lung", "sex": "F"}, {}]
    table = subgroups([1, 0, 0, 1], None, groups)
    assert {k: v.value for k, v in table["organ"].items()} == {"heart": 0.0, "lung": 0.5}
    assert table["sex"]["F"].n == 1
    found = baselines(["A", "A", "B", "C"], ["A", "A", "A", None], [4, 4, 5, 10])
    assert found["majority"] == 0.5
    assert found["majority_answer"] == "A"
    assert found["chance"] == pytest.approx((0.25 + 0.25 + 0.2 + 0.1) / 4)
    assert found["position_bias"] == 0.5
    assert baselines(["A", "B"], ["A", "B"], [2, 2])["position_bias"] == 0


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="same questions"):
        compare([1, 0], [1])
    with pytest.raises(ValueError, match="expected 2 clusters, got 3"):
        accuracy([1, 0], "abc")
