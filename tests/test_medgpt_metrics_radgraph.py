"""RadGraph variants, RadCliQ-v1 and RaTEScore on graphs and entities worked by hand."""

import numpy as np
import pytest

from medgpt.eval.report_metrics import radcliq
from medgpt.eval.report_metrics.radgraph import (
    EMPTY,
    LEVELS,
    level_set,
    precision_recall_f1,
    radcliq_f1,
    radcliq_sets,
    radgraph_scores,
)
from medgpt.eval.report_metrics.ratescore import ratescore

ANAT = "Anatomy::definitely present"
YES, NO = "Observation::definitely present", "Observation::definitely absent"


def graph(*entities):
    """Of (tokens, label, (relation, target number)...)."""
    rows = {
        str(at): {"tokens": tokens, "label": label, "relations": [[n, str(to)] for n, to in rels]}
        for at, (tokens, label, *rels) in enumerate(entities, 1)
    }
    return {"entities": rows}


REFERENCE = graph(("Lungs", ANAT), ("clear", YES, ("located_at", 1)), ("effusion", NO))
OTHER_CASE = graph(("lungs", ANAT), ("clear", YES, ("located_at", 1)), ("effusion", YES))


def levels(reference, generated, casing="lower"):
    sets = ((level_set(reference, n, casing), level_set(generated, n, casing)) for n in LEVELS)
    return [precision_recall_f1(*pair)[2] for pair in sets]


def test_the_sets_of_each_variant():
    assert radcliq_sets(REFERENCE) == (
        {("Lungs", ANAT), ("clear", YES), ("effusion", NO)},
        {(("clear", YES), ("Lungs", ANAT), "located_at")},
    )
    assert level_set(REFERENCE, "simple") == {("lungs", ANAT), ("clear", YES), ("effusion", NO)}
    assert level_set(REFERENCE, "partial") == {
        ("lungs", ANAT),
        ("clear", YES, True),
        ("effusion", NO),
    }
    assert level_set(REFERENCE, "complete") == {
        ("lungs", ANAT),
        ("clear", YES, "located_at", "lungs"),
        ("effusion", NO),
    }
    assert level_set(REFERENCE, "complete", "package") == {
        ("Lungs", ANAT),
        ("clear", YES, "located_at", "lungs"),
        ("effusion", NO),
    }


def test_case_counts_for_radcliq_alone():
    # entities: 1 of 3 both ways; relations: none; mean of 1/3 and 0
    assert radcliq_f1(REFERENCE, OTHER_CASE) == pytest.approx((1 / 6, 1 / 3, 0))
    assert levels(REFERENCE, OTHER_CASE) == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert levels(REFERENCE, OTHER_CASE, "package") == pytest.approx([1 / 3, 1 / 3, 2 / 6])


def test_relations_tell_the_variants_apart():
    reference = graph(("opacity", YES, ("located_at", 2)), ("base", ANAT), ("apex", ANAT))
    elsewhere = graph(("opacity", YES, ("located_at", 3)), ("base", ANAT), ("apex", ANAT))
    nowhere = graph(("opacity", YES), ("base", ANAT), ("apex", ANAT))
    assert levels(reference, elsewhere) == pytest.approx([1, 1, 2 / 3])
    assert levels(reference, nowhere) == pytest.approx([1, 2 / 3, 2 / 3])
    assert radcliq_f1(reference, elsewhere) == (0.5, 1, 0)
    assert radcliq_f1(reference, reference) == (1, 1, 1)
    renamed = graph(("opacity", YES, ("modify", 2)), ("base", ANAT), ("apex", ANAT))
    assert levels(reference, renamed) == pytest.approx([1, 1, 2 / 3])
    assert radcliq_f1(reference, renamed)[2] == 0


def test_two_relations_of_one_entity_count_twice_in_complete_alone():
    two = graph(("line", YES, ("located_at", 2), ("modify", 2)), ("svc", ANAT))
    one = graph(("line", YES, ("located_at", 2)), ("svc", ANAT))
    # complete: sets of 3 and 2, 2 shared; relations: sets of 2 and 1, 1 shared
    assert levels(two, one) == pytest.approx([1, 1, 0.8])
    assert radcliq_f1(two, one) == pytest.approx(((1 + 2 / 3) / 2, 1, 2 / 3))


def test_what_is_said_twice_counts_once():
    twice = graph(("effusion", NO), ("effusion", NO), ("effusion", NO))
    assert levels(twice, graph(("effusion", NO))) == [1, 1, 1]


def test_empty_graphs_give_zero_even_against_each_other():
    for pair in ((EMPTY, EMPTY), (REFERENCE, EMPTY), (EMPTY, REFERENCE)):
        assert radcliq_f1(*pair) == (0, 0, 0)
        assert levels(*pair) == [0, 0, 0]
    # entities without relations: RadCliQ's mean cannot pass one half
    alone = graph(("effusion", NO))
    assert radcliq_f1(alone, alone) == (0.5, 1, 0)


def test_swapped_precision_and_recall_are_noticed():
    part = graph(("lungs", ANAT))
    scores = {s.name: s for s in radgraph_scores([REFERENCE], [part], "radgraph.x")}
    simple = scores["radgraph_simple"]
    assert simple.columns == (
        "radgraph_simple",
        "radgraph_simple_precision",
        "radgraph_simple_recall",
    )
    assert simple.parts[0] == pytest.approx([0.5, 1, 1 / 3])
    swapped = radgraph_scores([part], [REFERENCE], "radgraph.x")[1].parts[0]
    assert swapped == pytest.approx([0.5, 1 / 3, 1])
    assert not np.allclose(simple.parts[0], swapped)


