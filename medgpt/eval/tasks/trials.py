"""Patients and clinical trials: each criterion (TrialGPT), or a whole trial (TREC CT, SIGIR)."""

from pathlib import Path

from medgpt.eval.prompts import CHOICE
from medgpt.eval.questions import LETTERS, Question, Rejected, field, lettered, optional
from medgpt.eval.sources import Rows, read_rows
from medgpt.eval.tasks import Task

LABELS = {
    "inclusion": ("included", "not included", "not enough information", "not applicable"),
    "exclusion": ("excluded", "not excluded", "not enough information", "not applicable"),
}
QRELS = {
    "trec": ("not relevant", "excluded", "eligible"),
    "sigir": ("would not refer", "would consider referring", "highly likely to refer"),
}


def read_criterion(row, root, number: int) -> Question:
    kind = optional(row, "criterion_type").casefold()
    kind = next((name for name in LABELS if kind.startswith(name)), None)
    if kind is None:
        raise Rejected("a criterion of another type")
    gold = optional(row, "expert_eligibility").casefold()
    if gold not in LABELS[kind]:
        raise Rejected("an eligibility of another type")
    text = (
        f"Patient note:\n{optional(row, 'note')}\n\nTrial: {optional(row, 'trial_title')}\n"
        f"{kind.capitalize()} criterion: {optional(row, 'criterion_text')}\n"
        f"How does the patient stand to this {kind} criterion?"
    )
    return Question(
        id=optional(row, "annotation_id", "id") or str(number),
        kind="choice",
        text=text,
        options=lettered(LABELS[kind]),
        answer=LETTERS[LABELS[kind].index(gold)],
        cluster=optional(row, "patient_id"),
        groups={"criterion": kind, "label": gold},
    )


def read_trial(labels: tuple[str, ...]):
    def read(row, root, number: int) -> Question:
        score = str(field(row, "score")).strip()
        if not score.isdigit() or int(score) >= len(labels):
            raise Rejected("a judgement outside 0, 1, 2")
        title, trial = optional(row, "trial_title"), optional(row, "trial")
        return Question(
            id=f"{row['patient_id']}/{row['trial_id']}",
            kind="choice",
            text=f"Patient note:\n{row['note']}\n\nTrial: {title}\n{trial}\n"
            "How does the patient stand to this trial?",
            options=lettered(labels),
            answer=LETTERS[int(score)],
            cluster=str(row["patient_id"]),
            groups={"label": labels[int(score)]},
        )

    return read


def gather_trials(folder: Path) -> Rows:
    """queries.jsonl {_id, text}, corpus.jsonl {_id, title, text} and qrels/*.tsv as one row a pair.

    The columns of qrels are query-id, corpus-id, score. Pairs whose patient or trial is missing
    are counted by the reader as rows without a note.
    """
    queries = read_rows(folder / "queries.jsonl")
    corpus = read_rows(folder / "corpus.jsonl")
    qrels = read_rows(folder / "qrels")
    notes = {str(row["_id"]): row["text"] for row in queries.rows}
    trials = {str(row["_id"]): row for row in corpus.rows}
    rows = []
    for pair in qrels.rows:
        patient, trial = pair["query-id"], pair["corpus-id"]
        if patient not in notes or trial not in trials:
            raise ValueError(
                "gather_trials: expected every pair's patient and trial, got one without"
            )
        found = trials[trial]
        rows.append(
            {
                "patient_id": patient,
                "trial_id": trial,
                "note": notes[patient],
                "trial_title": found.get("title", ""),
                "trial": found.get("text", ""),
                "score": pair["score"],
            }
        )
    files = [f for part in (queries, corpus, qrels) for f in part.loaded["files"]]
    loaded = {**qrels.loaded, "source": folder.name, "files": files}
    return Rows(rows, folder, loaded)


TASKS = (
    *(
        Task(
            f"trial_criteria{'_1shot' if shots else ''}",
            f"TrialGPT criteria, {shots}-shot",
            read_criterion,
            CHOICE,
            hub="ncbi/TrialGPT-Criterion-Annotations",
            split="train",
            expected=1015,
            published=f"patient-trial, {shots}-shot",
            shots=shots,
        )
        for shots in (0, 1)
    ),
    *(
        Task(
            f"trial_{name}{'_1shot' if shots else ''}",
            f"{title}, {shots}-shot",
            read_trial(QRELS[labels]),
            CHOICE,
            shots=shots,
            gather=gather_trials,
        )
        for name, title, labels in (
            ("trec2021", "TREC CT 2021", "trec"),
            ("trec2022", "TREC CT 2022", "trec"),
            ("sigir", "SIGIR 2016 trials", "sigir"),
        )
        for shots in (0, 1)
    ),
)
