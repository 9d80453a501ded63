"""Pictures, arrays and DICOM to uint8 RGB: one function, bounded in memory, nothing fetched.

Dims: H height, W width.
"""

import math
import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .dicom import MAX_DECODED_BYTES, quiet, read_frame
from .grayscale import CT_WINDOWS, ImageError, named_window, show, window_levels

__all__ = ["CT_WINDOWS", "MAX_PIXELS", "ImageError", "load_image"]

ORIENTATION = 0x0112  # EXIF's tag
# whose readers start no other program
FORMATS = ("JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000")
LARGE_FILE = 2**26  # bytes
MAX_PIXELS = 2**24  # of what load_image returns: 4096 x 4096
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
LEVEL_BYTES = {"I": 4, "F": 4, **dict.fromkeys(WIDE_MODES[2:], 2)}


def bounded_size(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Height, width of at most max_pixels in about the same aspect; as they are where they fit."""
    if height * width <= max_pixels:
        return height, width
    scale = math.sqrt(max_pixels / (height * width))
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    return min(height, max_pixels // min(width, max_pixels)), min(width, max_pixels)


def _bounded(image: np.ndarray, max_pixels: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] to RGB [H, W, 3] of at most max_pixels."""
    height, width = bounded_size(*image.shape[:2], max_pixels)
    if (height, width) != image.shape[:2]:
        picture = Image.fromarray(np.ascontiguousarray(image))
        resized = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        image = np.asarray(resized)
    if image.ndim == 3:
        return np.ascontiguousarray(image)
    return np.repeat(image[..., None], 3, axis=2)


def _from_array(values: np.ndarray, window) -> np.ndarray:
    shape = values.shape
    if values.ndim == 3 and shape[2] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and shape[2] in (3, 4))) or not values.size:
        raise ImageError("an array [H, W], [H, W, 1], [H, W, 3] or RGBA, none zero", shape)
    if values.dtype.kind not in "buif":
        raise ImageError("an array of integers or floats", values.dtype)
    if values.dtype.kind == "f" and not all(np.isfinite(row).all() for row in values):
        raise ImageError("finite levels", "NaN or infinity")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if window is not None:
        if values.ndim != 2:
            raise ImageError("window None for a picture in colour", "a window")
        return show(values, window_levels(*named_window(window)))
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    unit = values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1
    if unit:
        values = np.rint(values * 255).astype(np.uint8)
    elif values.ndim == 2 and values.dtype != np.uint8:
        return show(values)
    elif values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ImageError("colours as uint8, uint16 or floats from 0 to 1", values.dtype)
    return values if values.shape[2:] != (4,) else _opaque(Image.fromarray(values))


def _opaque(picture: Image.Image) -> np.ndarray:
    """On white, as a page shows it."""
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture.getchannel("A"))
    return np.asarray(page)


def _from_picture(picture: Image.Image, window, frame: int, max_pixels: int) -> np.ndarray:
    frames = getattr(picture, "n_frames", 1)
    if not 0 <= frame < frames:
        raise ImageError(f"a frame from 0 to {frames - 1}", frame)
    if frame != picture.tell():
        picture.seek(frame)
    width, height = picture.size
    if not (width and height):
        raise ImageError("at least one row and column", f"{height}x{width}")
    if width * height > max_pixels and picture.format == "JPEG":
        small = bounded_size(height, width, max_pixels)
        picture.draft(picture.mode, small[::-1])  # decodes an eighth, a quarter or a half
        width, height = picture.size
    each = LEVEL_BYTES.get(picture.mode, 4 if picture.mode not in ("1", "L") else 1)
    if width * height * each > MAX_DECODED_BYTES:
        raise ImageError(
            f"at most {MAX_DECODED_BYTES >> 20} MiB decoded", f"{height}x{width} pixels"
        )
    if width * height > max_pixels and picture.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"):
        small = bounded_size(height, width, max_pixels)[::-1]
        smaller = picture.resize(small, Image.Resampling.BICUBIC, reducing_gap=3.0)
        smaller.info, picture = picture.info, smaller
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in WIDE_MODES or (window is not None and picture.mode == "L"):
        return _from_array(np.asarray(picture), window)
    if window is not None:
        raise ImageError("window None for a picture in colour", "a window")
    if picture.mode in ("1", "L") and "transparency" not in picture.info:
        return np.asarray(picture.convert("L"))
    if picture.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in picture.info:
        return _opaque(picture.convert("RGBA"))
    return np.asarray(picture.convert("RGB"))


