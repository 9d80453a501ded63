"""What an answer is worth, and the numbers of a task: one record a question, none left out."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from medgpt.eval.answers import Answer, final_text, normal, parse_choice, parse_label
from medgpt.eval.questions import Question
from medgpt.eval.statistics import (
    accuracy,
    baselines,
    estimate,
    f1_parts,
    macro_f1,
    subgroups,
)

YES_NO = ("yes", "no")
_TOKEN = re.compile(r"[\u4e00-\u9fff]|[^\W_]+")
_LEAD = re.compile(r"\A\W*(?:the )?(?:final |correct )?answer(?: is|:)+\s*", re.I)


def tokens(text: str) -> Counter:
    """Words in lower case; each Chinese character is one."""
    return Counter(_TOKEN.findall(normal(text)))


def token_scores(said: str, gold: str) -> tuple[float, float]:
    """Recall (share of the gold's tokens that were said) and F1, both as multisets."""
    a, b = tokens(said), tokens(gold)
    shared = sum((a & b).values())
    if not shared:
        return 0.0, 0.0
    recall, precision = shared / sum(b.values()), shared / sum(a.values())
    return recall, 2 * precision * recall / (precision + recall)


def read_answer(question: Question, completion: str) -> Answer:
    """What a completion says, by the kind of its question; None with a reason if nothing."""
    if question.kind == "choice":
        return parse_choice(completion, question.options)
    if question.kind == "label":
        return parse_label(completion, question.labels)
    if question.kind == "closed" and question.answer.casefold() in YES_NO:
        return parse_label(completion, YES_NO)
    text, reason = final_text(completion)
    if reason:
        return Answer(None, reason)
    return Answer(text if question.kind == "report" else _LEAD.sub("", text))


def score(question: Question, completion: str) -> dict:
    """A record: the score in 0..1 and what subgroup tables and reports need; never the texts.

    `said` is a letter or label; free text is left out, so that records hold nothing of a patient.
    """
    answer = read_answer(question, completion)
    free = question.kind in ("open", "report") or (
        question.kind == "closed" and question.answer.casefold() not in YES_NO
    )
    record = {
        "id": question.id,
        "kind": question.kind,
        "score": 0.0,
        "parsed": answer.value is not None,
        "reason": answer.reason,
        "cluster": question.cluster or question.id,
        "groups": dict(question.groups),
        "options": len(question.options) or len(question.labels) or None,
    }
    if not free:
        record |= {"said": answer.value, "gold": question.answer}
    if question.kind == "report":
        return {**record, "score": None}
    if answer.value is not None:
        same = normal(answer.value) == normal(question.answer)
        record["score"] = float(same)
    if question.kind == "open":
        recall, f1 = token_scores(answer.value or "", question.answer)
        record |= {"token_recall": recall, "token_f1": f1}
    return record


def summarize(records: Sequence[dict], *, seed: int = 0, level: float = 0.95) -> dict:
    """Numbers of a task from its records: estimates, baselines, subgroups, unparsed by reason."""
    kwargs = {"seed": seed, "level": level}
    reasons = Counter(r["reason"] for r in records if not r["parsed"])
    summary: dict = {
        "n": len(records),
        "unparsed": sum(reasons.values()),
        "unparsed_reasons": dict(sorted(reasons.items())),
        "metrics": {},
    }
    scored = [r for r in records if r["score"] is not None]
    if not scored:
        return summary
    values, clusters = [r["score"] for r in scored], [r["cluster"] for r in scored]
    metrics = summary["metrics"]
    metrics["accuracy"] = accuracy(values, clusters, **kwargs)._asdict()
    for kind in ("closed", "open"):
        part = [r for r in scored if r["kind"] == kind]
        if not part:
            continue
        own = [r["cluster"] for r in part]
        metrics[f"{kind}_exact"] = accuracy([r["score"] for r in part], own, **kwargs)._asdict()
        for name in ("token_recall", "token_f1"):
            if kind == "open":
                scores = [r[name] for r in part]
                metrics[f"open_{name}"] = accuracy(scores, own, **kwargs)._asdict()
    listed = [r for r in scored if "gold" in r]
    if listed:
        gold, said = [r["gold"] for r in listed], [r["said"] for r in listed]
        labels = sorted(set(gold))
        if any(r["kind"] == "label" for r in listed):
            parts = f1_parts(said, gold, labels)
            own = [r["cluster"] for r in listed]
            metrics["macro_f1"] = estimate(parts, macro_f1, own, **kwargs)._asdict()
        summary["baselines"] = baselines(gold, said, [r["options"] or 2 for r in listed])
    groups = subgroups(values, clusters, [r["groups"] for r in scored], replicates=500, **kwargs)
    summary["subgroups"] = {
        field: {value: found._asdict() for value, found in table.items()}
        for field, table in groups.items()
        if 1 < len(table) <= 60
    }
    return jsonable(summary)


def jsonable(value):
    """Without nan and numpy scalars, which JSON has not: nan becomes None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
