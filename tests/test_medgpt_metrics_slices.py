"""Intervals over patients; probes and slices counted by hand."""

import numpy as np
import pytest

from medgpt.eval.report_metrics import probes, slices
from medgpt.eval.report_metrics.chexbert import LABELS, hits, micro_f1
from medgpt.eval.report_metrics.intervals import cluster_names, gap_estimate, score_estimate
from medgpt.eval.report_metrics.reports import make_reports
from medgpt.eval.report_metrics.scores import Score, mean_score


def mean_of(values, **kwargs):
    return mean_score("m", "a mean", np.asarray(values, np.float64), **kwargs)


def f1_of(meant, said):
    return Score("f1", "micro", ("tp", "fp", "fn"), hits(meant, said), micro_f1)


def patients(rng, count=60, each=3):
    """Scores of `each` reports a patient that share the patient's own level."""
    level = rng.normal(size=(count, 1))
    values = 0.5 + 0.1 * (level + rng.normal(size=(count, each)))
    return mean_of(values.ravel()), np.repeat(np.arange(count), each)


def two_readers(rng, count=60, each=3):
    """F1 of findings that a reader hits in 0.7 and invents in 0.1 of the cases."""
    meant = rng.random((count * each, 5)) < 0.3
    hit, invented = rng.random((2, count * each, 5))
    said = np.where(meant, hit < 0.7, invented < 0.1)
    return f1_of(meant, said), np.repeat(np.arange(count), each)


def coverage(make, truth, runs):
    """Share of runs whose 95 % interval holds the truth; make(rng) -> score, clusters."""
    held = 0
    for run in range(runs):
        score, clusters = make(np.random.default_rng(run))
        found = score_estimate(score, cluster_names(clusters), replicates=1000, seed=run)
        held += found.low <= truth <= found.high
    return held / runs


# of every label: tp 0.3 * 0.7, fp 0.7 * 0.1, fn 0.3 * 0.3
POOLED = 2 * 0.21 / (2 * 0.21 + 0.07 + 0.09)


DESIGNS = [pytest.param(patients, 0.5, id="mean"), pytest.param(two_readers, POOLED, id="F1")]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "truth"), DESIGNS)
def test_intervals_cover(make, truth):
    assert 0.93 <= coverage(make, truth, 1000) <= 0.97


@pytest.mark.parametrize(("make", "truth"), DESIGNS)
def test_intervals_cover_within_simulation_error(make, truth):
    """A bounded part of the above: three standard deviations of a share of 95 % in 100 runs."""
    assert coverage(make, truth, 100) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 100)


def test_an_interval_of_zeros_is_on_the_scores_own_scale():
    names = cluster_names(range(20))
    edge = 1 - 0.025 ** (1 / 20)
    for low, high in ((0.0, 1.0), (0.0, 10.0), (-1.4, 2.4)):
        found = score_estimate(mean_of(np.full(20, low), range=(low, high)), names)
        assert (found.low, found.high) == pytest.approx((low, low + edge * (high - low)))
    found = score_estimate(mean_of(np.full(20, 0.3)), names)
    assert np.isnan([found.low, found.high]).all()


def test_reports_drawn_one_by_one_would_not_cover():
    def alone(rng):
        score, clusters = patients(rng)
        return score, np.arange(len(clusters))

    assert coverage(alone, 0.5, runs=60) < 0.88


def test_clusters_without_a_name_are_their_own():
    names = cluster_names(["a", None, "a", None, 1, "1"])
    assert [len(set(names[:n].tolist())) for n in range(1, 7)] == [1, 2, 2, 3, 4, 4]
    assert len(set(cluster_names(["report 1", None]).tolist())) == 2


def test_the_value_of_an_estimate_is_the_scores():
    score, clusters = two_readers(np.random.default_rng(0))
    mask = np.arange(len(clusters)) % 2 == 0
    names = cluster_names(clusters)
    whole, part = score_estimate(score, names), score_estimate(score, names, mask)
    assert (whole.value, part.value) == pytest.approx((score.value, score.of(mask)))
    assert (whole.n, whole.clusters, part.n, part.clusters) == (180, 60, 90, 60)
    assert whole.low < whole.value < whole.high
    gap = gap_estimate(score, names, mask)
    assert gap.value == pytest.approx(score.of(mask) - score.of(~mask))
    assert gap.low < gap.value < gap.high
    nothing = gap_estimate(score, names, np.ones(180, bool))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


# probes


def labels(**given):
    row = [np.nan] * len(LABELS)
    for name, value in given.items():
        row[LABELS.index(name.replace("_", " "))] = value
    return row


