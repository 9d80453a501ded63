"""Hallucination and omission, from CheXbert labels of a generated report and of the image.

N reports, the 13 findings of CheXpert ("No Finding" is a claim of its own). Labels as in chexbert.
A statement is a finding that the report calls present or uncertain. Against the image's label it is

    entailed      present there too
    unclear       uncertain there: neither right nor wrong
    contradicted  absent there
    unsupported   blank there: nobody labelled it, which label sets made of reports mean as absent

and a finding present in the image is, in the report, stated, denied (called absent) or silent. A
hallucination is contradicted or unsupported, an omission denied or silent. An empty report states
nothing and omits everything.
"""

import numpy as np

from medgpt.eval.report_metrics.chexbert import LABELS
from medgpt.eval.report_metrics.scores import Score, ratio

FINDINGS = LABELS[:-1]
CELLS = ("entailed", "unclear", "contradicted", "unsupported", "stated", "denied", "silent")


def probe_cells(image, generated) -> dict:
    """{cell: bool [N, 13]} of CELLS, from labels [N, 14] of the image and the report."""
    image, generated = (np.asarray(labels)[:, : len(FINDINGS)] for labels in (image, generated))
    says = (generated == 1) | (generated == -1)
    there = image == 1
    return {
        "entailed": says & there,
        "unclear": says & (image == -1),
        "contradicted": says & (image == 0),
        "unsupported": says & np.isnan(image),
        "stated": there & says,
        "denied": there & (generated == 0),
        "silent": there & np.isnan(generated),
    }


def _rate(of, among):
    """Sum of the columns `of` over that of `among`, nan where that is 0."""

    def combine(sums, _reports=None):
        return ratio(sums[..., of].sum(-1), sums[..., among].sum(-1), np.nan)

    return combine


def probe_scores(image, generated, source: str) -> list[Score]:
    """Hallucination and omission rates, and false claims of "No Finding".

    Args:
        image, generated: labels [N, 14]; nan rows for empty reports.
        source: where the image's labels are from.
    """
    cells = probe_cells(image, generated)
    parts = np.column_stack([cells[name].sum(1) for name in CELLS]).astype(np.float64)
    at = {name: [CELLS.index(name)] for name in CELLS}
    wrong = at["contradicted"] + at["unsupported"]
    says = wrong + at["entailed"] + at["unclear"]
    left_out = at["denied"] + at["silent"]
    there = left_out + at["stated"]
    claim = np.asarray(generated)[:, -1] == 1
    abnormal = (np.asarray(image)[:, : len(FINDINGS)] == 1).any(1)
    calls = np.column_stack([claim & abnormal, claim]).astype(np.float64)
    tail = f"against {source}"
    made = [
        ("hallucination_rate", "statements contradicted or unsupported, of all", wrong, says),
        ("contradiction_rate", "statements contradicted, of all", at["contradicted"], says),
        ("omission_rate", "findings denied or silent, of the image's", left_out, there),
        ("denial_rate", "findings called absent, of the image's", at["denied"], there),
    ]
    scores = [
        Score(name, f"{what} {tail}", CELLS, parts, _rate(of, among), better="lower")
        for name, what, of, among in made
    ]
    columns = ("no_finding_wrong", "no_finding_claims")
    what = f"claims of No Finding where the image has one {tail}"
    false_calm = Score(
        "false_no_finding_rate", what, columns, calls, _rate([0], [1]), better="lower"
    )
    return [*scores, false_calm]


def by_finding(image, generated) -> dict:
    """{finding: {cell: count}}, for the table of a report."""
    cells = probe_cells(image, generated)
    return {
        name: {cell: int(found[:, at].sum()) for cell, found in cells.items()}
        for at, name in enumerate(FINDINGS)
    }
