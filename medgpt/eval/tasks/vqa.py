"""Questions about images: MedFrameQA, MMMU, SLAKE, VQA-RAD, PathVQA, PMC-VQA, OmniMedVQA."""

import re
from pathlib import PurePosixPath

from medgpt.eval.prompts import CHOICE, SHORT
from medgpt.eval.questions import (
    Question,
    Rejected,
    field,
    letter_of,
    letter_of_text,
    lettered,
    optional,
    options_of,
    picture_hash,
    pictures,
)
from medgpt.eval.tasks import Task

HEALTH = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)


def _needs_image(row, column: str, images: tuple) -> None:
    if any(k.casefold() == column.casefold() for k in row) and not images:
        raise Rejected("no image")


def read_medframeqa(row, root, number: int) -> Question:
    options = options_of(field(row, "options"))
    images = pictures([row.get(f"image_{n}") for n in range(1, 6)], root)
    if "image_1" in row and not 2 <= len(images) <= 5:
        raise Rejected("not 2 to 5 images")
    groups = {name: optional(row, name) for name in ("system", "organ", "modality")}
    return Question(
        id=optional(row, "question_id", "id") or str(number),
        kind="choice",
        text=str(field(row, "question")).strip(),
        options=options,
        answer=letter_of(field(row, "correct_answer"), options),
        images=images,
        cluster=optional(row, "video_id"),
        groups={**groups, "images": str(len(images))},
    )


def read_mmmu(row, root, number: int) -> Question | None:
    identity = optional(row, "id") or str(number)
    subject = optional(row, "subject").replace(" ", "_") or re.sub(
        r"^[a-z]+_|_\d+$", "", identity, flags=re.I
    )
    if optional(row, "subject") and subject not in HEALTH:
        return None
    images = pictures([row.get(f"image_{n}") for n in range(1, 8)], root)
    _needs_image(row, "image_1", images)
    text, groups = str(field(row, "question")).strip(), {"subject": subject}
    # MMMU-Pro has no question_type: all of it is multiple choice
    if optional(row, "question_type") == "open":
        answer = field(row, "answer")
        return Question(
            id=identity, kind="open", text=text, answer=str(answer), images=images, groups=groups
        )
    options = options_of(field(row, "options"))
    answer = letter_of(field(row, "answer"), options)
    return Question(identity, "choice", text, answer, options, images=images, groups=groups)


def read_mmmu_pro(count: int):
    def read(row, root, number: int) -> Question | None:
        question = read_mmmu(row, root, number)
        # some questions of the 10-option set have fewer
        if question is not None and len(question.options) > count:
            raise Rejected(f"more than {count} options")
        return question

    return read


def read_slake(row, root, number: int) -> Question:
    images = pictures([row.get("image") or row.get("img_name")], root)
    _needs_image(row, "img_name", images)
    closed = optional(row, "answer_type").upper() == "CLOSED"
    language = optional(row, "q_lang") or "en"
    return Question(
        id=optional(row, "qid") or str(number),
        kind="closed" if closed else "open",
        text=str(field(row, "question")).strip(),
        answer=_answer(row),
        images=images,
        cluster=optional(row, "img_name", "img_id") or _cluster(images),
        groups={
            "language": language,
            "type": "closed" if closed else "open",
            "modality": optional(row, "modality"),
            "organ": optional(row, "location"),
        },
        variant="" if language == "en" else language,
    )


def read_vqa(row, root, number: int) -> Question:
    images = pictures([row.get("image")], root)
    _needs_image(row, "image", images)
    answer = _answer(row)
    closed = answer.casefold() in ("yes", "no")
    return Question(
        id=str(number),
        kind="closed" if closed else "open",
        text=str(field(row, "question")).strip(),
        answer=answer,
        images=images,
        cluster=_cluster(images),
        groups={"type": "closed" if closed else "open"},
    )


