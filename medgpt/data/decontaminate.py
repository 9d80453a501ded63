"""Rows that hold what a benchmark asks: its words in a row, or its images."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .features import hamming, image_hash, words
from .reader import Rows, image_sources
from .rows import RowError, inside, texts

LONG, SHORT = 13, 8  # words of an n-gram; SHORT for stems of fewer than LONG words
COMMON = 10  # n-grams of more items than these are phrases of the exam, not an item
NEAR = 16  # of 256 bits


def ngrams(tokens: list[str], n: int) -> set[str]:
    return {" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


class Contamination:
    """Word n-grams and image hashes of benchmarks' items.

    An item's words are its stem and options. Items of fewer than SHORT words ("Is there a
    pneumothorax?") are found by their images alone: their words stand in honest rows as well.
    """

    def __init__(self):
        self.names: list[tuple[str, str]] = []  # benchmark, item
        self.grams: dict[int, dict[str, list[int]]] = {
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
        for gram in ngrams(tokens, n):
            self.grams[n][gram].append(number)
        for image in images:
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
        found: set[int] = set()
        if self.names:
            thoughts = [message.get("thinking") or "" for message in row["messages"]]
            tokens = words("\n".join([*texts(row), *thoughts]))
            for n, grams in self.grams.items():
                for gram in ngrams(tokens, n) if grams else ():
                    found.update(grams.get(gram, ()))
        if len(self.hashes):
            for one in hashes:
                near = np.flatnonzero(hamming(self.hashes, one) <= NEAR)
                found.update(self.owners[i] for i in near)
        return sorted(self.names[number] for number in found)


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
