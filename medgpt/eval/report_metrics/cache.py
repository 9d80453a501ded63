"""Annotations of reports on disk: one append-only JSONL file per kind and annotator.

    CACHE/chexbert.f1chexbert.jsonl
        {"format": "medgpt-report-annotations", "version": 1, "kind": "chexbert", ...}
        {"key": sha256 of the report, "value": {"labels": [14], "embedding": base64 fp32}}

Keys are SHA-256 of the stripped UTF-8 text, or of two such keys for kinds of a pair (BERTScore,
RaTEScore). No report is stored whole, but RadGraph and RaTEScore entities are words of it, and a
short report can be guessed from its hash: a cache is patient data and stays where reports may.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from medgpt.eval.report_metrics.values import CHECKS

FORMAT, VERSION = "medgpt-report-annotations", 1
PAIR_KINDS = ("bertscore", "ratescore")
MAX_LINE = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


def text_key(text: str) -> str:
    """SHA-256 of a report: surrounding white space does not count."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()


def pair_key(reference: str, generated: str) -> str:
    """SHA-256 of (reference, generated), in this order."""
    keys = f"{text_key(reference)}:{text_key(generated)}"
    return hashlib.sha256(keys.encode()).hexdigest()


def cache_path(folder, kind: str, annotator: str) -> Path:
    """FOLDER/KIND.ANNOTATOR.jsonl; neither name can leave the folder."""
    if kind not in CHECKS:
        raise ValueError(f"annotation kind: expected one of {', '.join(CHECKS)}, got {kind!r}")
    if not _NAME.fullmatch(annotator):
        raise ValueError(
            f"annotator: expected letters, digits, '-', '_' and single '.', got {annotator!r}"
        )
    return Path(folder) / f"{kind}.{annotator}.jsonl"


class Annotations(dict):
    """{key: value} of one kind by one annotator.

    Attributes:
        kind, annotator: as in the file's name.
        params: what the values depend on: package, version, model, settings.
        torn: whether the file ended in the middle of a line, which was left out.
    """

    def __init__(self, kind: str, annotator: str, params: dict, torn: bool = False):
        super().__init__()
        self.kind, self.annotator, self.params, self.torn = kind, annotator, params, torn

    @property
    def label(self) -> str:
        return f"{self.kind}.{self.annotator}"


def read(folder, kind: str, annotator: str) -> Annotations:
    """One annotation file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not such a file, another version, a bad value, two values of one key.
    """
    path = cache_path(folder, kind, annotator)
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        header = _header(path, kind, annotator, _line(path, 1, file))
        found = Annotations(kind, annotator, header["params"])
        number = 1
        while line := _line(path, number + 1, file):
            number += 1
            if not line.endswith(b"\n"):
                found.torn = True
                break
            _add(path, number, found, _json(path, number, line))
    return found


def append(folder, kind: str, annotator: str, params: dict, entries: Iterable) -> int:
    """Adds (key, value) pairs that the file does not have, making it where there is none.

    Each line is flushed, so a killed run loses at most the value it was writing; the next call
    removes a torn line. One writer at a time: a second one waits.

    Returns:
        How many were added.

    Raises:
        ValueError: other params than the file's, a bad value, another value for a stored key.
    """
    path = cache_path(folder, kind, annotator)
    os.makedirs(path.parent, mode=0o700, exist_ok=True)
    with os.fdopen(_open(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _cut_torn_line(file)
        if not os.fstat(file.fileno()).st_size:
            file.write(_dump({**_identity(kind, annotator), "params": params}))
            file.flush()
        found = read(folder, kind, annotator)
        if found.params != json.loads(json.dumps(params)):
            raise ValueError(
                f"{path.name}: expected the params it was made with, {found.params}, got {params};"
                " name another annotator"
            )
        file.seek(0, os.SEEK_END)
        before = len(found)
        for key, value in entries:
            new = key not in found
            _add(path, "new", found, {"key": key, "value": value})
            if new:
                file.write(_dump({"key": key, "value": value}))
                file.flush()
        return len(found) - before


def annotators(folder, kind: str) -> list[str]:
    """Names of the annotators that have a file of `kind` in folder."""
    found = (path.name.removeprefix(f"{kind}.") for path in Path(folder).glob(f"{kind}.*.jsonl"))
    return sorted(name.removesuffix(".jsonl") for name in found)


def _identity(kind, annotator) -> dict:
    return {"format": FORMAT, "version": VERSION, "kind": kind, "annotator": annotator}


def _open(path: Path, flags: int) -> int:
    """A regular file, never through a link, readable by its owner alone where it is new."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path.name}: expected a regular file, got {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path.name}: expected a regular file, got another kind")
    return handle


def _line(path, number, file) -> bytes:
    line = file.readline(MAX_LINE)
    if len(line) == MAX_LINE:
        raise ValueError(f"{path.name}:{number}: expected a line under {MAX_LINE} bytes, got more")
    return line


def _json(path, number, line: bytes) -> dict:
    try:
        value = json.loads(line)
    except ValueError:
        raise ValueError(f"{path.name}:{number}: expected JSON, got another text") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}:{number}: expected an object, got {type(value).__name__}")
    return value


def _header(path, kind, annotator, line: bytes) -> dict:
    header = _json(path, 1, line)
    for name, expected in _identity(kind, annotator).items():
        if header.get(name) != expected:
            raise ValueError(f"{path.name}:1: expected {name} {expected!r}, got another")
    if not isinstance(header.get("params"), dict):
        raise ValueError(f"{path.name}:1: expected params, an object, got none")
    return header


def _add(path, number, found: Annotations, entry: dict) -> None:
    key, value = entry.get("key"), entry.get("value")
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError(f"{path.name}:{number}: expected a SHA-256 key, got another")
    try:
        CHECKS[found.kind](value)
    except ValueError as error:
        raise ValueError(f"{path.name}:{number}: {error}") from None
    if found.setdefault(key, value) != value:
        raise ValueError(f"{path.name}:{number}: expected one value a key, got two of {key[:12]}")


def _dump(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _cut_torn_line(file) -> None:
    """Truncates what follows the last line end."""
    end = file.seek(0, os.SEEK_END)
    kept = end
    while kept:
        start = max(0, kept - 65536)
        file.seek(start)
        at = file.read(kept - start).rfind(b"\n")
        if at >= 0:
            kept = start + at + 1
            break
        kept = start
    if kept != end:
        file.truncate(kept)
    file.seek(kept)
