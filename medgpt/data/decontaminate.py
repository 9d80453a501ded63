"""Rows that hold what a benchmark asks: its words in a row, or its images.

13 words of question and options in a row, or 8 where the question itself is shorter than 13, as the
reports of GPT-3 and after count; images by a perceptual hash of 256 bits. Curation drops such rows;
`medgpt eval contamination` counts them.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .features import hamming, image_hash, words
from .reader import Rows, image_sources
from .rows import RowError, inside, texts

LONG, SHORT = 13, 8  # words of an n-gram; SHORT for stems of fewer than LONG words
COMMON = 10  # n-grams of more items than these are phrases of the exam, not an item
NEAR = 16  # of 256 bits
FLAT = 2  # deviation of levels below which an image shows nothing, and has no hash


def ngrams(tokens: list[str], n: int) -> Iterator[int]:
    """A 64-bit hash of each n words in a row."""
    for at in range(len(tokens) - n + 1):
        text = " ".join(tokens[at : at + n]).encode()
        yield int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Contamination:
    """Word n-grams and image hashes of benchmarks' items.

    An item's words are its stem and options. Items of fewer than SHORT words ("Is there a
    pneumothorax?") are found by their images alone: their words stand in honest rows as well.

    Attributes:
        names: (benchmark, item) of each item.
        wordless: numbers of the items with too few words.
    """

    def __init__(self):
        self.names: list[tuple[str, str]] = []
        self.wordless: list[int] = []
        self.grams: dict[int, dict[int, list[int]]] = {
            LONG: defaultdict(list),
            SHORT: defaultdict(list),
        }
        self.hashes, self.owners = np.empty((0, 32), np.uint8), []

    def add(self, benchmark: str, item: str, stem: str, options: Iterable[str], images=()) -> None:
        """An item; images as uint8 [H, W, 3]."""
        number = len(self.names)
        self.names.append((benchmark, item))
        tokens = words("\n".join([stem, *options]))
        n = LONG if len(words(stem)) >= LONG else SHORT
        if len(tokens) < n:
            self.wordless.append(number)
        for gram in set(ngrams(tokens, n)):
            self.grams[n][gram].append(number)
        for image in images:
            if image.std() >= FLAT:
                self.hashes = np.concatenate([self.hashes, image_hash(image)[None]])
                self.owners.append(number)

    def close(self) -> "Contamination":
        """Drops the phrases that more than COMMON items share."""
        for n, grams in self.grams.items():
            self.grams[n] = {g: items for g, items in grams.items() if len(items) <= COMMON}
        return self

    def hits(self, row: dict, hashes: np.ndarray) -> list[tuple[str, str]]:
        """(benchmark, item) of every item that the row holds.

        Args:
            hashes: uint8 [images, 32] of the row's images.
        """
        found = self.of_text(row_text(row)) | self.of_images(hashes)
        return sorted(self.names[number] for number in found)

    def of_text(self, text: str) -> set[int]:
        """Numbers of the items that share an n-gram with a text."""
        found: set[int] = set()
        tokens = words(text) if any(self.grams.values()) else []
        for n, grams in self.grams.items():
            for gram in ngrams(tokens, n) if grams else ():
                found.update(grams.get(gram, ()))
        return found

    def of_images(self, hashes: np.ndarray) -> set[int]:
        """Numbers of the items with an image near one of uint8 [images, 32]."""
        if not len(self.hashes):
            return set()
        near = [np.flatnonzero(hamming(self.hashes, one) <= NEAR) for one in hashes]
        return {self.owners[i] for found in near for i in found}


def row_text(row: dict) -> str:
    """All that is said and thought in a row."""
    thoughts = [message.get("thinking") or "" for message in row["messages"]]
    return "\n".join([*texts(row), *thoughts])


def _options(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(v) for v in (value.values() if isinstance(value, dict) else value or ())]


def _items(path: Path, images: Path):
    """(id, stem, options, image sources) of a benchmark's file."""
    if path.suffix == ".parquet" or path.is_dir():
        rows = Rows(path)
        for number, row in enumerate(rows):
            yield (
                row["id"],
                "\n".join(texts(row, "user")),
                [],
                image_sources(row, rows.folder(number)),
            )
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            item = json.loads(line)
            if not isinstance(item.get("question"), str):
                raise ValueError(f"benchmark {path.name}: expected a question on line {number + 1}")
            sources = [inside(images, name) for name in item.get("images") or ()]
            yield (
                str(item.get("id", number)),
                item["question"],
                _options(item.get("options")),
                sources,
            )


def contamination(benchmarks) -> Contamination:
    """Of config.Benchmark entries, their images decoded once."""
    from ..images import load_image

    found = Contamination()
    for benchmark in benchmarks:
        path = Path(benchmark.path)
        try:
            for item, stem, options, sources in _items(path, Path(benchmark.images or path.parent)):
                pictures = [load_image(source) for source in sources]
                found.add(benchmark.name, item, stem, options, pictures)
        except RowError as error:
            raise ValueError(f"benchmark {benchmark.name}: {error}") from None
    return found.close()