def _from_file(source, window, frame: int, max_pixels: int) -> np.ndarray:
    """A path or bytes; what it is, its content says."""
    is_bytes = isinstance(source, bytes)
    with BytesIO(source) if is_bytes else open(source, "rb") as file:
        dicom = file.read(132)[128:] == b"DICM"
        file.seek(0)
        if not dicom:
            try:
                with Image.open(file, formats=FORMATS) as picture:
                    return _from_picture(picture, window, frame, max_pixels)
            except UnidentifiedImageError:
                file.seek(0)
        from pydicom import dcmread

        # without DICM it may be an old DICOM, or anything; of a large file one frame is read
        large = not is_bytes and os.path.getsize(source) > LARGE_FILE
        data = dcmread(source if large else file, force=True, defer_size=2**16 if large else None)
        return read_frame(data, source=source if large else None, window=window, frame=frame)


def _load(source, window, frame: int, max_pixels: int) -> np.ndarray:
    if isinstance(source, (Path, bytes)):
        return _from_file(source, window, frame, max_pixels)
    if isinstance(source, Image.Image):
        return _from_picture(source, window, frame, max_pixels)
    if isinstance(source, np.ndarray):
        if frame != 0:
            raise ImageError("frame 0 of an array", frame)
        return _from_array(source, window)
    return read_frame(source, window=window, frame=frame)


def _checked(source) -> tuple[object, str]:
    """The source with paths as Path, and words for it that may stand in an error."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if re.match(r"(?i)[a-z][a-z0-9+.-]+:", text) and not os.path.exists(text):
            raise ImageError("a path, an array or an image", "a URL: nothing is ever fetched")
        if not os.path.isfile(text):
            raise ImageError("a file", f"a path where none is: {text}")
        return Path(text), text
    if isinstance(source, (Image.Image, np.ndarray, bytes)):
        return source, {np.ndarray: "an array", bytes: "bytes"}.get(type(source), "a picture")
    try:
        from pydicom import Dataset
    except ImportError:
        Dataset = ()
    if not isinstance(source, Dataset):
        raise ImageError("a path, PIL image, array or pydicom dataset", type(source).__name__)
    return source, "a dataset"


def load_image(source, *, window=None, frame: int = 0, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as a viewer shows it: uint8 RGB [H, W, 3].

    DICOM goes through rescale, the header's VOI window or table and MONOCHROME1 as PS3.3 C.11 says;
    pixel padding is black. Grey levels of more than 8 bits without a window are stretched from
    their 0.1st to their 99.9th percentile. Floats from 0 to 1 are taken as such. Transparency is
    laid on white. EXIF orientation is applied.

    Args:
        source: a path or bytes (PNG, JPEG, TIFF, DICOM, ... by content), a PIL image, an array
            [H, W], [H, W, 1], [H, W, 3] or RGBA, or a pydicom dataset. URLs are refused.
        window: a name in CT_WINDOWS or (center, width) in modality values (Hounsfield units of a
            CT), in place of the header's.
        frame: of a multi-frame DICOM, TIFF or GIF, from 0.
        max_pixels: larger images are reduced to it, aspect kept.

    Raises:
        ImageError: a ValueError: what cannot be read, is empty, not finite, or would take more than
            512 MiB decoded. Its message may hold the path, never anything from a header.
    """
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise ImageError("max_pixels >= 1", "something else")
    if isinstance(frame, bool) or not isinstance(frame, int):
        raise ImageError("an integer frame", type(frame).__name__)
    if window is not None:
        named_window(window)
    source, name = _checked(source)
    reason = ""
    try:
        with quiet():
            return _bounded(_load(source, window, frame, max_pixels), max_pixels)
    except ImageError:
        raise
    except Exception as error:  # a library's words may quote the header
        reason = type(error).__name__
    raise ImageError("a readable image", f"{name} ({reason})")
