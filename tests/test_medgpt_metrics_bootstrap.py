"""Intervals that cover, clusters that stay together, probes and slices counted by hand."""

import numpy as np
import pytest

from medgpt.eval.report_metrics import probes, slices
from medgpt.eval.report_metrics.bootstrap import bootstrap, cluster_ids, resample
from medgpt.eval.report_metrics.chexbert import LABELS, hits, micro_f1
from medgpt.eval.report_metrics.reports import make_reports
from medgpt.eval.report_metrics.scores import Score, mean_score


def mean_of(values, **kwargs):
    return mean_score("m", "a mean", np.asarray(values, np.float64), **kwargs)


def f1_of(meant, said):
    return Score("f1", "micro", ("tp", "fp", "fn"), hits(meant, said), micro_f1)


def coverage(make, truth, runs=1000, replicates=300):
    """Share of runs whose 95 % interval holds the truth; make(rng) -> score, clusters."""
    held = 0
    for run in range(runs):
        score, clusters = make(np.random.default_rng(run))
        found = bootstrap([score], clusters, replicates=replicates, seed=run)[0]
        held += found.low <= truth <= found.high
    return held / runs


def patients(rng, count=100, each=2):
    """Scores of `each` reports a patient that share the patient's own level."""
    level = rng.normal(size=(count, 1))
    values = 0.5 + 0.1 * (level + rng.normal(size=(count, each)))
    return mean_of(values.ravel()), np.repeat(np.arange(count), each)


def test_intervals_of_a_mean_over_patients_cover():
    assert 0.93 <= coverage(patients, 0.5) <= 0.97


def test_reports_drawn_one_by_one_would_not_cover():
    def alone(rng):
        score, clusters = patients(rng)
        return score, np.arange(len(clusters))

    assert coverage(alone, 0.5, runs=300) < 0.9


def test_intervals_of_a_pooled_f1_cover():
    def make(rng):
        meant = rng.random((100, 5)) < 0.3
        said = np.where(meant, rng.random((100, 5)) < 0.7, rng.random((100, 5)) < 0.1)
        return f1_of(meant, said), np.arange(100)

    # of every label: tp 0.3 * 0.7, fp 0.7 * 0.1, fn 0.3 * 0.3
    truth = 2 * 0.21 / (2 * 0.21 + 0.07 + 0.09)
    assert 0.93 <= coverage(make, truth) <= 0.97


def test_resamples_draw_whole_clusters():
    clusters = cluster_ids(["a", "b", None, "a", None, "b", "b"])
    assert clusters.tolist() == [0, 1, 2, 0, 3, 1, 1]
    weights = np.concatenate(list(resample(clusters, 500, seed=0)))
    assert weights.shape == (500, 7)
    assert (weights[:, 0] == weights[:, 3]).all()
    assert (weights[:, 1] == weights[:, 5]).all()
    assert (weights[:, [0, 1, 2, 4]].sum(1) == 4).all()
    assert (weights[:, 2] != weights[:, 4]).any()
    # a patient named 2 is not the third report without a name
    assert len(set(cluster_ids([2, None, None]).tolist())) == 3


def test_the_seed_fixes_the_interval_and_blocks_do_not_change_it(monkeypatch):
    import medgpt.eval.report_metrics.bootstrap as module

    score, clusters = mean_of(np.random.default_rng(0).normal(size=40)), np.arange(40)
    one = bootstrap([score], clusters, seed=3)
    assert one == bootstrap([score], clusters, seed=3)
    assert one != bootstrap([score], clusters, seed=4)
    monkeypatch.setattr(module, "BLOCK", 40 * 7)
    blocks = bootstrap([score], clusters, seed=3)
    assert blocks[0] == pytest.approx(one[0])


def test_a_value_needs_two_clusters_for_an_interval():
    found = bootstrap([mean_of([1, 0, 1])], np.zeros(3, int))[0]
    assert found.value == pytest.approx(2 / 3)
    assert np.isnan([found.low, found.high]).all()
    with pytest.raises(ValueError, match="bootstrap: expected"):
        bootstrap([mean_of([1.0])], np.zeros(1, int), level=95)


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
    clusters = cluster_ids(reports.facts["patient"])
    found = slices.slice_scores(reports, [score], clusters, "sex", replicates=200)
    one, two = found
    assert (one.group, two.group) == ("F", "M")
    assert one.interval.value == pytest.approx(0.9)
    assert one.gap.value == pytest.approx(0.5)
    assert two.gap.value == pytest.approx(-0.5)
    assert one.gap.low == pytest.approx(0.5)
    assert one.interval.reports == women.sum()
    assert one.interval.clusters == len(set(clusters[women].tolist()))
    assert not one.few
    bands = slices.slice_scores(reports, [score], clusters, "age", replicates=50)
    assert {part.group for part in bands if part.few} == {"0-17", "65-79", "80+", "unknown"}
    whole = slices.slice_scores(reports, [score], clusters, "site", replicates=50)[0]
    assert whole.interval.value == pytest.approx(score.value)
    assert np.isnan(whole.gap.value)


def test_pooled_scores_are_pooled_within_a_slice():
    reports = people(8)
    rng = np.random.default_rng(1)
    meant, said = rng.random((2, 8, 5)) < 0.5
    whole = f1_of(meant, said)
    for name, mask in slices.groups(reports, "age").items():
        alone = f1_of(meant[mask], said[mask]).value
        assert whole.of(mask) == pytest.approx(alone), name
