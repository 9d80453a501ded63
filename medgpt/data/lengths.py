"""Tokens of every row, counted once without decoding a picture and stored beside the rows.

A row that cannot be trained on has the code of its reason in place of a count: nothing stops at it.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .pictures import image_fault
from .reader import BROKEN, Rows, image_sources
from .rows import RowError

CHUNK = 512
# stored as -1 - place, so that new ones go last
REASONS = (
    "bad_row",
    "bad_message",
    "no_answer",
    "empty_text",
    "image_count",
    "path_outside",
    "missing_image",
    "unreadable_image",
    "image_too_large",
    "image_too_small",
    "dicom_without_pixels",
    BROKEN,
)
PROBE = "No acute cardiopulmonary abnormality. 3.5 mm nodule, 2.1 x 4.0 cm; T2/FLAIR \u2265 1."
SETTINGS = (
    "vision_mode",
    "tile_size",
    "min_tiles",
    "max_tiles",
    "use_thumbnail",
    "min_pixels",
    "max_pixels",
    "patch_size",
    "downsample_ratio",
)


def shown_size(source: bytes | Path) -> tuple[int, int]:
    """Height, width that load_image would return, from the file's header where that tells.

    Raises:
        RowError: an image that load_image refuses, with the reason.
    """
    from PIL import Image

    from ..images import FORMATS, MAX_PIXELS, ImageError, bounded_size, load_image

    try:
        file = BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # turned by a quarter
                height, width = width, height
        if height * width <= MAX_PIXELS:
            return bounded_size(height, width, MAX_PIXELS)
    except Exception:  # not of Pillow: a DICOM, or no picture
        pass
    try:
        return load_image(source).shape[:2]  # a large JPEG may come reduced
    except ImageError:
        raise RowError(image_fault(source)) from None


def row_length(row: dict, processor, folder, **render_kwargs) -> int:
    """Tokens of a row with its images', 0 where no token is a target; or a RowError."""
    from ..chat import render

    counts = []
    for image, source in zip(row["images"], image_sources(row, folder), strict=True):
        size = image.get("height"), image.get("width")
        counts.append(
            processor.image_processor.num_tokens(*(size if all(size) else shown_size(source)))
        )
    kwargs = {"system_prompt": processor.system_prompt, **render_kwargs}
    try:
        rendered = render(row["messages"], processor.tokenizer, image_tokens=counts, **kwargs)
    except ValueError:  # an order of roles that Harmony has not
        raise RowError("bad_message") from None
    return len(rendered.input_ids) if any(rendered.assistant_mask[1:]) else 0


def _count(number: int, rows: Rows, processor, render_kwargs: dict) -> int:
    try:
        return row_length(rows[number], processor, rows.folder(number), **render_kwargs)
    except RowError as error:
        return -1 - REASONS.index(error.reason)


def reasons(lengths: np.ndarray) -> dict[str, int]:
    """How many rows have no count, by reason."""
    codes, counts = np.unique(lengths[lengths < 0], return_counts=True)
    return {REASONS[-1 - c]: n for c, n in zip(codes.tolist(), counts.tolist(), strict=True)}


def _chunk(numbers: range, **kwargs) -> list[int]:
    return [_count(number, **kwargs) for number in numbers]


def _footer(file: Path) -> str:
    """A digest of a parquet file's footer: its columns' places, sizes and extremes."""
    with open(file, "rb") as opened:
        opened.seek(-8, os.SEEK_END)
        size = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - size, os.SEEK_END)
        return hashlib.sha256(opened.read(size)).hexdigest()


def _key(rows: Rows, processor, render_kwargs: dict) -> str:
    """Of all that the counts depend on."""
    files = [_footer(file) for file in rows.files]
    settings = [getattr(processor.image_processor, name) for name in SETTINGS]
    probe = processor.tokenizer(PROBE, add_special_tokens=False).input_ids
    said = [files, settings, probe, processor.system_prompt, sorted(render_kwargs.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def row_lengths(rows: Rows, processor, *, workers: int = 1, **render_kwargs) -> np.ndarray:
    """int32 [rows]: row_length of each, read from `lengths-*.npy` beside the first file if there.

    A row that cannot be trained on has -1 - its place in REASONS, and is tried again each time: its
    image may be there by now. Where that folder cannot be written the counts are not kept.
    """
    from ..chat import render

    probe = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    render(probe, processor.tokenizer, **render_kwargs)  # bad render_kwargs are no row's fault
    path = rows.files[0].parent / f"lengths-{_key(rows, processor, render_kwargs)}.npy"
    kwargs = {"rows": rows, "processor": processor, "render_kwargs": render_kwargs}
    if not path.is_file():
        lengths = _counted(partial(_chunk, **kwargs), len(rows), workers)
    else:
        stored = np.load(path, allow_pickle=False)
        lengths = stored.copy()
        for number in np.flatnonzero(stored < 0).tolist():
            lengths[number] = _count(number, **kwargs)
        if np.array_equal(lengths, stored):
            return lengths
    _store(path, lengths)
    return lengths


def _counted(count, rows: int, workers: int) -> np.ndarray:
    from tqdm import tqdm

    chunks = [range(at, min(at + CHUNK, rows)) for at in range(0, rows, CHUNK)]
    with contextlib.ExitStack() as stack:
        each = map
        if workers > 1 and len(chunks) > 1:
            each = stack.enter_context(
                ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
            ).map
        # a bar where someone looks
        bar = tqdm(each(count, chunks), "counting tokens", len(chunks), disable=None, delay=2)
        return np.array([n for chunk in bar for n in chunk], np.int32)


def _store(path: Path, lengths: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, lengths)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
