"""Exact and near duplicates, the first of each kept, rows in their order."""

from collections import defaultdict

import numpy as np

from .features import PERMUTATIONS, SCHEME, Features, hamming


class Duplicates:
    """Tells of each row in turn whether an earlier kept row makes it a duplicate.

    A row repeats another if its text does (the same words, or near_text Jaccard of its shingles by
    MinHash) and its images do (as many, each within near_image bits of the other's): many reports
    say the same of different patients, and many questions share an image. With mode "image" images
    alone decide, for caption sets; rows without images then go by their text.

    Memory: about 4 KB a kept row.
    """

    def __init__(self, *, mode: str = "joint", near_text: float = 0.8, near_image: int = 16):
        self.mode, self.near_text, self.near_image = mode, near_text, near_image
        self.exact: set = set()
        self.hashes: list[np.ndarray] = []  # of each kept row
        self.bands: dict = defaultdict(list)
        self.index = None
        if near_text and mode != "off":
            from datasketch import MinHashLSH

            self.index = MinHashLSH(threshold=near_text, num_perm=PERMUTATIONS)
            self.sketches: list[np.ndarray] = []

    def fault(self, row: Features) -> str | None:
        """ "duplicate", "near_duplicate" or None, after which the row counts as kept."""
        if self.mode == "off":
            return None
        hashes = np.frombuffer(row.hashes, np.uint8).reshape(-1, 32)
        by_image = self.mode == "image" and len(hashes)
        key = row.images if by_image else (row.text, row.images)
        if key in self.exact:
            return "duplicate"
        if by_image:
            near = self._near_images(hashes)
        else:
            near = self._near_texts(row, hashes)
        if near:
            return "near_duplicate"
        self.exact.add(key)
        self._add(row, hashes, by_image)
        return None

    def _alike(self, number: int, hashes: np.ndarray) -> bool:
        other = self.hashes[number]
        if len(other) != len(hashes):
            return False
        return all(
            hamming(a[None], b)[0] <= self.near_image for a, b in zip(other, hashes, strict=True)
        )

    def _near_texts(self, row: Features, hashes: np.ndarray) -> bool:
        if self.index is None:
            return False
        sketch = _sketch(row)
        for number in sorted(self.index.query(sketch)):
            similar = (self.sketches[number] == sketch.hashvalues).mean()
            if similar >= self.near_text and self._alike(number, hashes):
                return True
        return False

    def _bands(self, hashes: np.ndarray):
        """Parts of a hash: where at most near_image bits differ one of them is the same."""
        count = self.near_image + 1
        bits = np.unpackbits(hashes[0])
        for band, part in enumerate(np.array_split(bits, count)):
            yield band, np.packbits(part).tobytes()

    def _near_images(self, hashes: np.ndarray) -> bool:
        numbers = {n for key in self._bands(hashes) for n in self.bands.get(key, ())}
        return any(self._alike(number, hashes) for number in sorted(numbers))

    def _add(self, row: Features, hashes: np.ndarray, by_image) -> None:
        number = len(self.hashes)
        self.hashes.append(hashes)
        if by_image:
            for key in self._bands(hashes):
                self.bands[key].append(number)
        if self.index is not None:
            sketch = _sketch(row)
            self.sketches.append(np.frombuffer(row.minhash, "<u4"))
            if not by_image:
                self.index.insert(number, sketch, check_duplication=False)


def _sketch(row: Features):
    from datasketch import LeanMinHash

    values = np.frombuffer(row.minhash, "<u4")
    return LeanMinHash(seed=1, hashvalues=values, scheme=SCHEME)
