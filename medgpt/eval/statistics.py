"""Uncertainty of scores where questions come in clusters: an image, a patient, a case.

Every score here is a function of sums over questions, so one resampling serves them all.
N questions, C clusters, K parts (what a question adds to the sums), R replicates.

Standard errors: jackknife over clusters, which agrees with the sandwich of Miller, Adding Error
Bars to Evals, 2024. Intervals: BCa over clusters (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 14).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

REPLICATES = 2000
BLOCK = 1 << 22


class Estimate(NamedTuple):
    """A score with its clustered standard error and interval; nan where there is none.

    Attributes:
        value, se, low, high: fractions, not percent.
        n, clusters: how many questions it is of, and in how many clusters.
    """

    value: float
    se: float
    low: float
    high: float
    n: int
    clusters: int


class Comparison(NamedTuple):
    """Run A less run B on the same questions.

    Attributes:
        difference: Estimate of mean(A) - mean(B).
        p: of the studentised paired cluster bootstrap, two-sided.
        p_mcnemar: McNemar's exact test, which takes questions as independent; None where they
            are not, or scores are not 0 or 1.
        a_only, b_only: questions that only one of them has right.
    """

    difference: Estimate
    p: float
    p_mcnemar: float | None
    a_only: int
    b_only: int


def ratio(sums: np.ndarray) -> np.ndarray:
    """First part by second, [..., 2] -> [...]; nan where nothing is counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean over labels of F1 = 2 tp / (2 tp + fp + fn), [..., 3 L] -> [...]; parts of f1_parts."""
    tp, wrong = sums[..., 0::3], sums[..., 1::3] + sums[..., 2::3]
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(2 * tp + wrong > 0, 2 * tp / (2 * tp + wrong), np.nan)
    counted = np.isfinite(f1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counted, f1, 0).sum(-1) / counted.sum(-1)


def f1_parts(predicted: Sequence, gold: Sequence, labels: Sequence) -> np.ndarray:
    """[N, 3 L] true positives, false positives, false negatives of each label in turn.

    A prediction of None (unparsed) is a false negative of its gold label and no one's positive.
    """
    columns = []
    for label in labels:
        said = np.array([p == label for p in predicted], bool)
        true = np.array([g == label for g in gold], bool)
        columns += [said & true, said & ~true, ~said & true]
    return np.stack(columns, axis=1).astype(np.float64).reshape(len(gold), 3 * len(labels))


def cluster_sums(parts: np.ndarray, clusters: Sequence | None) -> np.ndarray:
    """[C, K] parts summed by cluster; each question its own where clusters is None."""
    parts = np.asarray(parts, np.float64)
    if clusters is None:
        return parts
    if len(clusters) != len(parts):
        raise ValueError(f"cluster_sums: expected {len(parts)} clusters, got {len(clusters)}")
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = np.zeros((index.max(initial=-1) + 1, parts.shape[1]))
    np.add.at(sums, index, parts)
    return sums


def _draws(count: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks [r, C]: how often each cluster was drawn."""
    rng = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    step = max(1, BLOCK // count)
    for start in range(0, replicates, step):
        yield rng.multinomial(count, even, size=min(step, replicates - start))


def estimate(
    parts: np.ndarray,
    combine: Callable[[np.ndarray], np.ndarray] = ratio,
    clusters: Sequence | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Estimate:
    """A score of sums with its standard error and BCa interval over clusters.

    Args:
        parts: [N, K].
        combine: sums [..., K] -> score [...].
        clusters: N names.
        bounds: lowest and highest score; (-1, 1) of a difference.
        level, replicates, seed: of the interval.

    Where every cluster says the same (all right, all wrong, all ties) the bootstrap has nothing to
    draw from; the interval is then Clopper and Pearson's with as many trials as clusters, at the
    score's own scale, and none for a score that is not at a bound.
    """
    sums = cluster_sums(parts, clusters)
    count, total = len(sums), sums.sum(0)
    value = float(combine(total)) if count else float("nan")
    nothing = Estimate(value, float("nan"), float("nan"), float("nan"), len(parts), count)
    if count < 2 or not np.isfinite(value):
        return nothing
    left_out = combine(total - sums)
    left_out = left_out[np.isfinite(left_out)]
    spread = left_out.mean() - left_out if len(left_out) else np.zeros(1)
    se = float(np.sqrt((count - 1) / count * np.square(spread).sum()))
    if not np.any(np.abs(spread) > 1e-15):
        low, high = _same_everywhere(value, count, level, bounds)
        return nothing._replace(se=0.0, low=low, high=high)
    drawn = np.concatenate([combine(w @ sums) for w in _draws(count, replicates, seed)])
    drawn = drawn[np.isfinite(drawn)]
    below = (np.sum(drawn < value) + 0.5 * np.sum(drawn == value)) / len(drawn)
    bias = stats.norm.ppf(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
    skew = np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5)
    z = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(drawn, stats.norm.cdf(bias + z / (1 - skew * z)))
    return nothing._replace(se=se, low=float(low), high=float(high))


def _same_everywhere(value, count: int, level: float, bounds) -> tuple[float, float]:
    """Bounds of a score that is the same in all of `count` clusters."""
    edge = 1 - ((1 - level) / 2) ** (1 / count)
    lowest, highest = bounds
    reach = edge * (highest - lowest)
    if np.isclose(value, highest, rtol=0, atol=1e-9):
        return highest - reach, highest
    if np.isclose(value, lowest, rtol=0, atol=1e-9):
        return lowest, lowest + reach
    if (lowest, highest) == (-1.0, 1.0) and value == 0:
        return -edge, edge
    return float("nan"), float("nan")


def accuracy(scores: Sequence, clusters: Sequence | None = None, **kwargs) -> Estimate:
    """Mean of N scores in 0..1 with a clustered error; further arguments of estimate."""
    scores = np.asarray(scores, np.float64)
    return estimate(np.stack([scores, np.ones_like(scores)], 1), ratio, clusters, **kwargs)


def compare(
    a: Sequence,
    b: Sequence,
    clusters: Sequence | None = None,
    *,
    level: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Comparison:
    """Two runs on the same N questions, in the same order.

    Args:
        a, b: scores of each question in 0..1.
        clusters: N names; None: every question is its own.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"compare: expected the same questions, got {len(a)} and {len(b)}")
    parts = np.stack([a - b, np.ones_like(a)], 1)
    options = {"level": level, "replicates": replicates, "seed": seed}
    difference = estimate(parts, ratio, clusters, bounds=(-1.0, 1.0), **options)
    p = _bootstrap_p(cluster_sums(parts, clusters), replicates, seed)
    a_only, b_only = int(np.sum((a == 1) & (b == 0))), int(np.sum((a == 0) & (b == 1)))
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    mcnemar = None
    if binary and difference.clusters == difference.n:
        trials = a_only + b_only
        mcnemar = float(stats.binomtest(a_only, trials).pvalue) if trials else 1.0
    return Comparison(difference, p, mcnemar, a_only, b_only)


def _bootstrap_p(sums: np.ndarray, replicates: int, seed: int) -> float:
    """Two-sided p of a mean of zero, by the bootstrap distribution of its t statistic."""
    if len(sums) < 2 or not np.any(sums[:, 0]):
        return 1.0
    products = np.stack([sums[:, 0] ** 2, sums[:, 0] * sums[:, 1], sums[:, 1] ** 2], 1)

    def t(weights: np.ndarray, centre: float) -> np.ndarray:
        total, square = weights @ sums, weights @ products
        mean = total[..., 0] / total[..., 1]
        spread = square[..., 0] - 2 * mean * square[..., 1] + mean**2 * square[..., 2]
        se = np.sqrt(np.maximum(spread, 0)) / total[..., 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(mean == centre, 0.0, np.abs(mean - centre) / se)

    mean = sums[:, 0].sum() / sums[:, 1].sum()
    observed = t(np.ones(len(sums)), 0.0)
    drawn = np.concatenate([t(w, mean) for w in _draws(len(sums), replicates, seed)])
    return float((1 + np.sum(drawn >= observed * (1 - 1e-12))) / (1 + len(drawn)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of several p values."""
    order = np.argsort(p_values)
    adjusted, last = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        last = max(last, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = last
    return adjusted


def subgroups(
    scores: Sequence, clusters: Sequence | None, groups: Sequence[dict], **kwargs
) -> dict[str, dict[str, Estimate]]:
    """{field: {value: Estimate}} for every field that some question has, values by name."""
    scores = np.asarray(scores, np.float64)
    names = np.asarray(range(len(scores)) if clusters is None else clusters, dtype=str)
    table: dict[str, dict[str, Estimate]] = {}
    for field in sorted({field for group in groups for field in group}):
        values = np.array([str(group.get(field, "")) for group in groups])
        table[field] = {
            value: accuracy(scores[values == value], names[values == value], **kwargs)
            for value in sorted(set(values) - {""})
        }
    return table


def baselines(gold: Sequence[str], predicted: Sequence[str | None], options: Sequence[int]) -> dict:
    """What an accuracy must beat, and how the model's letters are spread.

    Args:
        gold, predicted: letters or labels of N questions.
        options: the number of options of each.

    Returns:
        chance: of a uniform guess; majority: always the most frequent gold, and which it is;
        gold_share, predicted_share: {letter: share}, the latter of parsed answers;
        position_bias: total variation distance between them, 0 (none) to 1.
    """
    letters = sorted(set(gold) | {p for p in predicted if p is not None})
    said = [p for p in predicted if p is not None]
    gold_share = {x: sum(g == x for g in gold) / max(len(gold), 1) for x in letters}
    share = {x: sum(p == x for p in said) / max(len(said), 1) for x in letters}
    majority = max(letters, key=lambda x: gold_share[x], default=None)
    distance = sum(abs(gold_share[x] - share[x]) for x in letters) / 2
    return {
        "chance": float(np.mean([1 / n for n in options])) if len(options) else float("nan"),
        "majority": gold_share.get(majority, float("nan")),
        "majority_answer": majority,
        "gold_share": gold_share,
        "predicted_share": share,
        "position_bias": distance if said else float("nan"),
    }
