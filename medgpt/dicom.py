"""One frame of a DICOM dataset as 8 bits, by the grey-scale pipeline of PS3.3 C.11.

Dims: H height, W width. Headers name patients: nothing read here reaches an error's words, a
warning or the log.
"""

import contextlib
import logging
import struct
import threading
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .grayscale import (
    ImageError,
    Levels,
    by_rows,
    linear_levels,
    named_window,
    show,
    window_levels,
)

MAX_DECODED_BYTES = 2**29  # of one decoded frame or picture
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
GREY_KEYWORDS = (
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
)
_quiet = threading.local()


def _heard(record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "on", False)


@contextlib.contextmanager
def quiet():
    """pydicom's warnings quote values of the header: none is shown or logged in here."""
    for name in ("pydicom", "pydicom.pixels.decoders.base", "pydicom.pixels.utils"):
        logging.getLogger(name).addFilter(_heard)  # the same filter is added once
    _quiet.on = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _quiet.on = False


def _item(sequence, index: int = 0):
    return sequence[index] if sequence and len(sequence) > index else None


def grey_header(data, frame: int):
    """Rescale and window of a frame: the dataset's, or its functional groups' (enhanced CT, MR)."""
    from pydicom import Dataset

    header = Dataset()
    sources = [data]
    for groups in (
        _item(data.get("SharedFunctionalGroupsSequence")),
        _item(data.get("PerFrameFunctionalGroupsSequence"), frame),
    ):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            sources.append(_item(groups.get(name)) if groups is not None else None)
    for source in sources:
        for keyword in GREY_KEYWORDS:
            # an empty element says nothing
            if source is not None and source.get(keyword) not in (None, ""):
                header[keyword] = source[keyword]
    header.set_original_encoding(*data.original_encoding)
    if getattr(data, "file_meta", None) is not None:
        header.file_meta = data.file_meta
    return header


def _first(value) -> float:
    return float(value if isinstance(value, (int, float, str)) else value[0])


def _voi_table(item, little_endian: bool) -> Levels:
    # pydicom's apply_voi counts entries in the table's own depth: past 255 an 8-bit one wraps
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "<u2" if little_endian else ">u2")
    table = np.asarray(data, np.float64)[: entries or 2**16] * (255 / (2**bits - 1))

    def levels(values: np.ndarray) -> np.ndarray:
        return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]

    return levels


def voi_levels(header) -> Levels | None:
    """The header's first VOI table or window; None where it has none that the standard allows."""
    item = _item(header.get("VOILUTSequence"))
    if item is not None and "LUTDescriptor" in item and "LUTData" in item:
        return _voi_table(item, header.original_encoding[1] is not False)
    if "WindowCenter" not in header or "WindowWidth" not in header:
        return None
    function = str(header.get("VOILUTFunction", "LINEAR")).upper()
    center, width = _first(header.WindowCenter), _first(header.WindowWidth)
    known = function in ("LINEAR", "LINEAR_EXACT", "SIGMOID")
    if not known or not np.isfinite([center, width]).all():
        return None
    if width < 1 if function == "LINEAR" else width <= 0:
        return None
    return window_levels(center, width, function)


def padding_range(data) -> tuple[float, float] | None:
    """Stored levels from, to (inclusive) of Pixel Padding Value and Range Limit (C.7.5.1.1.2)."""
    ends = [data.get("PixelPaddingValue"), data.get("PixelPaddingRangeLimit")]
    ends = [end for end in ends if isinstance(end, (int, float))]
    if not ends or data.get("PixelPaddingValue") is None:
        return None
    if data.PixelRepresentation == 1:  # written as unsigned by some devices
        ends = [end - 2**16 if end >= 2**15 else end for end in ends]
    return min(ends), max(ends)


def _integer(data, keyword: str, default: int | None = None) -> int:
    value = data.get(keyword)
    if value in (None, "") and default is not None:
        return default
    if not isinstance(value, int):  # pydicom's integer strings are ints too
        raise ImageError(f"an integer as {keyword}", "none")
    return int(value)


