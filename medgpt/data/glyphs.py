"""Letters drawn into a picture: components of a stroke's size that stand in lines.

Dims: H height, W width. No model and no alphabet: what is found is crisp, of one height, on a
common base line, on a calm ground, as overlays of scanners and interfaces are and tissue is not.
"""

from typing import NamedTuple

import numpy as np

LARGEST_SIDE = 1600  # larger pictures are reduced to it
CONTRAST = 44  # grey levels between stroke and ground
STROKE = 9  # pixels: wider strokes are not seen
HEIGHTS = 6, 64  # pixels of a letter
LEAST = 4  # letters of a line


class Line(NamedTuple):
    """A line of letters: its box in pixels of the reduced picture, and how many."""

    top: int
    left: int
    bottom: int
    right: int
    letters: int


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [H, W] of at most LARGEST_SIDE a side."""
    from PIL import Image

    picture = Image.fromarray(image).convert("L")
    scale = LARGEST_SIDE / max(picture.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.BOX)
    return np.asarray(picture)


def _letters(level: np.ndarray) -> np.ndarray:
    """int [n, 5]: top, left, bottom, right, brightness of strokes brighter than around."""
    from scipy import ndimage

    ground = ndimage.grey_opening(level, size=(STROKE, STROKE))
    strokes = (level.astype(np.int16) - ground) > CONTRAST
    labels, count = ndimage.label(strokes, np.ones((3, 3)))
    if not count:
        return np.empty((0, 5), np.int64)
    boxes = np.array(
        [(y.start, x.start, y.stop, x.stop) for y, x in ndimage.find_objects(labels)], np.int64
    )
    numbers = np.arange(1, count + 1)
    area = ndimage.sum_labels(strokes, labels, numbers)
    bright = ndimage.mean(level, labels, numbers)
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    fits = (height >= HEIGHTS[0]) & (height <= HEIGHTS[1]) & (width <= 1.5 * height)
    fits &= (area >= 0.15 * height * width) & ((width > 2) | (area > 0.8 * height * width))
    return np.column_stack([boxes, bright.astype(np.int64)])[fits]


def _chains(found: np.ndarray) -> list[np.ndarray]:
    """Letters joined from left to right: the same height and base, close together."""
    found = found[np.lexsort((found[:, 0], found[:, 1]))]
    chains: list[list[int]] = []
    based: dict[int, list[int]] = {}  # base line: chains whose last letter stands on it
    letters = found.tolist()
    for i, (top, left, bottom, _, bright) in enumerate(letters):
        height = bottom - top
        slack = max(1, round(0.12 * height))
        best = None
        for base in range(bottom - slack, bottom + slack + 1):
            for number in reversed(based.get(base, ())):
                last = letters[chains[number][-1]]
                gap = left - last[3]
                if left - last[1] > 4 * HEIGHTS[1]:
                    break
                near = -1 <= gap <= 1.3 * max(height, last[2] - last[0])
                alike = abs(last[0] - top) <= slack and abs(last[4] - bright) <= 50
                if near and alike and (best is None or number > best):
                    best = number
        if best is None:
            best = len(chains)
            chains.append([])
        else:
            based[letters[chains[best][-1]][2]].remove(best)
        chains[best].append(i)
        based.setdefault(bottom, []).append(best)
    return [found[chain] for chain in chains if len(chain) >= LEAST]


def _calm(level: np.ndarray, chain: np.ndarray) -> bool:
    """Whether what stands between and around the letters is even."""
    top, left = chain[:, 0].min() - 2, chain[:, 1].min() - 2
    bottom, right = chain[:, 2].max() + 2, chain[:, 3].max() + 2
    patch = level[max(0, top) : bottom, max(0, left) : right].astype(np.float32)
    ground = patch[patch < np.median(chain[:, 4]) - CONTRAST]
    return ground.size > 0.3 * patch.size and np.percentile(ground, 75) - ground.min() < 24


def text_lines(image: np.ndarray) -> list[Line]:
    """Lines of at least LEAST letters, bright on dark or dark on bright, in uint8 [H, W, 3]."""
    level = grey(image)
    lines = []
    for shade in (level, 255 - level):
        for chain in _chains(_letters(shade)):
            if _calm(shade, chain):
                lines.append(
                    Line(
                        int(chain[:, 0].min()),
                        int(chain[:, 1].min()),
                        int(chain[:, 2].max()),
                        int(chain[:, 3].max()),
                        len(chain),
                    )
                )
    return lines


def letters(image: np.ndarray) -> int:
    """Letters that stand in lines."""
    return sum(line.letters for line in text_lines(image))
