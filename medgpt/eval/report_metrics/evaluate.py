"""All metrics of a set of reports: which annotations they take, and what empty reports get.

An empty or missing generation is the empty report everywhere: no entity, no label, no word. It
scores 0 in every similarity, so RadCliQ-v1 is 2.4501 there, and it is never left out. A text whose
annotation the cache lacks is an error, not a lower score.
"""

import numpy as np

from medgpt.eval.report_metrics import cache as store
from medgpt.eval.report_metrics.chexbert import LABELS, chexbert_scores, label_matrix, sembscore
from medgpt.eval.report_metrics.radcliq import BERTSCORE_PARAMS, RANGE, radcliq_v1
from medgpt.eval.report_metrics.radgraph import EMPTY, radgraph_scores
from medgpt.eval.report_metrics.ratescore import ratescore
from medgpt.eval.report_metrics.reports import Reports
from medgpt.eval.report_metrics.scores import Score, mean_score
from medgpt.eval.report_metrics.text import text_scores
from medgpt.eval.report_metrics.values import decode_embedding

FAMILIES = ("text", "radgraph", "chexbert", "bertscore", "radcliq", "ratescore")


class MissingAnnotations(ValueError):
    """The cache lacks annotations of some texts; the message has counts and hashes alone."""


def lookup(annotations: store.Annotations, keys) -> list:
    """Values of keys, None for a None.

    Raises:
        MissingAnnotations: keys that the cache lacks.
    """
    lacking = sorted({key for key in keys if key is not None and key not in annotations})
    if lacking:
        shown = ", ".join(key[:12] for key in lacking[:3])
        raise MissingAnnotations(
            f"{annotations.label}: expected annotations of {len(set(keys) - {None})} texts, "
            f"got none of {len(lacking)} ({shown}...); run `medgpt eval annotate`"
        )
    return [None if key is None else annotations[key] for key in keys]


def text_keys(reports: Reports):
    """Keys [N] of references and of generations, None for an empty one."""
    said = [store.text_key(text) if text else None for text in reports.generated]
    return [store.text_key(text) for text in reports.references], said


def text_annotations(reports: Reports, annotations):
    """Values [N] of references and of generations, None for an empty one."""
    meant, said = text_keys(reports)
    found = lookup(annotations, meant + said)
    return found[: len(meant)], found[len(meant) :]


def pair_keys(reports: Reports) -> list:
    """Keys [N] of pairs, None where the generation is empty."""
    pairs = zip(reports.references, reports.generated, strict=True)
    return [store.pair_key(meant, said) if said else None for meant, said in pairs]


def radgraph_family(reports: Reports, annotations, casing="lower") -> list[Score]:
    meant, said = text_annotations(reports, annotations)
    said = [EMPTY if graph is None else graph for graph in said]
    return radgraph_scores(meant, said, annotations.label, casing)


def chexbert_labels(reports: Reports, annotations):
    """Labels fp64 [N, 14] of references and generations; nan rows for empty generations."""
    blank = [None] * len(LABELS)
    sides = text_annotations(reports, annotations)
    return tuple(label_matrix(blank if v is None else v["labels"] for v in side) for side in sides)


def chexbert_family(reports: Reports, annotations, uncertain="positive") -> list[Score]:
    scores = chexbert_scores(*chexbert_labels(reports, annotations), annotations.label, uncertain)
    meant, said = text_annotations(reports, annotations)
    meant = np.stack([decode_embedding(value["embedding"]) for value in meant])
    said = [
        np.zeros(meant.shape[1]) if v is None else decode_embedding(v["embedding"]) for v in said
    ]
    return [*scores, sembscore(meant, np.stack(said), annotations.label)]


def bertscore_family(reports: Reports, annotations) -> list[Score]:
    found = lookup(annotations, pair_keys(reports))
    columns = {
        name: [0.0 if value is None else value[name] for value in found]
        for name in ("f1", "precision", "recall")
    }
    settings = ", ".join(f"{name} {annotations.params.get(name)}" for name in BERTSCORE_PARAMS)
    extra = {f"bertscore_{name}": columns[name] for name in ("precision", "recall")}
    variant = f"BERTScore F1; {settings}; {annotations.label}"
    low = -np.inf if annotations.params.get("rescale_with_baseline") else 0.0
    return [mean_score("bertscore", variant, columns["f1"], extra=extra, range=(low, 1.0))]


