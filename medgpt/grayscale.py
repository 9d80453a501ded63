"""Stored grey levels to the 8 bits that a radiologist's viewer shows, by one table an image.

Dims: H height, W width. Levels of 16 bits and less go through a table of at most 65,536 entries, so
that no float image is ever made; wider ones go through the same function a few rows at a time.
"""

import math
from collections.abc import Callable

import numpy as np

# (center, width) in Hounsfield units
CT_WINDOWS = {
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "subdural": (75.0, 215.0),
    "stroke": (32.0, 8.0),
    "abdomen": (50.0, 400.0),
    "liver": (30.0, 150.0),
}
TAIL = 0.001  # part of the pixels cut at each end where no window is known
CHUNK = 2**20  # pixels at a time
Levels = Callable[[np.ndarray], np.ndarray]


class ImageError(ValueError):
    """An image that cannot be shown; its message never holds words from the image's header."""

    def __init__(self, expected: str, got: object):
        super().__init__(f"load_image: expected {expected}, got {got}")


def window_levels(center: float, width: float, function: str = "LINEAR") -> Levels:
    """DICOM's VOI function (PS3.3 C.11.2): values to 0..255 as float64, not yet rounded."""
    from pydicom import Dataset
    from pydicom.pixels import apply_windowing

    header = Dataset()
    header.PhotometricInterpretation = "MONOCHROME2"
    header.PixelRepresentation, header.BitsStored = 0, 8  # the output's range
    header.WindowCenter, header.WindowWidth = float(center), float(width)
    header.VOILUTFunction = function
    return lambda values: apply_windowing(values, header)


def linear_levels(low: float, high: float) -> Levels:
    """Values from low (0) to high (255), clipped."""
    scale = 255 / (high - low) if high > low else 0.0
    return lambda values: (np.clip(np.asarray(values, np.float64), low, high) - low) * scale


def robust_levels(values: np.ndarray, counts: np.ndarray | None = None) -> Levels:
    """From the 0.1st to the 99.9th percentile, or over the whole range where these meet."""
    if not values.size:
        return linear_levels(0, 0)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    seen = np.arange(1, len(order) + 1) if counts is None else np.cumsum(counts[order])
    low, high = ordered[np.searchsorted(seen, [TAIL * seen[-1], (1 - TAIL) * seen[-1]])]
    return linear_levels(low, high) if high > low else linear_levels(ordered[0], ordered[-1])


def named_window(window) -> tuple[float, float]:
    """(center, width) of a name in CT_WINDOWS or of such a pair."""
    if isinstance(window, str):
        if window not in CT_WINDOWS:
            raise ImageError(f"a window among {', '.join(CT_WINDOWS)}", "another name")
        return CT_WINDOWS[window]
    try:
        center, width = (float(number) for number in window)
    except (TypeError, ValueError):
        center = width = math.nan
    if not (math.isfinite(center) and math.isfinite(width) and width >= 1):
        raise ImageError("a window's name or (center, width) with width >= 1", "something else")
    return center, width


def by_rows(function: Callable, image: np.ndarray, dtype=np.uint8) -> np.ndarray:
    """function(rows) for a few rows at a time, which keep their shape."""
    rows = max(1, CHUNK // max(1, image[0].size))
    out = np.empty(image.shape, dtype)
    for start in range(0, len(image), rows):
        out[start : start + rows] = function(image[start : start + rows])
    return out


def show(
    stored: np.ndarray,
    voi: Levels | None = None,
    *,
    modality: Levels = lambda values: values,
    padding: tuple[float, float] | None = None,
    inverted: bool = False,
) -> np.ndarray:
    """The uint8 picture [H, W] of stored levels.

    Args:
        stored: [H, W] integers or floats; floats must be finite.
        voi: modality values to 0..255; default robust_levels of the picture.
        modality: stored levels to modality values, a Hounsfield unit for one.
        padding: stored levels from, to (inclusive) that are background: black, and not counted.
        inverted: low values are bright (MONOCHROME1).
    """
    narrow = stored.dtype.kind in "uib" and stored.dtype.itemsize <= 2
    if narrow:
        first = int(stored.min())
        levels = np.arange(first, int(stored.max()) + 1, dtype=np.int32)
        counts = np.zeros(len(levels), np.int64)
        rows = max(1, CHUNK // stored.shape[1])
        for start in range(0, len(stored), rows):
            offsets = stored[start : start + rows].astype(np.int32).ravel() - first
            counts += np.bincount(offsets, minlength=len(levels))
    else:
        if stored.dtype.kind == "f" and not all(np.isfinite(row).all() for row in stored):
            raise ImageError("finite levels", "NaN or infinity")
        levels = stored.ravel()[:: max(1, stored.size // CHUNK)].astype(np.float64)
        counts = np.ones(len(levels), np.int64)
    if voi is None:
        kept = counts > 0
        if padding is not None:
            kept &= (levels < padding[0]) | (levels > padding[1])
        voi = robust_levels(np.asarray(modality(levels[kept])), counts[kept])

    def grey(values: np.ndarray) -> np.ndarray:
        shown = np.rint(np.clip(voi(modality(values)), 0, 255)).astype(np.uint8)
        if inverted:
            shown = 255 - shown
        if padding is not None:
            shown[(values >= padding[0]) & (values <= padding[1])] = 0
        return shown

    if not narrow:
        return by_rows(lambda rows: grey(rows.astype(np.float64)), stored)
    table = grey(levels)
    return by_rows(lambda rows: table[rows.astype(np.int32) - first], stored)
