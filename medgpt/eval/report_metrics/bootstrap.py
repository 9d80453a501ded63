"""Bootstrap intervals of scores: whole clusters (patients) are drawn with replacement.

N reports, C clusters, R replicates. Percentile intervals (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13); drawing clusters keeps the reports of one patient together
(Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
"""

from typing import NamedTuple

import numpy as np

from medgpt.eval.report_metrics.scores import Score

BLOCK = 1 << 22


class Interval(NamedTuple):
    """A value with its bounds; nan bounds where fewer than two clusters hold a report of it.

    Attributes:
        value, low, high: estimate and percentile bounds.
        reports, clusters: how many it is of.
    """

    value: float
    low: float
    high: float
    reports: int
    clusters: int


def cluster_ids(names) -> np.ndarray:
    """int64 [N] ids of N cluster names; a None is a cluster of its own."""
    names = [("", at) if name is None else ("name", str(name)) for at, name in enumerate(names)]
    ids = {name: at for at, name in enumerate(dict.fromkeys(names))}
    return np.array([ids[name] for name in names], dtype=np.int64)


def resample(clusters, replicates: int, seed: int):
    """Blocks [r, N] of report weights: how often each report's cluster was drawn."""
    count = int(clusters.max()) + 1
    rng = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    step = max(1, BLOCK // max(count, len(clusters)))
    for start in range(0, replicates, step):
        drawn = rng.multinomial(count, even, size=min(step, replicates - start))
        yield drawn[:, clusters]


def bootstrap(scores, clusters, *, masks=None, replicates=1000, level=0.95, seed=0) -> list:
    """Intervals of every score, all on the same resamples.

    Args:
        scores: S of Score over the same N reports.
        clusters: int64 [N], of cluster_ids.
        masks: bool [M, N] of subsets to give intervals of; default all reports.
        replicates, level, seed: R, coverage, and what fixes the draws.

    Returns:
        [M][S] of Interval, [S] without masks.
    """
    if replicates < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap: expected replicates >= 1, 0 < level < 1, got {level}")
    reports = len(clusters)
    subsets = np.ones((1, reports), bool) if masks is None else np.asarray(masks, bool)
    draws = replicate_values(scores, clusters, subsets, replicates, seed)
    tail = 100 * (1 - level) / 2
    table = [
        [_interval(s, subset, clusters, draws[m, i], tail) for i, s in enumerate(scores)]
        for m, subset in enumerate(subsets)
    ]
    return table[0] if masks is None else table


def replicate_values(scores, clusters, subsets, replicates: int, seed: int) -> np.ndarray:
    """fp64 [M, S, R]: each score of each subset in each resample."""
    blocks = []
    for weights in resample(clusters, replicates, seed):
        blocks.append([[score.of(weights * subset) for score in scores] for subset in subsets])
    return np.concatenate([np.asarray(block, np.float64) for block in blocks], axis=-1)


def _interval(score: Score, subset, clusters, draws, tail: float) -> Interval:
    reports, groups = int(subset.sum()), len(np.unique(clusters[subset]))
    value = score.of(subset) if reports else float("nan")
    draws = draws[np.isfinite(draws)]
    if groups < 2 or not len(draws):
        return Interval(value, float("nan"), float("nan"), reports, groups)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(value, float(low), float(high), reports, groups)
