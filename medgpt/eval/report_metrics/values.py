"""Values of the annotation cache: their checks, and embeddings as text.

radgraph            {"entities": {id: {"tokens", "label", "relations": [[relation, id]]}}}
chexbert            {"labels": [14 of 1 present, 0 absent, -1 uncertain, null blank],
                     "embedding": base64 of fp32 [D]}
ratescore_entities  {"entities": [[text, type]], "embeddings": [base64 of fp32 [D]]}
bertscore           {"precision", "recall", "f1"}, of a pair
ratescore           {"score"}, of a pair
"""

import base64
import binascii
import math

import numpy as np

from medgpt.eval.report_metrics.chexbert import LABELS

RATE_TYPES = ("ABNORMALITY", "NON-ABNORMALITY", "DISEASE", "NON-DISEASE", "ANATOMY")


def encode_embedding(vector) -> str:
    """Base64 of the little-endian fp32 vector [D]."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()


def decode_embedding(text: str) -> np.ndarray:
    """fp64 [D]; ValueError where text is none of encode_embedding's."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("embedding: expected base64, got another text") from None
    if not raw or len(raw) % 4:
        raise ValueError(f"embedding: expected fp32 numbers, got {len(raw)} bytes")
    vector = np.frombuffer(raw, dtype="<f4").astype(np.float64)
    if not np.isfinite(vector).all():
        raise ValueError("embedding: expected finite numbers, got others")
    return vector


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"expected {what}, got another value")


def _check_radgraph(value) -> None:
    _expect(isinstance(value, dict) and set(value) == {"entities"}, '{"entities"} alone')
    entities = value["entities"]
    _expect(isinstance(entities, dict), "entities by id")
    for entity in entities.values():
        _expect(isinstance(entity, dict), "entities that are objects")
        names = isinstance(entity.get("tokens"), str) and isinstance(entity.get("label"), str)
        _expect(names, "tokens and label, texts, of each entity")
        relations = entity.get("relations")
        _expect(isinstance(relations, list), "relations of each entity, a list")
        for relation in relations:
            pair = isinstance(relation, list) and len(relation) == 2
            _expect(pair and isinstance(relation[0], str), "relations [name, id]")
            _expect(isinstance(relation[1], str) and relation[1] in entities, "a known target id")


def _check_chexbert(value) -> None:
    _expect(isinstance(value, dict) and set(value) == {"labels", "embedding"}, "labels, embedding")
    labels = value["labels"]
    _expect(isinstance(labels, list) and len(labels) == len(LABELS), f"{len(LABELS)} labels")
    known = all(label is None or (type(label) is int and label in (1, 0, -1)) for label in labels)
    _expect(known, "labels of 1, 0, -1 and null")
    decode_embedding(value["embedding"])


def _check_rate_entities(value) -> None:
    named = isinstance(value, dict) and set(value) == {"entities", "embeddings"}
    _expect(named, "entities, embeddings")
    entities, embeddings = value["entities"], value["embeddings"]
    _expect(isinstance(entities, list) and isinstance(embeddings, list), "two lists")
    _expect(len(entities) == len(embeddings), "one embedding an entity")
    for entity in entities:
        pair = isinstance(entity, list) and len(entity) == 2 and isinstance(entity[0], str)
        _expect(pair and entity[1] in RATE_TYPES, f"[text, one of {', '.join(RATE_TYPES)}]")
    sizes = {decode_embedding(text).size for text in embeddings}
    _expect(len(sizes) <= 1, "embeddings of one size")


def _numbers(*names):
    def check(value) -> None:
        _expect(isinstance(value, dict) and set(value) == set(names), ", ".join(names))
        finite = (
            isinstance(number, int | float)
            and not isinstance(number, bool)
            and math.isfinite(number)
            for number in value.values()
        )
        _expect(all(finite), "finite numbers")

    return check


CHECKS = {
    "radgraph": _check_radgraph,
    "chexbert": _check_chexbert,
    "ratescore_entities": _check_rate_entities,
    "bertscore": _numbers("precision", "recall", "f1"),
    "ratescore": _numbers("score"),
}
