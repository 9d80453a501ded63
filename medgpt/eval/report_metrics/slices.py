"""Fairness slices: every score per age band, sex and site, with counts and intervals.

M groups of N reports. Groups whose fact is unknown are shown as "unknown", not left out; the gap of
a group is its value minus that of all other reports, on the same resamples.
"""

from typing import NamedTuple

import numpy as np

from medgpt.eval.report_metrics.bootstrap import Interval, bootstrap, replicate_values
from medgpt.eval.report_metrics.reports import Reports

AGE_BANDS = (18, 40, 65, 80)
FEW_CLUSTERS = 10


class Slice(NamedTuple):
    """One score of one group.

    Attributes:
        fact, group, score: "age", "40-64", the score's name.
        interval: of the group.
        gap: value of the group minus that of the rest, its interval; nan where there is no rest.
        few: fewer than FEW_CLUSTERS patients: the interval says little.
    """

    fact: str
    group: str
    score: str
    interval: Interval
    gap: Interval
    few: bool


def age_band(age) -> str:
    """ "0-17", "18-39", ..., "80+", of whole years begun."""
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
        clusters: int64 [N].
        fact: "age", "sex" or "site".
        options: replicates, level, seed of bootstrap.
    """
    found = groups(reports, fact)
    masks = np.stack(list(found.values()))
    intervals = bootstrap(scores, clusters, masks=masks, **options)
    gaps = _gaps(scores, clusters, masks, **options)
    return [
        Slice(fact, group, score.name, intervals[m][s], gaps[m][s], _few(clusters, masks[m]))
        for m, group in enumerate(found)
        for s, score in enumerate(scores)
    ]


def _few(clusters, mask) -> bool:
    return len(np.unique(clusters[mask])) < FEW_CLUSTERS


def _gaps(scores, clusters, masks, replicates=1000, level=0.95, seed=0) -> list:
    """[M][S] Interval of group minus rest."""
    both = np.concatenate([masks, ~masks])
    inside, outside = np.split(replicate_values(scores, clusters, both, replicates, seed), 2)
    tail = 100 * (1 - level) / 2
    table = []
    for m, mask in enumerate(masks):
        row = []
        for s, score in enumerate(scores):
            draws = inside[m, s] - outside[m, s]
            draws = draws[np.isfinite(draws)]
            value = score.of(mask) - score.of(~mask) if not mask.all() else float("nan")
            low, high = np.percentile(draws, [tail, 100 - tail]) if len(draws) else (np.nan, np.nan)
            row.append(Interval(value, float(low), float(high), int(mask.sum()), 0))
        table.append(row)
    return table
