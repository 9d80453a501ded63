"""Files of a run: whole or not at all, and their owner's alone."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_json(path: Path, value) -> None:
    """A value that JSON can hold, in place of what is there."""
    _replace(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Sequence[Mapping]) -> None:
    """A row a line, in place of what is there."""
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(new, path)
