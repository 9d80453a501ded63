"""One image of a row: read, checked, cleaned; or the reason why it is left out."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..images import FORMATS
from .clean import clean_dicom, clean_picture, identifiers, is_dicom, read_dicom
from .rows import RowError

MAX_BYTES = 2**30  # of a file


class Picture(NamedTuple):
    image: np.ndarray  # uint8 [H, W, 3] as load_image shows it
    content: bytes  # the file to keep
    known: list[str]  # what a header names the patient by
    burned_in: bool  # what a header says of text in the picture


def _content(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    if not source.is_file():
        raise RowError("missing_image")
    if source.stat().st_size > MAX_BYTES:
        raise RowError("image_too_large")
    return source.read_bytes()


def _check_pixels(height, width, max_pixels: int, min_side: int) -> None:
    if height * width > max_pixels:
        raise RowError("image_too_large")
    if min(height, width) < min_side:
        raise RowError("image_too_small")


def _size(content: bytes) -> tuple[int, int] | None:
    """Height, width of a picture without decoding it; None: no picture that Pillow knows."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(content), formats=FORMATS) as picture:
                return picture.size[::-1]
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        raise RowError("image_too_large") from None
    except Exception:
        raise RowError("unreadable_image") from None


def image_fault(source: bytes | Path) -> str:
    """Why load_image does not take an image that it refused."""
    try:
        read_picture(source, max_pixels=2**40, min_side=1, clean=False)
    except RowError as error:
        return error.reason
    except Exception:  # of a decoder; what it says may quote the header
        return "unreadable_image"
    return "unreadable_image"


def read_picture(
    source: bytes | Path, *, max_pixels: int, min_side: int, clean: bool = True
) -> Picture:
    """An image file.

    Raises:
        RowError: missing_image, unreadable_image, image_too_large, image_too_small,
            dicom_without_pixels.
    """
    from ..images import ImageError, load_image

    content = _content(source)
    size, known, burned_in, data = None, [], False, None
    if not is_dicom(content):
        size = _size(content)
    if size is None:
        data = read_dicom(content)
        size = data.get("Rows"), data.get("Columns")
        if not is_dicom(content) and not all(isinstance(n, int) for n in size):
            raise RowError("unreadable_image")
        known = identifiers(data)
        burned_in = str(data.get("BurnedInAnnotation", "")).upper() == "YES"
        if clean or not any(k in data for k in ("PixelData", "FloatPixelData")):
            cleaned = clean_dicom(data)  # says which have no pixels
        if not all(isinstance(n, int) for n in size):
            raise RowError("unreadable_image")
    _check_pixels(*size, max_pixels, min_side)
    try:
        image = load_image(content)
    except (ImageError, MemoryError):
        raise RowError("unreadable_image") from None
    if clean:
        content = cleaned if data is not None else clean_picture(content, image)
    return Picture(image, content, known, burned_in)