def radcliq_family(radgraph: Score, bertscore: Score, semb: Score, params: dict) -> Score:
    """RadCliQ-v1 of three scores; params: of the BERTScore annotations.

    Raises:
        ValueError: a BERTScore that is not RadCliQ's.
    """
    got = {name: params.get(name) for name in BERTSCORE_PARAMS}
    if got != BERTSCORE_PARAMS:
        raise ValueError(f"radcliq_v1: expected a BERTScore of {BERTSCORE_PARAMS}, got {got}")
    values = radcliq_v1(radgraph.parts[:, 0], bertscore.parts[:, 0], semb.parts[:, 0])
    inputs = "; ".join(score.variant for score in (radgraph, bertscore, semb))
    return mean_score(
        "radcliq_v1", f"RadCliQ-v1 y, of {inputs}", values, better="lower", range=RANGE
    )


def ratescore_family(reports: Reports, annotations) -> list[Score]:
    """Of cached values of pairs, or of cached entities with the affinity matrix in their params."""
    if annotations.kind == "ratescore":
        found = [v and v["score"] for v in lookup(annotations, pair_keys(reports))]
    else:
        sides = [[_entities(v) for v in side] for side in text_annotations(reports, annotations)]
        affinity = annotations.params.get("affinity")
        if not isinstance(affinity, dict):
            raise ValueError(f"{annotations.label}: expected an affinity matrix, got none")
        pairs = zip(*sides, strict=True)
        found = [said and ratescore(meant, said, affinity) for meant, said in pairs]
    values = [0.0 if value is None else value for value in found]
    return [mean_score("ratescore", f"RaTEScore; {annotations.label}", values)]


def _entities(value):
    """Types and embeddings [E, D] of a cached value; None of None."""
    if value is None:
        return None
    vectors = [decode_embedding(text) for text in value["embeddings"]]
    types = [kind for _, kind in value["entities"]]
    return types, np.stack(vectors) if vectors else np.zeros((0, 1))


def open_annotations(folder, kind: str, name: str | None) -> store.Annotations:
    """The annotator asked for, or the only one there is.

    Raises:
        MissingAnnotations: none.
        ValueError: several and none asked for.
    """
    names = store.annotators(folder, kind)
    if name is None and len(names) != 1:
        if not names:
            raise MissingAnnotations(f"{kind}: expected annotations in the cache, got none")
        raise ValueError(f"{kind}: expected one of {', '.join(names)} to be named, got none")
    return store.read(folder, kind, name or names[0])


def score_reports(
    reports: Reports,
    folder=None,
    families=None,
    annotators=None,
    casing="lower",
    uncertain="positive",
) -> tuple[list[Score], dict]:
    """Scores of a set of reports.

    Args:
        reports: N of them.
        folder: annotation cache; None: "text" alone.
        families: of FAMILIES; default those that the cache has all annotations of.
        annotators: {kind: name} where the cache holds several; {"radcliq.KIND": name} for
            RadCliQ's alone.
        casing, uncertain: of the RadGraph levels and of CheXbert F1.

    Returns:
        Scores, and {family: why not} for what was not asked for and could not be had.

    Raises:
        MissingAnnotations: a family asked for by name lacks some.
    """
    unknown = set(families or ()) - set(FAMILIES)
    if unknown:
        raise ValueError(f"metrics: expected of {', '.join(FAMILIES)}, got {sorted(unknown)}")
    found, absent = {}, {}
    for family in FAMILIES:
        if families is not None and family not in families:
            continue
        try:
            found[family] = _family(family, reports, folder, annotators or {}, casing, uncertain)
        except MissingAnnotations as error:
            if families is not None:
                raise
            absent[family] = str(error)
    return [score for scores in found.values() for score in scores], absent


def _family(family, reports, folder, annotators, casing, uncertain) -> list[Score]:
    if family == "text":
        return text_scores(reports.references, reports.generated)
    if folder is None:
        raise MissingAnnotations(f"{family}: expected an annotation cache, got none")

    def have(kind):
        return open_annotations(folder, kind, annotators.get(kind))

    if family == "radgraph":
        return radgraph_family(reports, have("radgraph"), casing)
    if family == "chexbert":
        return chexbert_family(reports, have("chexbert"), uncertain)
    if family == "bertscore":
        return bertscore_family(reports, have("bertscore"))
    if family == "ratescore":
        kind = "ratescore" if store.annotators(folder, "ratescore") else "ratescore_entities"
        return ratescore_family(reports, have(kind))
    annotators = {
        kind: annotators.get(f"radcliq.{kind}", annotators.get(kind))
        for kind in ("radgraph", "chexbert", "bertscore")
    }
    bert = have("bertscore")
    radgraph = radgraph_family(reports, have("radgraph"))[0]
    semb = chexbert_family(reports, have("chexbert"))[-1]
    return [radcliq_family(radgraph, bertscore_family(reports, bert)[0], semb, bert.params)]
