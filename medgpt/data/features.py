"""What duplicates are found by: digests, MinHash of the words, perceptual hashes of the images."""

import hashlib
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from .rows import texts

PERMUTATIONS, SCHEME = 128, "affine32"  # of datasketch 2
SHINGLE = 3  # words
HASH_SIDE = 16  # 256 bits
BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
# Chinese has no spaces: each of its characters is a word
WORDS = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+(?:[.,]\d+)*")


class Features(NamedTuple):
    """Of one row."""

    text: bytes  # digest of the words
    images: bytes  # digest of the pictures' levels
    minhash: bytes  # uint32 [PERMUTATIONS]
    hashes: bytes  # uint8 [images, 32]


def words(text: str) -> list[str]:
    """Words and numbers of a text, in small letters."""
    return WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def said(row: dict) -> list[str]:
    """The words that make the row what it is: without a prompt that all of its source share."""
    role = "assistant" if row["meta"].get("prompt") == "shared" else None
    return words("\n".join(texts(row, role)))


def minhash(tokens: list[str]) -> np.ndarray:
    """uint32 [PERMUTATIONS] over shingles of SHINGLE words, or the whole where it is shorter."""
    from datasketch import MinHash

    last = max(1, len(tokens) - SHINGLE + 1)
    shingles = {" ".join(tokens[i : i + SHINGLE]).encode() for i in range(last)}
    sketch = MinHash(num_perm=PERMUTATIONS, seed=1, scheme=SCHEME)
    sketch.update_batch(sorted(shingles))
    return np.asarray(sketch.hashvalues, np.uint32)


def image_hash(image: np.ndarray) -> np.ndarray:
    """uint8 [32]: the perceptual hash (DCT) of uint8 [H, W, 3]."""
    from imagehash import phash
    from PIL import Image

    return np.packbits(phash(Image.fromarray(image), hash_size=HASH_SIDE).hash.reshape(-1))


def features(row: dict, images: list[np.ndarray]) -> Features:
    """Of a row and its pictures as load_image shows them."""
    tokens = said(row)
    pixels = hashlib.sha256()
    for image in images:
        pixels.update(repr(image.shape).encode())
        pixels.update(np.ascontiguousarray(image))
    return Features(
        hashlib.sha256(" ".join(tokens).encode()).digest()[:16],
        pixels.digest()[:16],
        minhash(tokens).astype("<u4").tobytes(),
        b"".join(image_hash(image).tobytes() for image in images),
    )


def hamming(hashes: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Bits that differ: hashes uint8 [n, 32] against one uint8 [32]."""
    return BITS[hashes ^ one].sum(-1, dtype=np.int64)
