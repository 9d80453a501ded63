"""Tokens of every row, counted once without decoding a picture and stored beside the rows."""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .rows import Rows, image_sources

CHUNK = 512
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
    """Height, width that load_image would return, from the file's header where that tells."""
    from PIL import Image, UnidentifiedImageError

    from ..images import MAX_PIXELS, bounded_size, load_image

    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # turned by a quarter
                height, width = width, height
    except (UnidentifiedImageError, OSError):
        return load_image(source).shape[:2]
    if height * width > MAX_PIXELS:
        return load_image(source).shape[:2]  # a JPEG may come reduced
    return bounded_size(height, width, MAX_PIXELS)


def row_length(row: dict, processor, folder, **render_kwargs) -> int:
    """Tokens of a row with its images', 0 where no token is a target."""
    from ..chat import render

    counts = []
    for image, source in zip(row["images"], image_sources(row, folder), strict=True):
        size = image.get("height"), image.get("width")
        counts.append(
            processor.image_processor.num_tokens(*(size if all(size) else shown_size(source)))
        )
    kwargs = {"system_prompt": processor.system_prompt, **render_kwargs}
    rendered = render(row["messages"], processor.tokenizer, image_tokens=counts, **kwargs)
    return len(rendered.input_ids) if any(rendered.assistant_mask[1:]) else 0


def _chunk(start: int, rows: Rows, processor, render_kwargs: dict) -> list[int]:
    numbers = range(start, min(start + CHUNK, len(rows)))
    return [row_length(rows[n], processor, rows.folder(n), **render_kwargs) for n in numbers]


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

    Where that folder cannot be written the counts are not kept.
    """
    path = rows.files[0].parent / f"lengths-{_key(rows, processor, render_kwargs)}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    count = partial(_chunk, rows=rows, processor=processor, render_kwargs=render_kwargs)
    starts = range(0, len(rows), CHUNK)
    if workers > 1 and len(starts) > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            counted = list(pool.map(count, starts))
    else:
        counted = list(map(count, starts))
    lengths = np.array([n for chunk in counted for n in chunk], np.int32)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, lengths)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
    return lengths
