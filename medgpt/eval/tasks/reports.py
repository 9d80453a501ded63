"""Chest X-ray reports, of the user's copies: findings from images, impression from findings."""

from medgpt.eval.prompts import FINDINGS, IMPRESSION
from medgpt.eval.questions import Question, Rejected, optional, pictures
from medgpt.eval.tasks import Task

FACTS = ("age", "sex", "site", "labels")


def _common(row, number: int) -> dict:
    return {
        "id": optional(row, "study_id", "id", "uid") or str(number),
        "kind": "report",
        "cluster": optional(row, "subject_id", "patient_id", "patient"),
        "facts": {name: row[name] for name in FACTS if row.get(name) is not None},
    }


def _sections(row, names) -> str:
    texts = ((name, optional(row, name)) for name in names)
    return "\n".join(f"{name.capitalize()}: {text}" for name, text in texts if text)


def read_findings(row, root, number: int) -> Question:
    """All views of the study, and priors where the row has them, in the order of the row."""
    images = row.get("images") or [v for k, v in row.items() if k.startswith("image_")]
    images = pictures([images] if isinstance(images, (str, bytes, dict)) else images, root)
    findings = optional(row, "findings")
    if not findings:
        raise Rejected("no findings")
    if not images and ("images" in row or "image_1" in row):
        raise Rejected("no images")
    text = _sections(row, ("indication", "comparison"))
    return Question(text=text, answer=findings, images=images, **_common(row, number))


def read_impression(row, root, number: int) -> Question:
    findings, impression = optional(row, "findings"), optional(row, "impression")
    if not findings or not impression:
        raise Rejected("no findings or no impression")
    text = _sections(row, ("indication", "comparison", "findings"))
    return Question(text=text, answer=impression, **_common(row, number))


SETS = {
    "iu_xray": ("IU-Xray", 590),
    "mimic_cxr": ("MIMIC-CXR", 0),
    "chexpert_plus": ("CheXpert Plus", 0),
    "rexgradient": ("ReXGradient-160K", 0),
}
TASKS = (
    *(
        Task(
            f"{name}_findings",
            f"{title}, findings",
            read_findings,
            FINDINGS,
            split="test",
            expected=expected,
            published="MIMIC-CXR findings" if name == "mimic_cxr" else "",
        )
        for name, (title, expected) in SETS.items()
    ),
    *(
        Task(
            f"{name}_impression{'_1shot' if shots else ''}",
            f"{title}, impression, {shots}-shot",
            read_impression,
            IMPRESSION,
            split="test",
            shots=shots,
            published=f"impression RaTEScore, {shots}-shot" if name == "mimic_cxr" else "",
        )
        for name, (title, _) in SETS.items()
        for shots in (0, 1)
    ),
)
