"""RaTEScore from entities: each finds its nearest in the other report, weighted by their types.

Zhao et al., RaTEScore: A Metric for Radiology Report Generation, EMNLP 2024. E entities with
embeddings [E, D] of the synonym encoder. One direction: entity i of one report finds j, its highest
cosine in the other; the score is sum_i w(t_i, t_j) p(t_i, t_j) cos_ij / sum_i w(t_i, t_j), where w
is the affinity matrix and p the penalty for opposite presence. RaTEScore is the harmonic mean of
both directions, as in the package RaTEScore 0.6.
"""

import numpy as np

from medgpt.eval.report_metrics.scores import ratio

NO_ENTITY = 0.5


def _presence(kind: str) -> int:
    """-1 for what is said not to be, 1 for what is, 0 for anatomy."""
    return 0 if kind == "ANATOMY" else (-1 if kind.startswith("NON-") else 1)


def _direction(types, vectors, other_types, other_vectors, affinity: dict) -> float:
    """Of the entities of one report towards those of the other."""
    unit, other = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors, other_vectors))
    similar = unit @ other.T
    nearest = similar.argmax(1)
    pairs = [(kind, other_types[j]) for kind, j in zip(types, nearest, strict=True)]
    weights = np.array([affinity[f"{a}_{b}".lower()] for a, b in pairs])
    opposite = np.array([_presence(a) * _presence(b) < 0 for a, b in pairs])
    penalty = np.where(opposite, affinity["neg_weight"], 1.0)
    return float(ratio((similar.max(1) * weights * penalty).sum(), weights.sum()))


def ratescore(reference, generated, affinity: dict) -> float:
    """RaTEScore of one pair.

    Args:
        reference, generated: (types: list of E names, embeddings: [E, D]) each.
        affinity: {"disease_anatomy": weight, ...} of every ordered pair of types, and
            "neg_weight": the package's default is its "long" matrix.

    Returns:
        0 to 1 for non-negative cosines; 0.5 where either report has no entity, the package's rule.
        An empty report never comes here: it scores 0.
    """
    if not len(reference[0]) or not len(generated[0]):
        return NO_ENTITY
    one = _direction(*reference, *generated, affinity)
    two = _direction(*generated, *reference, affinity)
    return float(ratio(2 * one * two, one + two))