IMAGE = np.array(
    [
        labels(Cardiomegaly=1, Edema=1, Pneumothorax=0, Fracture=-1),
        labels(Pneumonia=1),
        labels(No_Finding=1, Edema=0),
        labels(Support_Devices=1, Edema=1),
    ]
)
SAID = np.array(
    [
        # entailed, denied, contradicted, unclear, unsupported
        labels(Cardiomegaly=1, Edema=0, Pneumothorax=1, Fracture=1, Lung_Lesion=-1),
        labels(No_Finding=1),  # silent, and a false claim
        labels(No_Finding=1, Edema=0),
        labels(),  # an empty report
    ]
)


def test_probes_by_hand():
    found = {score.name: score for score in probes.probe_scores(IMAGE, SAID, "hand")}
    cells = dict(zip(probes.CELLS, found["omission_rate"].parts.sum(0), strict=True))
    assert cells == {
        "entailed": 1,
        "unclear": 1,
        "contradicted": 1,
        "unsupported": 1,
        "stated": 1,
        "denied": 1,
        "silent": 3,
    }
    assert found["hallucination_rate"].value == pytest.approx(2 / 4)
    assert found["contradiction_rate"].value == pytest.approx(1 / 4)
    assert found["omission_rate"].value == pytest.approx(4 / 5)
    assert found["denial_rate"].value == pytest.approx(1 / 5)
    assert found["false_no_finding_rate"].value == pytest.approx(1 / 2)
    assert all(score.better == "lower" for score in found.values())
    table = probes.by_finding(IMAGE, SAID)
    assert table["Edema"] == {
        **dict.fromkeys(probes.CELLS, 0),
        "denied": 1,
        "silent": 1,
    }
    assert "No Finding" not in table


def test_probes_of_an_echo_and_of_silence():
    echo = {s.name: s.value for s in probes.probe_scores(IMAGE, IMAGE, "hand")}
    # the image's own uncertain label is stated, and unclear
    assert (echo["hallucination_rate"], echo["omission_rate"]) == (0, 0)
    silence = {s.name: s for s in probes.probe_scores(IMAGE, np.full_like(IMAGE, np.nan), "hand")}
    assert silence["omission_rate"].value == 1
    assert np.isnan(silence["hallucination_rate"].value)
    # swapped sides are noticed
    swapped = {s.name: s.value for s in probes.probe_scores(SAID, IMAGE, "hand")}
    assert swapped["omission_rate"] != pytest.approx(4 / 5)


# slices


def people(count=40):
    rng = np.random.default_rng(0)
    ages = [17, 18, 39.5, 40, 64, 65, 80, None]
    return make_reports(
        {
            "id": str(at),
            "reference": "a",
            "generated": "b",
            "patient": f"p{at // 2}",
            "age": ages[at % len(ages)],
            "sex": ["F", "M"][rng.integers(2)],
            "site": None,
        }
        for at in range(count)
    )


def test_groups_hold_every_report_once():
    reports = people()
    bands = slices.groups(reports, "age")
    assert list(bands) == ["0-17", "18-39", "40-64", "65-79", "80+", "unknown"]
    assert [mask.sum() for mask in bands.values()] == [5, 10, 10, 5, 5, 5]
    for fact in ("age", "sex", "site"):
        assert (np.sum(list(slices.groups(reports, fact).values()), axis=0) == 1).all()
    assert list(slices.groups(reports, "site")) == ["unknown"]
    with pytest.raises(ValueError, match="slices: expected"):
        slices.groups(reports, "patient")


def test_slices_value_gap_and_counts():
    reports = people()
    women = slices.groups(reports, "sex")["F"]
    score = mean_of(np.where(women, 0.9, 0.4))
    clusters = cluster_names(reports.facts["patient"])
    found = slices.slice_scores(reports, [score], clusters, "sex", replicates=200)
    one, two = found
    assert (one.group, two.group) == ("F", "M")
    assert one.estimate.value == pytest.approx(0.9)
    assert one.gap.value == pytest.approx(0.5)
    assert two.gap.value == pytest.approx(-0.5)
    # nobody moves the gap: no interval, which is not certainty
    assert np.isnan([one.gap.low, one.gap.high]).all()
    assert one.estimate.n == women.sum()
    assert one.estimate.clusters == len(set(clusters[women].tolist()))
    assert not one.few
    bands = slices.slice_scores(reports, [score], clusters, "age", replicates=50)
    assert {part.group for part in bands if part.few} == {"0-17", "65-79", "80+", "unknown"}
    whole = slices.slice_scores(reports, [score], clusters, "site", replicates=50)[0]
    assert whole.estimate.value == pytest.approx(score.value)
    assert np.isnan(whole.gap.value)


def test_pooled_scores_are_pooled_within_a_slice():
    reports = people(8)
    rng = np.random.default_rng(1)
    meant, said = rng.random((2, 8, 5)) < 0.5
    whole = f1_of(meant, said)
    for name, mask in slices.groups(reports, "age").items():
        alone = f1_of(meant[mask], said[mask]).value
        assert whole.of(mask) == pytest.approx(alone), name
