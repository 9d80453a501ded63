"""Checkpoints that are whole: a file written last says which files belong to one, and how long."""

import json
import os
import re
from pathlib import Path

MARKER = "complete.json"


def mark_complete(directory: str | os.PathLike) -> None:
    """Write the marker of a checkpoint whose files are all there. It appears at once or not."""
    directory = Path(directory)
    sizes = {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    partial = directory / f".{MARKER}"
    partial.write_text(json.dumps(sizes, indent=1) + "\n")
    partial.rename(directory / MARKER)


def is_complete(directory: str | os.PathLike) -> bool:
    """Whether all that the marker names is there, as long as it says."""
    directory = Path(directory)
    try:
        sizes = json.loads((directory / MARKER).read_text())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def latest_complete(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a run; None where there is none."""
    found = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return next((str(found[n]) for n in sorted(found, reverse=True) if is_complete(found[n])), None)
