"""Exact and near duplicates, the first of each kept, rows in their order.

What is kept is in an index on disk: memory does not grow with the rows.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator

import numpy as np

from .features import PERMUTATIONS, Features, hamming

CACHE_BYTES = 256 << 20
TABLES = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;
CREATE TABLE exact (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE kept (row INTEGER PRIMARY KEY, minhash BLOB, hashes BLOB);
CREATE TABLE bands (key INTEGER, row INTEGER, PRIMARY KEY (key, row)) WITHOUT ROWID;
BEGIN;
"""


class Duplicates:
    """Tells of each row in turn whether an earlier kept row makes it a duplicate.

    A row repeats another if its text does (the same words, or near_text Jaccard of its shingles by
    MinHash) and its images do (as many, each within near_image bits of the other's): many reports
    say the same of different patients, and many questions share an image. With mode "image" images
    alone decide, for caption sets; rows without images then go by their text.

    Rows are looked up by parts ("bands") of the first image's hash, of which one is the same where
    at most near_image bits differ; rows without images by parts of their MinHash, as
    locality-sensitive hashing does.

    Args:
        path: of the index, about 1.5 KB a kept row, made anew; None keeps it in memory.
    """

    def __init__(
        self,
        *,
        mode: str = "joint",
        near_text: float = 0.8,
        near_image: int = 16,
        path: str | os.PathLike | None = None,
    ):
        self.mode, self.near_text, self.near_image = mode, near_text, near_image
        self.count = 0
        if path is not None and os.path.exists(path):
            os.unlink(path)
        self.index = sqlite3.connect(path or ":memory:", isolation_level=None)
        self.index.execute(f"PRAGMA cache_size = -{CACHE_BYTES >> 10}")
        self.index.executescript(TABLES)
        if near_text and mode != "off":
            from datasketch import MinHashLSH

            found = MinHashLSH(threshold=near_text, num_perm=PERMUTATIONS)
            self.text_bands = found.b, found.r  # how many, of how many values

    def close(self) -> None:
        self.index.close()

    def fault(self, row: Features) -> str | None:
        """ "duplicate", "near_duplicate" or None, after which the row counts as kept."""
        if self.mode == "off":
            return None
        hashes = np.frombuffer(row.hashes, np.uint8).reshape(-1, 32)
        by_image = self.mode == "image" and len(hashes)
        key = b"i" + row.images if by_image else b"t" + row.text + row.images
        if self.index.execute("SELECT 1 FROM exact WHERE key = ?", (key,)).fetchone():
            return "duplicate"
        bands = list(self._image_bands(hashes) if len(hashes) else self._text_bands(row))
        if self._near(bands, hashes, row, by_image):
            return "near_duplicate"
        self.index.execute("INSERT INTO exact VALUES (?)", (key,))
        kept = self.count, row.minhash, row.hashes
        self.index.execute("INSERT INTO kept VALUES (?, ?, ?)", kept)
        entries = ((band, self.count) for band in bands)
        self.index.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", entries)
        self.count += 1
        return None

    def _near(self, bands: list[int], hashes: np.ndarray, row: Features, by_image) -> bool:
        if not bands or not (by_image or self.near_text):
            return False
        marks = ",".join("?" * len(bands))
        found = self.index.execute(
            "SELECT minhash, hashes FROM kept WHERE length(hashes) = ? AND row IN "
            f"(SELECT row FROM bands WHERE key IN ({marks}))",
            (len(row.hashes), *bands),
        ).fetchall()
        if not found:
            return False
        near = np.ones(len(found), bool)
        if len(hashes):
            others = np.frombuffer(b"".join(h for _, h in found), np.uint8)
            others = others.reshape(len(found), -1, 32)
            for place, own in enumerate(hashes):
                near &= hamming(others[:, place], own) <= self.near_image
        if not by_image:
            others = np.frombuffer(b"".join(m for m, _ in found), "<u4")
            same = others.reshape(len(found), -1) == np.frombuffer(row.minhash, "<u4")
            near &= same.mean(1) >= self.near_text
        return bool(near.any())

    def _image_bands(self, hashes: np.ndarray) -> Iterator[int]:
        bits = np.unpackbits(hashes[0])
        for band, part in enumerate(np.array_split(bits, self.near_image + 1)):
            yield _key(b"image", band, np.packbits(part).tobytes())

    def _text_bands(self, row: Features) -> Iterator[int]:
        if self.near_text:
            count, size = self.text_bands
            for band in range(count):
                yield _key(b"text", band, row.minhash[4 * size * band : 4 * size * (band + 1)])


def _key(kind: bytes, band: int, part: bytes) -> int:
    content = kind + bytes([band]) + part
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
