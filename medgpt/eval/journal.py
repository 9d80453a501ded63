"""Completions on disk by (model, decoding) and prompt: the cache, and what a killed run left.

One JSON line is one batch, on disk before it counts. A batch is there whole or not at all, so a run
that goes on asks nothing twice and asks the rest in the very batches of a run that never stopped.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from medgpt.eval.prompts import digest


class Completion(NamedTuple):
    """A model's output; `stop` is the provider's reason, "max_tokens" where it was cut."""

    text: str
    stop: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0


class Journal:
    """Append-only completions of one model under one decoding.

    Args:
        folder: made where missing, for its owner only: completions may repeat what a prompt says.
        identity: JSON of the model and the decoding; its hash names the file.
    """

    def __init__(self, folder: str | Path, identity: Mapping):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{digest(identity)[:24]}.jsonl"
        self.identity = dict(identity)
        self.found: dict[str, Completion] = {}
        self._stream = None

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Completion:
        return self.found[key]

    @contextmanager
    def open(self) -> Iterator["Journal"]:
        """Reads what is there and holds the file; a second process on it is refused."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as stream:
            _lock(stream, self.path)
            end = self._read(stream)
            stream.truncate(end)
            stream.seek(end)
            self._stream = stream
            if end == 0:
                self._line({"identity": self.identity})
            try:
                yield self
            finally:
                self._stream = None

    def _read(self, stream) -> int:
        """Fills `found`; the length of what is whole: a torn last line is none."""
        end = 0
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                batch = entry.get("batch", {})
                self.found |= {key: Completion(*value) for key, value in batch.items()}
            except (ValueError, TypeError, AttributeError):
                raise ValueError(
                    f"Journal: expected a batch in line {number} of {self.path.name}, got another"
                ) from None
            if number == 1 and entry.get("identity") != self.identity:
                raise ValueError(f"Journal: expected its own identity in {self.path.name}")
            end += len(line)
        return end

    def add(self, batch: Mapping[str, Completion]) -> None:
        """A batch, on disk when this returns."""
        self._line({"batch": {key: list(value) for key, value in batch.items()}})
        self.found |= batch

    def _line(self, entry: dict) -> None:
        assert self._stream is not None, "a journal that is not open"
        self._stream.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _lock(stream, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"Journal: expected {path.name} free, got it in use by a run") from None
