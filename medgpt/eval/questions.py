"""Questions as every task gives them, whatever the columns of its data set."""

import ast
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Picture = bytes | Path


class Rejected(ValueError):
    """A row that is no question; says why without quoting it."""


class Question(NamedTuple):
    """One question.

    Attributes:
        id: unique in its task.
        kind: "choice" (answer is a letter), "label" (one of `labels`), "closed" or "open" (answer
            is text) or "report" (answer is a reference report).
        text: may hold `<image 1>`, `<image 2>`, ... where images stand; images that it does not
            name come before it.
        answer: the gold.
        options: text by letter; empty but for "choice".
        labels: of "label".
        images: encoded bytes or paths, in order.
        cluster: what several questions share: an image, a patient, a case.
        groups: {field: value} for tables by subgroup.
        facts: of a report, for its metrics: age, sex, site, the image's labels.
        variant: of the task's prompt, such as a language.
    """

    id: str
    kind: str
    text: str
    answer: str
    options: Mapping[str, str] = {}
    labels: tuple[str, ...] = ()
    images: tuple[Picture, ...] = ()
    cluster: str = ""
    groups: Mapping[str, str] = {}
    facts: Mapping = {}
    variant: str = ""


def field(row: Mapping, *names: str):
    """The first of the names that the row has, whatever its case; None where that is empty.

    Raises:
        Rejected: it has none.
    """
    lower = {key.casefold(): key for key in row}
    for name in names:
        if name.casefold() in lower:
            return row[lower[name.casefold()]]
    raise Rejected(f"no column {' or '.join(names)}")


def optional(row: Mapping, *names: str) -> str:
    """As field, "" where there is none."""
    try:
        value = field(row, *names)
    except Rejected:
        return ""
    return "" if value is None else str(value).strip()


def lettered(texts: Sequence) -> dict[str, str]:
    """Options by letter, A first."""
    if not 2 <= len(texts) <= len(LETTERS):
        raise Rejected("fewer than two options")
    return dict(zip(LETTERS, (str(text).strip() for text in texts), strict=False))


def options_of(value) -> dict[str, str]:
    """Options of a dict by letter, a list, [{key, value}], or the string of a list as MMMU has."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Rejected("options that are no list") from None
    if isinstance(value, Mapping):
        value = {str(k).strip().upper(): str(v).strip() for k, v in value.items() if v is not None}
        if sorted(value) != list(LETTERS[: len(value)]):
            raise Rejected("options that are not A, B, ...")
        return lettered([value[letter] for letter in sorted(value)])
    if not isinstance(value, Sequence) and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence):
        raise Rejected("options that are no list")
    if value and isinstance(value[0], Mapping):
        return options_of({item["key"]: item["value"] for item in value})
    return lettered(value)


def letter_of(value, options: Mapping[str, str]) -> str:
    """A gold letter, checked."""
    letter = str(value).strip().upper()
    if letter not in options:
        raise Rejected("an answer that is no option's letter")
    return letter


def letter_at(index, options: Mapping[str, str]) -> str:
    """The letter of a gold index from 0, checked."""
    if isinstance(index, bool) or not str(index).isdigit() or int(index) >= len(options):
        raise Rejected("an answer index outside the options")
    return LETTERS[int(index)]


def letter_of_text(value, options: Mapping[str, str]) -> str:
    """The letter of the one option that equals a gold given as text."""
    wanted = loose(str(value))
    hits = [letter for letter, text in options.items() if loose(text) == wanted]
    if len(hits) != 1:
        raise Rejected("an answer text that is not exactly one option")
    return hits[0]


def loose(text: str) -> str:
    """Case, spaces and outer full stops set aside."""
    return re.sub(r"\s+", " ", text).strip(" .").casefold()


def picture(value, root: Path | None) -> Picture | None:
    """An image of a row: bytes, {bytes, path}, a PIL image or a path under root.

    Raises:
        Rejected: paths that leave root, URLs, files that are not there.
    """
    if value is None or value == "":
        return None
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, Mapping):
        return picture(value.get("bytes") or value.get("path"), root)
    if hasattr(value, "save"):
        import io

        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    name = str(value)
    if root is None or "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise Rejected("an image path outside the data's folder")
    path = root / name
    if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
        raise Rejected("an image file that is not there")
    return path


def pictures(values: Sequence, root: Path | None) -> tuple[Picture, ...]:
    """Images of a row in order, without the empty places."""
    found = (picture(value, root) for value in values)
    return tuple(image for image in found if image is not None)


def picture_hash(image: Picture) -> str:
    """sha256 of the encoded image."""
    return hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).hexdigest()
