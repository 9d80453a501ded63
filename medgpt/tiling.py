"""Cuts a picture into InternVL's tiles, or brings it to a size that the vision tower takes whole.

Dims: H height, W width in pixels. Tiling is InternVL's dynamic_preprocess (arXiv 2404.16821, 3.2).
"""

import functools
import math

import numpy as np
from PIL import Image


@functools.cache
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of min_tiles to max_tiles tiles, by area, then columns."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tile_grid(
    height: int, width: int, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 336
) -> tuple[int, int]:
    """(columns, rows) of the closest aspect ratio.

    Of two that are equally close the later, larger one is taken where the picture has more than
    half of its pixels.
    """
    best, best_difference = (1, 1), math.inf
    for columns, rows in candidate_grids(min_tiles, max_tiles):
        difference = abs(width / height - columns / rows)
        enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and enough):
            best, best_difference = (columns, rows), difference
    return best


def native_size(
    height: int, width: int, *, unit: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height, width as multiples of unit, in about the same aspect and within the budget.

    Sides go to the nearest multiple, at least one; past a bound both shrink or grow with the aspect
    kept and go to the multiple on the safe side. A picture so long that one unit of height is too
    much for its aspect gives up length.

    Args:
        unit: pixels a side of one token: patch_size / downsample_ratio.
        min_pixels, max_pixels: of the result; max_pixels >= unit * unit.
    """

    def snapped(scale: float, rounding) -> tuple[int, int]:
        return tuple(max(1, rounding(side * scale / unit)) * unit for side in (height, width))

    new = snapped(1.0, round)
    if new[0] * new[1] > max_pixels:
        new = snapped(math.sqrt(max_pixels / (height * width)), math.floor)
    elif new[0] * new[1] < min_pixels:
        new = snapped(math.sqrt(min_pixels / (height * width)), math.ceil)
    most = max_pixels // unit // unit * unit  # length of a strip one unit high
    new = min(new[0], most), min(new[1], most)
    if new[0] * new[1] > max_pixels:  # min and max too close for a multiple in between
        longer = max_pixels // min(new) // unit * unit
        new = (min(new[0], longer), new[1]) if new[0] > new[1] else (new[0], min(new[1], longer))
    return new


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] to [height, width, 3], bicubic with antialiasing."""
    if image.shape[:2] == (height, width):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def tiles(
    image: np.ndarray,
    *,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = 336,
    use_thumbnail: bool = True,
) -> list[np.ndarray]:
    """uint8 [H, W, 3] to tiles [tile_size, tile_size, 3], row by row.

    The picture is resized as a whole to the grid, its aspect bent to the grid's. Where there is
    more than one tile a thumbnail of the whole picture comes last.
    """
    height, width = image.shape[:2]
    columns, rows = tile_grid(
        height, width, min_tiles=min_tiles, max_tiles=max_tiles, tile_size=tile_size
    )
    whole = resize(image, rows * tile_size, columns * tile_size)
    cut = [
        whole[y * tile_size : (y + 1) * tile_size, x * tile_size : (x + 1) * tile_size]
        for y in range(rows)
        for x in range(columns)
    ]
    if use_thumbnail and len(cut) > 1:
        cut.append(resize(image, tile_size, tile_size))
    return cut