def test_every_score_names_its_variant_and_means_over_reports():
    references, generated = [REFERENCE, REFERENCE], [OTHER_CASE, EMPTY]
    scores = radgraph_scores(references, generated, "radgraph.radgraph-xl")
    assert [s.name for s in scores] == ["radgraph_radcliq", *(f"radgraph_{n}" for n in LEVELS)]
    assert [s.value for s in scores] == pytest.approx([1 / 12, 1 / 3, 1 / 3, 1 / 3])
    assert all("radgraph.radgraph-xl" in s.variant for s in scores)
    assert scores[0].columns[1:] == ("radgraph_entity", "radgraph_relation")


def test_unknown_levels_are_refused():
    for args in (("all",), ("simple", "upper")):
        with pytest.raises(ValueError, match="radgraph: expected"):
            level_set(REFERENCE, *args)


# RadCliQ-v1


def test_the_published_linear_form_within_a_millionth():
    inputs = np.random.default_rng(0).uniform(-1, 1, size=(4, 10000))
    z = radcliq.radcliq_v1(*inputs)
    assert np.abs(z - radcliq.radcliq_v1_linear(*inputs[:3])).max() < 1e-6
    # facts: y = 2.4501430833 - 1.2452163302 R - 1.6508453287 B - 0.9947717072 S
    r, b, s, _ = inputs
    by_hand = 2.4501430833 - 1.2452163302 * r - 1.6508453287 * b - 0.9947717072 * s
    assert np.abs(z - by_hand).max() < 1e-6
    # negative control: inputs in another order are far off
    assert np.abs(radcliq.radcliq_v1(b, r, s) - by_hand).max() > 0.1


def test_the_range_and_bleu_2():
    assert radcliq.radcliq_v1(0, 0, 0) == pytest.approx(radcliq.RANGE[1], abs=1e-6)
    assert radcliq.radcliq_v1(1, 1, 1) == pytest.approx(radcliq.RANGE[0], abs=1e-6)
    assert abs(radcliq.radcliq_v1(0, 0, 0, 1) - radcliq.radcliq_v1(0, 0, 0, 0)) < 1e-10


def test_the_inverse_is_of_the_mean():
    y = np.array([1.0, 1.49])
    assert radcliq.inverse(y.mean()) == pytest.approx(0.8032128514)
    assert radcliq.inverse(1.245) == pytest.approx(0.803, abs=5e-4)
    assert radcliq.inverse(y.mean()) != pytest.approx((1 / y).mean(), abs=1e-3)
    assert np.isnan(radcliq.inverse(0.0))
    assert radcliq.inverse_interval(0.5, 2.0) == (0.5, 2.0)
    assert radcliq.inverse_interval(1.0, 4.0) == (0.25, 1.0)
    assert radcliq.inverse_interval(-4.0, -1.0) == (-1.0, -0.25)
    assert np.isnan(radcliq.inverse_interval(-0.1, 2.0)).all()


# RaTEScore

TYPES = ("ABNORMALITY", "NON-ABNORMALITY", "DISEASE", "NON-DISEASE", "ANATOMY")
EVEN = {f"{a}_{b}".lower(): 1.0 for a in TYPES for b in TYPES} | {"neg_weight": 0.25}
E = np.eye(3)


def test_ratescore_by_hand():
    same = (["DISEASE", "ANATOMY"], E[:2])
    assert ratescore(same, same, EVEN) == pytest.approx(1)
    # reference -> generated: cosines 1 and 0, mean 1/2; back: 1; harmonic mean 2/3
    assert ratescore(same, (["DISEASE"], E[:1]), EVEN) == pytest.approx(2 / 3)
    # the weights of the pairs (disease, disease) and (anatomy, disease) are 3 and 1: 3/4, 1
    heavy = EVEN | {"disease_disease": 3.0}
    assert ratescore(same, (["DISEASE"], E[:1]), heavy) == pytest.approx(2 * 0.75 / 1.75)
    # opposite presence is worth neg_weight in both directions
    for a, b in (("DISEASE", "NON-DISEASE"), ("NON-ABNORMALITY", "DISEASE")):
        assert ratescore(([a], E[:1]), ([b], E[:1]), EVEN) == pytest.approx(0.25)
    assert ratescore((["NON-DISEASE"], E[:1]), (["ANATOMY"], E[:1]), EVEN) == pytest.approx(1)
    # length of an embedding does not count
    assert ratescore(same, (same[0], 5 * E[:2]), EVEN) == pytest.approx(1)
    assert ratescore((["DISEASE"], E[:1]), (["DISEASE"], E[1:2]), EVEN) == 0


def test_a_report_without_entities_is_the_packages_half():
    assert ratescore(([], np.zeros((0, 1))), (["DISEASE"], E[:1]), EVEN) == 0.5


def test_the_affinity_is_of_ordered_pairs():
    lopsided = EVEN | {"disease_anatomy": 5.0}
    one = (["DISEASE", "DISEASE"], np.array([[1.0, 0], [0, 1]]))
    two = (["DISEASE", "ANATOMY"], np.array([[1.0, 0], [0.6, 0.8]]))
    # one -> two: (1 * 1 + 5 * 0.8) / 6 = 5/6; two -> one: (1 + 0.8) / 2 = 0.9
    assert ratescore(one, two, lopsided) == pytest.approx(2 * (5 / 6) * 0.9 / (5 / 6 + 0.9))
