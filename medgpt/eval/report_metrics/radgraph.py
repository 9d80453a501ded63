"""F1 between RadGraph annotations, four variants that are not the same number.

    radgraph_radcliq   mean of the F1 of entity sets {(tokens, label)} and of relation sets
                       {(source, target, relation)}, source and target (tokens, label);
                       case-sensitive: RadCliQ's "RadGraph" (Yu et al., Patterns 2023,
                       rajpurkarlab/CXR-Report-Metric, radgraph_evaluate_model.py)
    radgraph_simple    {(tokens, label)}
    radgraph_partial   {(tokens, label, whether it starts a relation)}
    radgraph_complete  {(tokens, label, relation, target's tokens)} a relation, {(tokens, label)}
                       of entities that start none

The last three are RG_E, RG_ER-bar and RG_ER of Delbrouck et al. (Findings of EMNLP 2022), which
the package `radgraph` calls reward levels. They are lower-cased here; radgraph 0.1.18 itself lowers
only the relation tuples of `complete` (casing="package"), which is the same on lower-case text.
Sets: what is said twice counts once. An empty set on either side gives 0, also on both.
"""

import numpy as np

from medgpt.eval.report_metrics.scores import Score, mean_score

LEVELS = ("simple", "partial", "complete")
CASINGS = ("lower", "package")
EMPTY = {"entities": {}}


def precision_recall_f1(reference: set, generated: set) -> tuple[float, float, float]:
    """Of two sets: precision over `generated`, recall over `reference`; 0 where one is empty."""
    hits = len(reference & generated)
    if not hits:
        return 0.0, 0.0, 0.0
    precision, recall = hits / len(generated), hits / len(reference)
    return precision, recall, 2 * precision * recall / (precision + recall)


def radcliq_sets(graph: dict) -> tuple[set, set]:
    """Entities and relations of a graph as RadCliQ compares them."""
    entities = graph["entities"]
    pairs = {at: (entity["tokens"], entity["label"]) for at, entity in entities.items()}
    relations = {
        (pairs[at], pairs[target], name)
        for at, entity in entities.items()
        for name, target in entity["relations"]
    }
    return set(pairs.values()), relations


def level_set(graph: dict, level: str, casing: str = "lower") -> set:
    """What one of LEVELS compares of a graph.

    Args:
        graph: {"entities": {id: {"tokens", "label", "relations": [[name, target id]]}}}.
        level: one of LEVELS.
        casing: "lower" all tokens, or as the "package" does.
    """
    if level not in LEVELS or casing not in CASINGS:
        expected = f"a level of {LEVELS} and a casing of {CASINGS}"
        raise ValueError(f"radgraph: expected {expected}, got {level!r}, {casing!r}")
    entities = graph["entities"]
    plain = str.lower if casing == "lower" else str
    found = set()
    for entity in entities.values():
        alone = (plain(entity["tokens"]), entity["label"])
        if level == "simple" or not entity["relations"]:
            found.add(alone)
        elif level == "partial":
            found.add((*alone, True))
        else:
            source = (entity["tokens"].lower(), entity["label"])
            for name, target in entity["relations"]:
                found.add((*source, name, entities[target]["tokens"].lower()))
    return found


def radcliq_f1(reference: dict, generated: dict) -> tuple[float, float, float]:
    """Mean of the two F1, the entities' F1, the relations' F1."""
    pairs = zip(radcliq_sets(reference), radcliq_sets(generated), strict=True)
    entity, relation = (precision_recall_f1(*pair)[2] for pair in pairs)
    return (entity + relation) / 2, entity, relation


def radgraph_scores(references, generated, annotator: str, casing: str = "lower") -> list[Score]:
    """The four variants over N pairs of graphs; EMPTY stands for an empty report."""
    pairs = list(zip(references, generated, strict=True))
    combined = np.array([radcliq_f1(*pair) for pair in pairs]).reshape(-1, 3)
    scores = [
        mean_score(
            "radgraph_radcliq",
            f"RadCliQ's: mean of entity F1 and relation F1, case-sensitive sets; {annotator}",
            combined[:, 0],
            extra={"radgraph_entity": combined[:, 1], "radgraph_relation": combined[:, 2]},
        )
    ]
    for level in LEVELS:
        rows = [
            precision_recall_f1(*(level_set(graph, level, casing) for graph in pair))
            for pair in pairs
        ]
        precision, recall, f1 = np.array(rows).reshape(-1, 3).T
        name = f"radgraph_{level}"
        scores.append(
            mean_score(
                name,
                f"F1-RadGraph {level}, {casing} casing; {annotator}",
                f1,
                extra={f"{name}_precision": precision, f"{name}_recall": recall},
            )
        )
    return scores
