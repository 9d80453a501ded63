"""RadCliQ-v1: a linear model of RadGraph, BERTScore, SembScore and BLEU-2 per report.

Yu et al., Evaluating progress in automatic chest X-ray radiology report generation, Patterns 2023;
parameters of rajpurkarlab/CXR-Report-Metric's normalizer and composite model. It predicts a number
of errors, z-scored, so lower is better: 2.4501 where all of the inputs are 0, -1.4407 where they
are 1. Inputs: radgraph_radcliq; BERTScore F1 of distilroberta-base, layer 5, rescaled with the
baseline, no idf; SembScore; sentence BLEU-2, whose weight of 4e-12 changes nothing.
"""

import numpy as np

MEANS = np.array([0.5379231241355762, 0.6175725628125001, 0.7647942121140658, 0.44738335396242174])
SCALES = np.array([0.3028258411486429, 0.22430938459304575, 0.2539439110169773, 0.2989271671041838])
WEIGHTS = np.array(
    [-0.37708368261038905, -0.37030009974480316, -0.25261621789593225, 4.315048405024756e-12]
)
INTERCEPT = 2.466552561323256e-10
LINEAR = (2.4501430833, -1.2452163302, -1.6508453287, -0.9947717072)
BERTSCORE_PARAMS = {
    "model": "distilroberta-base",
    "num_layers": 5,
    "rescale_with_baseline": True,
    "idf": False,
}
RANGE = (-1.4406902829, 2.4501430833)


def radcliq_v1(radgraph, bertscore, sembscore, bleu2=0.0) -> np.ndarray:
    """y [N] of the published model, each input z-scored.

    Args:
        radgraph, bertscore, sembscore, bleu2: [N] each, or numbers.
    """
    inputs = np.stack(np.broadcast_arrays(radgraph, bertscore, sembscore, bleu2), axis=-1)
    return (inputs - MEANS) / SCALES @ WEIGHTS + INTERCEPT


def radcliq_v1_linear(radgraph, bertscore, sembscore) -> np.ndarray:
    """y [N] of the closed form, without BLEU-2."""
    constant, a, b, c = LINEAR
    return (
        constant + a * np.asarray(radgraph) + b * np.asarray(bertscore) + c * np.asarray(sembscore)
    )


def inverse(mean_y: float) -> float:
    """1/RadCliQ-v1 as papers report it: 1 / mean(y), not the mean of 1/y; nan at 0.

    Higher is better only while mean(y) > 0; it has a pole at 0, so y belongs beside it.
    """
    return 1 / mean_y if mean_y else float("nan")


def inverse_interval(low: float, high: float) -> tuple[float, float]:
    """Bounds of 1 / y from bounds of y; nan where 0 lies within, for then there are none."""
    if low <= 0 <= high or np.isnan(low) or np.isnan(high):
        return float("nan"), float("nan")
    return 1 / high, 1 / low
