"""Pairs of reports to score, and who they are of.

A line of a file: {"id", "reference", "generated", "patient", "age", "sex", "site", "labels"}; only
id and reference must be there. labels are the image's: {CheXpert finding: 1, 0, -1 or null}.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medgpt.eval.report_metrics.chexbert import LABELS

FACTS = ("patient", "age", "sex", "site")


class Reports(NamedTuple):
    """N reports of a model beside their references.

    Attributes:
        ids: distinct texts.
        references: texts, none of them empty.
        generated: texts; "" where the generation is missing or blank.
        missing, blank: bool [N]: no generation at all; one of white space.
        facts: {"patient" | "age" | "sex" | "site": [N] values, None where unknown}.
        labels: fp64 [N, 14] of the images, rows of nan where `labelled` is False.
        labelled: bool [N].
    """

    ids: list
    references: list
    generated: list
    missing: np.ndarray
    blank: np.ndarray
    facts: dict
    labels: np.ndarray
    labelled: np.ndarray

    @property
    def empty(self) -> np.ndarray:
        return self.missing | self.blank


def read_reports(path) -> Reports:
    """Of a JSONL file; ValueError names the line, never its text."""
    rows = []
    with open(Path(path), encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}:{number}: expected JSON, got another text") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected an object, got another value")
            rows.append(row)
    return make_reports(rows)


def make_reports(rows) -> Reports:
    """Of dicts as in a file.

    Raises:
        ValueError: no rows, an id twice or absent, an empty reference, a generation or a fact of
            the wrong kind, unknown labels.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("reports: expected at least one, got none")
    ids = [row.get("id") for row in rows]
    if not all(isinstance(name, str) and name for name in ids) or len(set(ids)) < len(ids):
        raise ValueError("reports: expected distinct ids, texts, got one absent or twice")
    for name, row in zip(ids, rows, strict=True):
        _check(name, row)
    said = [row.get("generated") for row in rows]
    missing = np.array([text is None for text in said])
    blank = np.array([text is not None and not text.strip() for text in said])
    labels = np.array([_labels(row) for row in rows], dtype=np.float64)
    return Reports(
        ids=ids,
        references=[row["reference"] for row in rows],
        generated=[text if text and text.strip() else "" for text in said],
        missing=missing,
        blank=blank,
        facts={name: [row.get(name) for row in rows] for name in FACTS},
        labels=labels,
        labelled=np.array([row.get("labels") is not None for row in rows]),
    )


def _check(name: str, row: dict) -> None:
    reference, said = row.get("reference"), row.get("generated")
    if not isinstance(reference, str) or not reference.strip():
        raise ValueError(f"report {name}: expected a reference text, got none")
    if said is not None and not isinstance(said, str):
        raise ValueError(f"report {name}: expected generated text or null, got another value")
    age = row.get("age")
    number = isinstance(age, int | float) and not isinstance(age, bool) and math.isfinite(age)
    if age is not None and not (number and age >= 0):
        raise ValueError(f"report {name}: expected an age in years or null, got another value")
    for fact in ("patient", "sex", "site"):
        if not isinstance(row.get(fact), str | int | None):
            raise ValueError(f"report {name}: expected {fact}, a text, got another value")


def _labels(row: dict) -> list:
    labels = row.get("labels")
    if labels is None:
        return [np.nan] * len(LABELS)
    if not isinstance(labels, dict) or set(labels) - set(LABELS):
        raise ValueError(f"report {row['id']}: expected labels of CheXpert's names, got others")
    if not all(value in (1, 0, -1, None) for value in labels.values()):
        raise ValueError(f"report {row['id']}: expected labels of 1, 0, -1 or null, got others")
    values = (labels.get(name) for name in LABELS)
    return [np.nan if value is None else value for value in values]
