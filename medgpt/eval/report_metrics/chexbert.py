"""CheXbert labels and embeddings: F1 over 14 and 5 findings, SembScore.

N reports, L labels, D embedding size. Labels: 1 present, 0 absent, -1 uncertain, nan blank, in the
order of stanfordmlgroup/CheXbert's constants.py (Smit et al., EMNLP 2020).
"""

import numpy as np

from medgpt.eval.report_metrics.scores import Score, mean_score, ratio

LABELS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
TOP5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
UNCERTAIN = ("positive", "negative")


def label_matrix(rows) -> np.ndarray:
    """fp64 [N, 14], nan for blank, from lists of 1, 0, -1, None."""
    values = [[np.nan if label is None else label for label in row] for row in rows]
    return np.array(values, dtype=np.float64).reshape(-1, len(LABELS))


def positives(labels, uncertain: str = "positive") -> np.ndarray:
    """bool [N, L]: present, or uncertain too ("rrg" mode of f1chexbert, the default)."""
    if uncertain not in UNCERTAIN:
        raise ValueError(f"uncertain: expected one of {UNCERTAIN}, got {uncertain!r}")
    labels = np.asarray(labels)
    return (labels == 1) | ((labels == -1) & (uncertain == "positive"))


def hits(reference, generated) -> np.ndarray:
    """fp64 [N, 3 L]: true positives, false positives, false negatives of bool [N, L] each."""
    cells = (reference & generated, ~reference & generated, reference & ~generated)
    return np.concatenate(cells, axis=-1).astype(np.float64)


def micro_f1(sums, _reports=None) -> np.ndarray:
    """F1 of the pooled hits [..., 3 L]; 0 where nothing is positive."""
    tp, fp, fn = (part.sum(-1) for part in np.split(sums, 3, axis=-1))
    return ratio(2 * tp, 2 * tp + fp + fn)


def macro_f1(sums, _reports=None) -> np.ndarray:
    """Mean over labels of each label's F1; 0 for a label that is positive nowhere."""
    tp, fp, fn = np.split(sums, 3, axis=-1)
    return ratio(2 * tp, 2 * tp + fp + fn).mean(-1)


def chexbert_scores(reference, generated, annotator: str, uncertain="positive") -> list[Score]:
    """Micro and macro F1 over 14 and 5 labels.

    Args:
        reference, generated: label_matrix [N, 14] each; a row of nan for an empty report.
        annotator: of the labels, for the name.
        uncertain: whether -1 is "positive" or "negative".
    """
    scores = []
    for names, tag in ((LABELS, "14"), (TOP5, "5")):
        at = [LABELS.index(name) for name in names]
        pair = (positives(labels[:, at], uncertain) for labels in (reference, generated))
        parts = hits(*pair)
        columns = tuple(f"{cell}:{name}" for cell in ("tp", "fp", "fn") for name in names)
        for kind, combine in (("micro", micro_f1), ("macro", macro_f1)):
            variant = f"CheXbert F1, {tag} labels, {kind}, uncertain is {uncertain}; {annotator}"
            scores.append(Score(f"chexbert_f1_{tag}_{kind}", variant, columns, parts, combine))
    return scores


def cosine(reference, generated) -> np.ndarray:
    """[N] cosines of rows [N, D]; 0 where one of them is zero."""
    dot = np.einsum("nd,nd->n", reference, generated)
    return ratio(dot, np.linalg.norm(reference, axis=1) * np.linalg.norm(generated, axis=1))


def sembscore(reference, generated, annotator: str) -> Score:
    """SembScore: cosine of CheXbert's [CLS] embeddings [N, D]; zeros for an empty report."""
    variant = f"cosine of CheXbert [CLS] embeddings; {annotator}"
    return mean_score("sembscore", variant, cosine(reference, generated), range=(-1.0, 1.0))
