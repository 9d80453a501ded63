"""Fairness slices: every score per age band, sex and site, with counts and intervals.

N reports. Reports whose fact is unknown are a group "unknown", not left out; the gap of a group is
its value minus that of all other reports, on the same draws of patients.
"""

from typing import NamedTuple

import numpy as np

from medgpt.eval.report_metrics.intervals import gap_estimate, score_estimate
from medgpt.eval.report_metrics.reports import Reports
from medgpt.eval.statistics import Estimate

AGE_BANDS = (18, 40, 65, 80)
FEW_CLUSTERS = 10


class Slice(NamedTuple):
    """One score of one group.

    Attributes:
        fact, group, score: "age", "40-64", the score's name.
        estimate: of the group.
        gap: the group's value minus the rest's; nan where there is no rest.
        few: fewer than FEW_CLUSTERS patients: the interval says little.
    """

    fact: str
    group: str
    score: str
    estimate: Estimate
    gap: Estimate
    few: bool


def age_band(age) -> str:
    """ "0-17", "18-39", "40-64", "65-79" or "80+", of an age in years."""
    edges = (0, *AGE_BANDS)
    at = max(i for i, edge in enumerate(edges) if age >= edge)
    return f"{edges[at]}+" if at == len(AGE_BANDS) else f"{edges[at]}-{edges[at + 1] - 1}"


def groups(reports: Reports, fact: str) -> dict:
    """{group: bool [N]} of a fact, "unknown" last."""
    if fact not in ("age", "sex", "site"):
        raise ValueError(f"slices: expected age, sex or site, got {fact!r}")
    values = reports.facts[fact]
    known = {value for value in values if value is not None}
    order = sorted(known) if fact == "age" else sorted(known, key=str)
    name = age_band if fact == "age" else str
    names = [None if value is None else name(value) for value in values]
    masks = {name(v): np.array([n == name(v) for n in names]) for v in order}
    unknown = np.array([n is None for n in names])
    return {**masks, **({"unknown": unknown} if unknown.any() else {})}


def slice_scores(reports: Reports, scores, clusters, fact: str, **options) -> list[Slice]:
    """Slices of all scores by one fact.

    Args:
        reports, scores: N reports and their scores.
        clusters: [N], of cluster_names.
        fact: "age", "sex" or "site".
        options: level, replicates, seed.
    """
    found = []
    for group, mask in groups(reports, fact).items():
        for score in scores:
            inside = score_estimate(score, clusters, mask, **options)
            gap = gap_estimate(score, clusters, mask, **options)
            few = inside.clusters < FEW_CLUSTERS
            found.append(Slice(fact, group, score.name, inside, gap, few))
    return found
