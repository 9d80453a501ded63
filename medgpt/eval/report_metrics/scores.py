"""A metric of N reports as sums: what one report adds [K], and how sums become a value.

N reports, K parts, R replicates. Every metric here is a function of sums over reports (a mean,
BLEU's counts, an F1's hits), so the same arrays give the value, its bootstrap intervals, slices
and the per-report table, and no metric can leave a report out.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """One metric of a set of reports.

    Attributes:
        name: of the metric, with its variant: "radgraph_partial".
        variant: the exact definition and annotator, for people.
        columns: names of the K parts.
        parts: fp64 [N, K].
        combine: (sums [..., K], reports [...]) -> [...], nan where it has no value.
        better: "higher" or "lower".
        range: lowest and highest value.
    """

    name: str
    variant: str
    columns: tuple[str, ...]
    parts: np.ndarray
    combine: Callable
    better: str = "higher"
    range: tuple[float, float] = (0.0, 1.0)

    @property
    def value(self) -> float:
        return self.of(np.ones(len(self.parts)))

    def of(self, weights):
        """Value under weights [..., N] of the reports: counts of a resample, or a mask."""
        weights = np.asarray(weights, dtype=np.float64)
        value = self.combine(weights @ self.parts, weights.sum(-1))
        return float(value) if np.ndim(value) == 0 else value


def ratio(numerator, denominator, empty=0.0) -> np.ndarray:
    """numerator / denominator, `empty` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(
        np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    )
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.where(denominator == 0, empty, numerator / safe)


def mean_of_first(sums, reports) -> np.ndarray:
    """Mean over reports of the first part."""
    return ratio(sums[..., 0], reports, np.nan)


def mean_score(name, variant, values, *, extra=None, **kwargs) -> Score:
    """A metric that is the mean of values [N]; extra: {column: [N]} for the table alone."""
    columns = {name: values, **(extra or {})}
    parts = np.column_stack([np.asarray(v, np.float64) for v in columns.values()])
    return Score(name, variant, tuple(columns), parts, mean_of_first, **kwargs)