def check_size(data, frame: int) -> str:
    """The photometric interpretation, once a frame that fits in memory is known to be there."""
    if not any(keyword in data for keyword in PIXELS):
        raise ImageError("a DICOM image", "a dataset without pixel data")
    rows, columns = _integer(data, "Rows"), _integer(data, "Columns")
    if rows < 1 or columns < 1:
        raise ImageError("at least one row and column", f"{rows}x{columns}")
    frames = _integer(data, "NumberOfFrames", 1)
    if not 0 <= frame < frames:
        raise ImageError(f"a frame from 0 to {frames - 1}", frame)
    kind = str(data.get("PhotometricInterpretation", ""))
    if kind not in (*GREY, *COLOURS):
        raise ImageError(f"a photometric interpretation among {', '.join(GREY + COLOURS)}", "none")
    samples = _integer(data, "SamplesPerPixel", 1)
    wide = 4 if kind.startswith("YBR") else max(1, _integer(data, "BitsAllocated") // 8)
    if rows * columns * samples * wide > MAX_DECODED_BYTES:
        raise ImageError(
            f"at most {MAX_DECODED_BYTES >> 20} MiB a decoded frame",
            f"{rows}x{columns} pixels of {samples * wide} bytes",
        )
    return kind


def _jpeg_ls_size(stream: bytes) -> tuple[int, int]:
    """Height, width in the frame header (SOF55) of JPEG-LS; zeros where there is none."""
    at = 2  # past the start of image
    while stream[:2] == b"\xff\xd8" and at + 9 <= len(stream) and stream[at] == 0xFF:
        if stream[at + 1] == 0xF7:
            return struct.unpack(">HH", stream[at + 5 : at + 9])
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return 0, 0


def _check_codestream(data, source, frame: int) -> None:
    """A compressed frame's own header may claim more pixels than Rows x Columns: a bomb."""
    from pydicom.encaps import get_frame

    if not data.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    frames = _integer(data, "NumberOfFrames", 1)
    with contextlib.ExitStack() as stack:
        if source is None:
            buffer = data.PixelData
        else:  # the dataset was read without it
            buffer = stack.enter_context(open(source, "rb"))
            buffer.seek(data.get_item("PixelData", keep_deferred=True).value_tell)
        stream = get_frame(buffer, frame, number_of_frames=frames)
    try:
        with Image.open(BytesIO(stream), formats=("JPEG", "JPEG2000")) as picture:  # header only
            width, height = picture.size
    except UnidentifiedImageError:  # RLE and JPEG-LS are not Pillow's; RLE has no size of its own
        height, width = _jpeg_ls_size(stream)
    if width * height > data.Rows * data.Columns:
        raise ImageError(f"a frame of {data.Rows}x{data.Columns}", f"one of {height}x{width}")


def _set_transfer_syntax(data) -> None:
    """A file without meta information is native, in the encoding that it was read with."""
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset

    if getattr(data, "file_meta", None) is None:
        data.file_meta = FileMetaDataset()
    if data.file_meta.get("TransferSyntaxUID") is None:
        implicit, little = data.original_encoding
        plain = uid.ExplicitVRLittleEndian if little is not False else uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else plain


def read_frame(data, *, source=None, window=None, frame: int = 0) -> np.ndarray:
    """One frame as a viewer shows it.

    Args:
        data: a pydicom dataset.
        source: its file, from which only that frame is then read; default data itself.
        window: a name in CT_WINDOWS (CT only) or (center, width) of modality values; default the
            header's VOI, then the full range of 8 bits, then robust_levels.

    Returns:
        uint8 [H, W], or [H, W, 3] where it is in colour.
    """
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    kind = check_size(data, frame)
    if window is not None and kind not in GREY:
        raise ImageError("window None for a picture in colour", "a window")
    if isinstance(window, str) and data.get("Modality") != "CT":
        raise ImageError("a CT for a named window", "another modality")
    if getattr(data, "file_meta", None) is None or "TransferSyntaxUID" not in data.file_meta:
        _set_transfer_syntax(data)
        source = None
    _check_codestream(data, source, frame)
    stored = pixel_array(data if source is None else source, index=frame)
    bits = _integer(data, "BitsStored", stored.dtype.itemsize * 8)
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, data)[..., :3]
        bits = stored.dtype.itemsize * 8
        if bits == 16 and data.original_encoding[1] is False:
            stored = stored.byteswap()  # the table is read as little endian
    if kind not in GREY:
        if stored.ndim != 3 or stored.shape[2] != 3 or stored.dtype.kind != "u":
            raise ImageError("three unsigned colours", f"{stored.dtype} of shape {stored.shape}")
        if bits < 8:
            return by_rows(lambda rows: np.rint(rows * (255 / (2**bits - 1))), stored)
        return (stored >> (bits - 8)).astype(np.uint8, copy=False)
    if stored.ndim != 2:
        raise ImageError("one grey level a pixel", f"shape {stored.shape}")

    header = grey_header(data, frame)
    signed = stored.dtype.kind != "u"
    if window is not None:
        voi = window_levels(*named_window(window))
    else:
        voi = voi_levels(header)
    if voi is None and bits <= 8 and not signed:
        ends = apply_modality_lut(np.array([0, 2**bits - 1], np.int32), header)
        voi = linear_levels(float(ends.min()), float(ends.max()))
    return show(
        stored,
        voi,
        modality=lambda values: apply_modality_lut(values, header),
        padding=padding_range(data) if stored.dtype.kind in "ui" else None,
        inverted=kind == "MONOCHROME1",
    )
