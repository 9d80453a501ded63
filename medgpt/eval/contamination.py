"""Questions that a training set holds, and a run's accuracy without and on them.

What counts as held is medgpt.data.decontaminate's: curation leaves out by the same rule.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from medgpt.data.decontaminate import LONG, SHORT, Contamination, row_text
from medgpt.data.features import image_hash
from medgpt.data.reader import Rows, image_sources, row_files
from medgpt.eval.questions import Question
from medgpt.eval.scoring import jsonable
from medgpt.eval.statistics import accuracy
from medgpt.images import ImageError, load_image


def index_of(questions: Sequence[Question]) -> Contamination:
    """Items by the questions' positions; ImageError for an image that cannot be read."""
    index = Contamination()
    for position, question in enumerate(questions):
        pictures = [load_image(image) for image in question.images]
        index.add("", str(position), question.text, question.options.values(), pictures)
    return index.close()


def training_rows(path: Path) -> Iterator[tuple[str, list]]:
    """(text, image sources) of rows as parquet, a folder of it, or JSON lines.

    A JSON line may be a row of {messages}, or any table's: all its strings count.
    """
    if path.is_dir() or path.suffix == ".parquet":
        rows = Rows(path)
        for number in range(len(rows)):
            row = rows[number]
            yield row_text(row), image_sources(row, rows.folder(number))
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"contamination: expected a row in line {number}, got another")
                yield _line_text(row), list(_line_images(row, path.parent))


def _line_text(row: Mapping) -> str:
    if "messages" not in row:
        return "\n".join(str(v) for v in row.values() if isinstance(v, str))
    messages = []
    for message in row["messages"]:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        parts = [{"type": "text", "text": part["text"]} for part in parts if part.get("text")]
        messages.append({**message, "content": parts})
    return row_text({"messages": messages})


def _line_images(row: Mapping, root: Path) -> Iterable[Path]:
    for name in row.get("images") or ():
        path = Path(str(name))
        if not path.is_absolute() and ".." not in path.parts:
            yield root / path


def check(
    questions: Sequence[Question],
    train: str | Path,
    *,
    records: str | Path | None = None,
    seed: int = 0,
) -> dict:
    """Which questions a training set holds, and a run's accuracy without and on them.

    Args:
        train: rows: parquet, a folder of it, or .jsonl with image paths relative to it.
        records: of a run, records/TASK.jsonl.

    Returns:
        counts, `ids` of contaminated questions, sha256 of the training set, and with records
        `clean` and `dirty` estimates. No texts.
    """
    train, index = Path(train), index_of(questions)
    by_text, by_image, rows, unread = set(), set(), 0, 0
    for text, images in training_rows(train):
        rows += 1
        by_text |= index.of_text(text)
        for image in images if len(index.hashes) else ():
            try:
                by_image |= index.of_images(image_hash(load_image(image))[None])
            except ImageError:
                unread += 1
    dirty = by_text | by_image
    found = {
        "questions": len(questions),
        "contaminated": len(dirty),
        "by_text": len(by_text),
        "by_image": len(by_image),
        "too_short_to_check": len(index.wordless),
        "train": {
            "name": train.name,
            "rows": rows,
            "sha256": _hash(train),
            "images_unread": unread,
        },
        "ngrams": [LONG, SHORT],
        "ids": sorted(questions[at].id for at in dirty),
    }
    if records is not None:
        found |= clean_and_dirty(Path(records), {questions[at].id for at in dirty}, seed)
    return jsonable(found)


def clean_and_dirty(records: Path, dirty: set[str], seed: int = 0) -> dict:
    """Estimates of the records outside and among the ids in `dirty`."""
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    parts = {"all": rows, "clean": [r for r in rows if r["id"] not in dirty]}
    parts["dirty"] = [r for r in rows if r["id"] in dirty]
    return {
        name: accuracy(
            [r["score"] for r in part], [r["cluster"] for r in part], seed=seed
        )._asdict()
        for name, part in parts.items()
    }


def _hash(path: Path) -> str:
    total = hashlib.sha256()
    for file in row_files(path) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()