def read_pmc_vqa(row, root, number: int) -> Question:
    name = optional(row, "Figure_path")
    images = pictures([row.get("image") or row.get("Figure_path")], root)
    _needs_image(row, "Figure_path", images)
    choices = [str(field(row, f"Choice {x}")).strip() for x in "ABCD"]
    options = lettered([re.sub(r"^[A-D]\s*:\s*", "", choice) for choice in choices])
    # version 1 has the letter in Answer_label and the text in Answer, version 2 the letter there
    label = optional(row, "Answer_label") or str(field(row, "Answer"))
    return Question(
        id=optional(row, "index") or str(number),
        kind="choice",
        text=str(field(row, "Question")).strip(),
        options=options,
        answer=letter_of(label, options),
        images=images,
        cluster=name or _cluster(images),
    )


def read_omnimedvqa(row, root, number: int) -> Question:
    images = pictures([row.get("image_path") or row.get("image")], root)
    _needs_image(row, "image_path", images)
    given = [optional(row, f"option_{x}") for x in "ABCD"]
    options = lettered([text for text in given if text])
    return Question(
        id=optional(row, "question_id") or str(number),
        kind="choice",
        text=str(field(row, "question")).strip(),
        options=options,
        answer=letter_of_text(field(row, "gt_answer"), options),
        images=images,
        cluster=optional(row, "image_path") or _cluster(images),
        groups={
            "dataset": optional(row, "dataset"),
            "modality": optional(row, "modality_type", "modality"),
            "type": optional(row, "question_type"),
        },
    )


def _answer(row) -> str:
    answer = optional(row, "answer")
    if not answer:
        raise Rejected("no answer")
    return answer


def _cluster(images) -> str:
    if not images:
        return ""
    image = images[0]
    return picture_hash(image) if isinstance(image, bytes) else str(PurePosixPath(image))


def _mmmu(name: str, split: str, expected: int, **kwargs) -> Task:
    title = f"MMMU Health & Medicine, {split}"
    return Task(
        name,
        title,
        read_mmmu,
        CHOICE,
        hub="MMMU/MMMU",
        configs=HEALTH,
        split=split,
        expected=expected,
        **kwargs,
    )


TASKS = (
    Task(
        "medframeqa",
        "MedFrameQA",
        read_medframeqa,
        CHOICE,
        hub="SuhaoYu1020/MedFrameQA",
        split="test",
        expected=2851,
        published="MedFrameQA",
    ),
    _mmmu(
        "mmmu_med_dev",
        "dev",
        25,
        published="MMMU-Med dev",
        note="the paper's 61.49 is no share of 25 questions; 107 of 174 fits, dev and validation",
    ),
    _mmmu("mmmu_med_val", "validation", 150),
    *(
        Task(
            f"mmmu_med_pro_{count}",
            f"MMMU-Pro Health & Medicine, {count} options",
            read_mmmu_pro(count),
            CHOICE,
            hub="MMMU/MMMU_Pro",
            configs=(f"standard ({count} options)",),
            split="test",
            published=f"MMMU-Med-Pro, {count} options",
        )
        for count in (4, 10)
    ),
    Task(
        "slake",
        "SLAKE",
        read_slake,
        SHORT,
        hub="BoKelvin/SLAKE",
        split="test",
        expected=2094,
        published="SLAKE (in distribution)",
    ),
    Task("vqa_rad", "VQA-RAD", read_vqa, SHORT, hub="flaviagiammarino/vqa-rad", split="test"),
    Task("path_vqa", "PathVQA", read_vqa, SHORT, hub="flaviagiammarino/path-vqa", split="test"),
    Task("pmc_vqa", "PMC-VQA", read_pmc_vqa, CHOICE, hub="RadGenome/PMC-VQA", split="test"),
    Task(
        "omnimedvqa",
        "OmniMedVQA",
        read_omnimedvqa,
        CHOICE,
        hub="foreverbeliever/OmniMedVQA",
        split="",
    ),
)
