"""Clustered standard errors and intervals of scores, by medgpt.eval.statistics.

N reports; clusters are patients, drawn whole. Intervals are BCa, errors the jackknife's.
"""

import numpy as np

from medgpt.eval.report_metrics.scores import Score
from medgpt.eval.statistics import Estimate, estimate


def cluster_names(names) -> np.ndarray:
    """Texts [N]; a None is a cluster of its own."""
    named = (f"report {at}" if name is None else f"name {name}" for at, name in enumerate(names))
    return np.array(list(named), dtype=str)


def _counted(score: Score, mask) -> np.ndarray:
    """[N, K + 1]: parts and the report itself, zeros outside of mask."""
    return np.column_stack([score.parts, np.ones(len(score.parts))]) * mask[:, None]


def _value(score: Score, sums) -> np.ndarray:
    """Of sums [..., K + 1]; nan where no report was drawn."""
    reports = sums[..., -1]
    return np.where(reports > 0, score.combine(sums[..., :-1], reports), np.nan)


def score_estimate(score: Score, clusters, mask=None, **options) -> Estimate:
    """A score of the reports in mask (default all) with its interval.

    Args:
        score, clusters: of N reports.
        mask: bool [N].
        options: level, replicates, seed of medgpt.eval.statistics.estimate.
    """
    mask = np.ones(len(clusters), bool) if mask is None else mask
    parts = _counted(score, mask)[mask]
    options = {"bounds": score.range, **options}
    return estimate(parts, lambda sums: _value(score, sums), clusters[mask], **options)


def gap_estimate(score: Score, clusters, mask, **options) -> Estimate:
    """The score of mask minus that of all other reports, both on the same draws of clusters."""
    parts = np.column_stack([_counted(score, mask), _counted(score, ~mask)])

    def difference(sums):
        one, rest = np.split(sums, 2, axis=-1)
        return _value(score, one) - _value(score, rest)

    # where no patient moves the gap, there is no interval of it
    return estimate(parts, difference, clusters, bounds=(-np.inf, np.inf), **options)
