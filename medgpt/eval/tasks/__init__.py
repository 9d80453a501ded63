"""Benchmarks: where their rows are, how a row becomes a question, and what is asked."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from medgpt.eval.prompts import Prompt
from medgpt.eval.questions import Question, Rejected, optional
from medgpt.eval.sources import Rows, read_hub, read_rows


class Task(NamedTuple):
    """A benchmark.

    Attributes:
        name, title: on the command line, in reports.
        read: (row, folder of its images, row number) -> Question; raises Rejected.
        prompt: what is asked.
        hub: id on the Hugging Face hub; "" where there is none.
        configs, split: of it.
        expected: its number of questions; 0 where it is not fixed.
        published: its row in the paper's tables; "" where it has none.
        shots: examples before each question.
        gather: (data) -> Rows, for data sets of several files that belong together.
        note: for reports.
    """

    name: str
    title: str
    read: Callable[[Mapping, Path | None, int], Question]
    prompt: Prompt
    hub: str = ""
    configs: tuple[str, ...] = ()
    split: str = ""
    expected: int = 0
    published: str = ""
    shots: int = 0
    gather: Callable[..., Rows] | None = None
    note: str = ""


class Loaded(NamedTuple):
    """Questions of a task; `report` says what was loaded, and why rows were not."""

    questions: list[Question]
    report: dict


def tasks() -> dict[str, Task]:
    """Every task by name."""
    from medgpt.eval.tasks import reports, text, trials, vqa

    return {t.name: t for m in (text, vqa, reports, trials) for t in m.TASKS}


def get(name: str) -> Task:
    found = tasks()
    if name not in found:
        near = [t for t in found if t.startswith(name)] or get_close_matches(name, found, 3)
        hint = f"one such as {', '.join(near)}" if near else "one of `medgpt eval tasks`"
        raise ValueError(f"task: expected {hint}, got {name}")
    return found[name]


def load(
    task: Task,
    data: str | Path | None = None,
    *,
    images: str | Path | None = None,
    drop_images: bool = False,
) -> Loaded:
    """Questions from a file or folder, or from the hub where data is "hub".

    Args:
        images: the folder that image paths are relative to.
        drop_images: ask without images, for models that take none; the results say so.

    Raises:
        ValueError: no rows, no questions among them, ids that occur twice.
    """
    if data is None or (data == "hub" and not task.hub):
        raise ValueError(f"{task.name}: expected a file or folder, got {data}")
    if data == "hub":
        rows = read_hub(task.hub, split=task.split, configs=task.configs)
    elif task.gather is not None:
        rows = task.gather(Path(data))
    else:
        rows = read_rows(data, split=task.split, configs=task.configs, images=images)
    questions, reasons = [], {}
    for number, row in enumerate(rows.rows):
        try:
            row = {k: v for k, v in row.items() if not (drop_images and _is_image(k))}
            question = task.read(row, rows.root, number)
        except Rejected as why:
            reasons[str(why)] = reasons.get(str(why), 0) + 1
            continue
        if question is not None:
            questions.append(question._replace(groups={**question.groups, **_slices(row)}))
    if not questions:
        raise ValueError(
            f"{task.name}: expected questions, got none of {len(rows.rows)}: {reasons}"
        )
    ids = [q.id for q in questions]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"{task.name}: expected ids once each, got {len(ids) - len(set(ids))} again"
        )
    report = {
        **rows.loaded,
        "questions": len(questions),
        "expected": task.expected or None,
        "rejected": reasons,
        "images": sum(len(q.images) for q in questions),
        "images_dropped": drop_images,
    }
    return Loaded(questions, report)


def _slices(row: Mapping) -> dict[str, str]:
    """Age by decade, sex and site of a row that has them, for tables by subgroup."""
    found = {name: value for name in ("sex", "site") if (value := optional(row, name))}
    age = optional(row, "age")
    if age.split(".")[0].isdigit():
        found["age"] = f"{int(float(age)) // 10 * 10:02d}-{int(float(age)) // 10 * 10 + 9:02d}"
    return found


def _is_image(column: str) -> bool:
    name = column.casefold()
    return name in ("image", "images", "img_name", "image_path", "figure_path") or (
        name.startswith("image_") and name[6:].isdigit()
    )
