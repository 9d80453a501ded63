"""Text questions: MedQA, MedMCQA, MMLU, Medbullets, MedXpertQA, PubMedQA."""

import re

from medgpt.eval.prompts import CHOICE, LABEL
from medgpt.eval.questions import (
    Question,
    Rejected,
    field,
    letter_at,
    letter_of,
    lettered,
    optional,
    options_of,
    pictures,
)
from medgpt.eval.tasks import Task

MMLU = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
# MedXpertQA repeats its options at the end of the question
_CHOICES = re.compile(r"\s*\nAnswer Choices:.*\Z", re.S)


def _text(row, *names: str) -> str:
    text = optional(row, *names)
    if not text:
        raise Rejected("no question text")
    return text


def read_medqa(row, root, number: int) -> Question:
    options = options_of(field(row, "options"))
    return Question(
        id=optional(row, "id") or str(number),
        kind="choice",
        text=_text(row, "question"),
        options=options,
        answer=letter_of(field(row, "answer_idx"), options),
        groups={"step": optional(row, "meta_info")} if optional(row, "meta_info") else {},
    )


def read_medmcqa(row, root, number: int) -> Question:
    options = lettered([field(row, f"op{x}") for x in "abcd"])
    return Question(
        id=optional(row, "id") or str(number),
        kind="choice",
        text=_text(row, "question"),
        options=options,
        answer=letter_at(field(row, "cop"), options),
        groups={"subject": optional(row, "subject_name")},
    )


def read_mmlu(row, root, number: int) -> Question | None:
    subject = optional(row, "subject")
    if subject and subject not in MMLU:
        return None
    options = options_of(field(row, "choices"))
    return Question(
        id=str(number),
        kind="choice",
        text=_text(row, "question"),
        options=options,
        answer=letter_at(field(row, "answer"), options),
        groups={"subject": subject},
    )


def read_medbullets(count: int):
    def read(row, root, number: int) -> Question:
        try:
            options = options_of(field(row, "options"))
        except Rejected:
            columns = "ABCDE"[:count]
            options = lettered([field(row, x, f"op{x}", f"option_{x}") for x in columns])
        if len(options) != count:
            raise Rejected(f"not {count} options")
        return Question(
            id=optional(row, "id") or str(number),
            kind="choice",
            text=_text(row, "question"),
            options=options,
            answer=letter_of(field(row, "answer_idx"), options),
        )

    return read


def read_medxpertqa(row, root, number: int) -> Question:
    options = options_of(field(row, "options"))
    names = ("medical_task", "body_system", "question_type")
    identity = optional(row, "id") or str(number)
    return Question(
        id=identity,
        kind="choice",
        text=_CHOICES.sub("", _text(row, "question")),
        options=options,
        answer=letter_of(field(row, "label"), options),
        images=pictures(row.get("images") or (), root),
        groups={name: optional(row, name) for name in names},
    )


def read_medxpertqa_mm(row, root, number: int) -> Question:
    question = read_medxpertqa(row, root, number)
    if "images" in row and not question.images:
        raise Rejected("no images")
    return question


def read_pubmedqa(row, root, number: int) -> Question:
    row = {**row, **row["data"]} if isinstance(row.get("data"), dict) else row
    contexts = field(row, "contexts", "context")
    if isinstance(contexts, dict):
        contexts = field(contexts, "contexts")
    if not isinstance(contexts, str):
        contexts = "\n".join(str(c).strip() for c in contexts)
    answer = str(field(row, "final_decision", "final decision")).strip().casefold()
    if answer not in ("yes", "no", "maybe"):
        raise Rejected("a decision other than yes, no, maybe")
    return Question(
        id=optional(row, "pubid", "id") or str(number),
        kind="label",
        text=f"{contexts}\n\n{_text(row, 'question')}",
        labels=("yes", "no", "maybe"),
        answer=answer,
    )


TASKS = (
    Task(
        "medqa",
        "MedQA-USMLE, 4 options",
        read_medqa,
        CHOICE,
        hub="GBaker/MedQA-USMLE-4-options",
        split="test",
        expected=1273,
    ),
    Task(
        "medmcqa",
        "MedMCQA",
        read_medmcqa,
        CHOICE,
        hub="openlifescienceai/medmcqa",
        split="validation",
        expected=4183,
    ),
    Task(
        "mmlu_med",
        "MMLU-Med",
        read_mmlu,
        CHOICE,
        hub="cais/mmlu",
        configs=MMLU,
        split="test",
        expected=1089,
        published="MMLU-Med",
    ),
    Task("medbullets_4", "Medbullets, 4 options", read_medbullets(4), CHOICE, expected=308),
    Task(
        "medbullets_5",
        "Medbullets, 5 options",
        read_medbullets(5),
        CHOICE,
        expected=308,
        published="Medbullets",
        note="the paper does not say whether its figure is of 4 or 5 options",
    ),
    Task(
        "medxpertqa_text",
        "MedXpertQA text",
        read_medxpertqa,
        CHOICE,
        hub="TsinghuaC3I/MedXpertQA",
        configs=("Text",),
        split="test",
        expected=2450,
        published="MedXpertQA text",
    ),
    Task(
        "medxpertqa_mm",
        "MedXpertQA multimodal",
        read_medxpertqa_mm,
        CHOICE,
        hub="TsinghuaC3I/MedXpertQA",
        configs=("MM",),
        split="test",
        expected=2000,
        published="MedXpertQA-MM",
    ),
    Task(
        "pubmedqa",
        "PubMedQA, labelled",
        read_pubmedqa,
        LABEL,
        hub="openlifescienceai/pubmedqa",
        split="test",
        expected=500,
    ),
)
