"""Questions that a training set holds: shared word n-grams, and images that look the same.

13 words of question and options in a row, or 8 where the question itself is shorter than 13, as the
reports of GPT-3 and after count; images by perceptual hash.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from medgpt.eval.questions import Question
from medgpt.eval.scoring import jsonable
from medgpt.eval.statistics import accuracy

LONG, SHORT = 13, 8
# n-grams of more questions than this are turns of phrase: "which of the following is the most"
COMMON = 10
BITS = 4  # of 64 in which the hashes of one image may differ
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_]+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def ngrams(sequence: Sequence[str], n: int) -> Iterator[int]:
    """A 64-bit hash of each n words in a row."""
    for at in range(len(sequence) - n + 1):
        text = " ".join(sequence[at : at + n]).encode()
        yield int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Index:
    """n-grams of questions, to hold training texts against.

    Attributes:
        unchecked: positions of questions with fewer than 8 words in all, which nothing can match.
    """

    def __init__(self, questions: Sequence[Question]):
        owners: dict[int, dict[int, set[int]]] = {LONG: {}, SHORT: {}}
        self.unchecked = []
        for position, question in enumerate(questions):
            stem = words(question.text)
            everything = stem + [w for text in question.options.values() for w in words(text)]
            n = LONG if len(stem) >= LONG else SHORT
            if len(everything) < n:
                self.unchecked.append(position)
            for key in ngrams(everything, n):
                owners[n].setdefault(key, set()).add(position)
        self.owners = {
            n: {key: found for key, found in index.items() if len(found) <= COMMON}
            for n, index in owners.items()
        }

    def matches(self, text: str) -> set[int]:
        """Positions of the questions that share an n-gram with a text."""
        sequence, found = words(text), set()
        for n, index in self.owners.items():
            if index:
                for key in ngrams(sequence, n):
                    found |= index.get(key, set())
        return found


def image_bits(image) -> int | None:
    """64-bit perceptual hash of an encoded image or path; None where it shows nothing."""
    import io

    import imagehash
    from PIL import Image

    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        gray = opened.convert("L")
    if np.asarray(gray).std() < 2:
        return None
    return int(str(imagehash.phash(gray)), 16)


class ImageIndex:
    """Hashes of the questions' images."""

    def __init__(self, questions: Sequence[Question]):
        pairs = [(image_bits(i), at) for at, q in enumerate(questions) for i in q.images]
        pairs = [(bits, at) for bits, at in pairs if bits is not None]
        self.bits = np.array([bits for bits, _ in pairs], dtype=np.uint64)
        self.owner = np.array([at for _, at in pairs], dtype=np.int64)

    def matches(self, image) -> set[int]:
        bits = image_bits(image) if len(self.bits) else None
        if bits is None:
            return set()
        differing = np.unpackbits(
            (self.bits ^ np.uint64(bits)).view(np.uint8).reshape(-1, 8), axis=1
        )
        return set(self.owner[differing.sum(1) <= BITS].tolist())


def training_rows(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"contamination: expected a row in line {number}, got another")
                yield row


def row_text(row: Mapping) -> str:
    """All that is said in a row of {messages}, or in any row's strings."""
    if "messages" not in row:
        return "\n".join(str(v) for v in row.values() if isinstance(v, str))
    texts = []
    for message in row["messages"]:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        texts.extend(part["text"] for part in parts if part.get("text"))
    return "\n".join(texts)


def check(
    questions: Sequence[Question],
    train: str | Path,
    *,
    records: str | Path | None = None,
    seed: int = 0,
) -> dict:
    """Which questions a training set holds, and a run's accuracy without and on them.

    Args:
        train: rows {images, messages}, .jsonl; image paths relative to it.
        records: of a run, records/TASK.jsonl.

    Returns:
        counts, `ids` of contaminated questions, sha256 of the training set, and with records
        `clean` and `dirty` estimates. No texts.
    """
    train = Path(train)
    index, pictures = Index(questions), ImageIndex(questions)
    by_text, by_image, rows, unread = set(), set(), 0, 0
    for row in training_rows(train):
        rows += 1
        by_text |= index.matches(row_text(row))
        for image in _images(row, train.parent):
            try:
                by_image |= pictures.matches(image)
            except (OSError, ValueError):
                unread += 1
    dirty = by_text | by_image
    found = {
        "questions": len(questions),
        "contaminated": len(dirty),
        "by_text": len(by_text),
        "by_image": len(by_image),
        "too_short_to_check": len(index.unchecked),
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


def _images(row: Mapping, root: Path) -> Iterable[Path]:
    for name in row.get("images") or ():
        path = Path(str(name))
        if not path.is_absolute() and ".." not in path.parts:
            yield root / path


def _hash(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()
