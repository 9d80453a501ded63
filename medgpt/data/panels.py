"""Whether a picture is one panel, a figure of several, or an interface's screenshot.

Dims: H height, W width.
"""

import re

import numpy as np

from .glyphs import grey, text_lines

FLAT, MOST = 12, 0.98  # of a gutter's pixels so many are within so many grey levels of its tone
EDGE = 24  # grey levels of a panel's border against the gutter
BORDER = 0.7  # part of one panel's border that has to stand out
SHARE = 0.12  # of the side, that a panel takes at least
FRAME = 0.02  # of the side: what lies at the picture's own rim is no gutter
SCREEN_LETTERS, SCREEN_FLAT = 40, 0.3
LABELS = re.compile(r"(?<![\w.])\(?([a-h])(?:\)|[.:](?=\s))", re.IGNORECASE)
SIDES = re.compile(
    r"\b(?:left|right|top|bottom|upper|lower)\s+(?:panel|row|column)s?\b"
    r"|\b(?:two|three|four|multiple|several)[- ]panel|\bpanels\b",
    re.IGNORECASE,
)


def _gutters(level: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Bands of columns (start, stop) even from top to bottom, with a panel's border on a side.

    The second is bool [W], the even columns.
    """
    width = level.shape[1]
    columns = level.astype(np.int16)
    tones = np.median(columns, axis=0)
    even = (abs(columns - tones) <= FLAT).mean(0) >= MOST
    joined = even[1:] & even[:-1] & (abs(np.diff(tones)) <= FLAT)
    starts = np.flatnonzero(even & ~np.r_[False, joined])
    stops = np.flatnonzero(even & ~np.r_[joined, False]) + 1
    found = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if start <= FRAME * width or stop >= (1 - FRAME) * width:
            continue
        # three columns further, past the smear of a JPEG
        sides = columns[:, max(0, start - 4)], columns[:, min(width - 1, stop + 3)]
        tone = np.median(tones[start:stop])
        if max((abs(side - tone) > EDGE).mean() for side in sides) >= BORDER:
            found.append((start, stop))
    return found, even


def panel_count(image: np.ndarray) -> int:
    """Panels of uint8 [H, W, 3] that even gutters part, by columns or by rows; 1: none do.

    A gutter of the panels' own ground, black between two slices on black, is not seen.
    """
    level = grey(image)
    most = 1
    for view in (level, level.T):
        gutters, even = _gutters(view)
        edges = [0, *[e for pair in gutters for e in pair], view.shape[1]]
        spans = zip(edges[::2], edges[1::2], strict=True)
        panels = [(a, b) for a, b in spans if b - a >= SHARE * view.shape[1]]
        most = max(most, sum(even[a:b].mean() < 0.5 for a, b in panels))
    return most


def names_panels(caption: str) -> bool:
    """Whether a caption speaks of panels: "(A) ... (B) ...", "left panel"."""
    labels = {label.lower() for label in LABELS.findall(caption)}
    return {"a", "b"} <= labels or bool(SIDES.search(caption))


def is_screenshot(image: np.ndarray) -> bool:
    """Many letters and large areas of one tone that is not black: an interface, a chart."""
    level = grey(image)
    if min(level.shape) < 2:
        return False
    inner = level[:-1, :-1]
    flat = (inner == level[1:, :-1]) & (inner == level[:-1, 1:]) & (inner > 16)
    if flat.mean() < SCREEN_FLAT:
        return False
    return sum(line.letters for line in text_lines(image)) >= SCREEN_LETTERS
