"""load_image on real DICOM files and pictures, against the formulas of PS3.3 C.11 written anew."""

import contextlib
import io
import logging
import math
import resource
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from material import DICOM_FILES, SKIMAGE_FILES, _package_folder
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.filebase import DicomFileLike
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit

from medgpt import images
from medgpt.images import CT_WINDOWS, ImageError, load_image

GREY_FILES = {
    **DICOM_FILES,
    "ct": "693_UNCI.dcm",
    "mr": "MR_small.dcm",
    "us": "examples_overlay.dcm",
}
NAME = "Doe^Jane"


def path(file: str) -> str:
    return get_testdata_file(file, download=False)


def dataset(file: str) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcmread(path(file), force=True)


def first(value) -> float:
    return float(value if isinstance(value, (int, float, str)) else value[0])


def modality(data) -> np.ndarray:
    slope, intercept = data.get("RescaleSlope", 1), data.get("RescaleIntercept", 0)
    return data.pixel_array * float(slope) + float(intercept)


def voi(x, center, width, function="LINEAR") -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2, from 0 to 255."""
    if function == "LINEAR":
        y = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
        y = np.where(x <= center - 0.5 - (width - 1) / 2, 0, y)
        return np.where(x > center - 0.5 + (width - 1) / 2, 255, y)
    if function == "LINEAR_EXACT":
        y = ((x - center) / width + 0.5) * 255
        y = np.where(x <= center - width / 2, 0, y)
        return np.where(x > center + width / 2, 255, y)
    return 255 / (1 + np.exp(-4 * (x - center) / width))


def shown(data, *, invert=True, rescale=True, function="LINEAR", window=None) -> np.ndarray:
    """What a viewer shows, [H, W] uint8: window of the header, else 0.1st to 99.9th percentile."""
    x = modality(data) if rescale else data.pixel_array.astype(np.float64)
    padding = data.pixel_array == data.get("PixelPaddingValue", None)
    if window is None and "WindowCenter" in data:
        window = first(data.WindowCenter), first(data.WindowWidth)
    if window is not None:
        y = voi(x, *window, function)
    else:
        low, high = np.quantile(x[~padding], [0.001, 0.999], method="inverted_cdf")
        y = (np.clip(x, low, high) - low) * 255 / (high - low)
    grey = np.rint(y).astype(np.uint8)
    if data.PhotometricInterpretation == "MONOCHROME1" and invert:
        grey = 255 - grey
    grey[padding] = 0
    return grey


def same(image: np.ndarray, grey: np.ndarray) -> bool:
    assert image.dtype == np.uint8
    assert image.shape == (*grey.shape, 3)
    return all(np.array_equal(image[..., channel], grey) for channel in range(3))


# DICOM: the grey-scale pipeline


@pytest.mark.parametrize("name", GREY_FILES)
def test_grey_dicom_as_the_standard_says(name):
    file = GREY_FILES[name]
    data = dataset(file)
    expected = shown(data)
    image = load_image(path(file))
    assert same(image, expected)
    if name == "ct":
        for source in (Path(path(file)), Path(path(file)).read_bytes(), data):
            assert same(load_image(source), expected)
    if data.PhotometricInterpretation == "MONOCHROME1":
        assert not same(image, shown(data, invert=False))
    if "RescaleSlope" in data:
        assert not same(image, shown(data, rescale=False))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_voi_functions(function):
    data = dataset("693_UNCI.dcm")
    data.VOILUTFunction = function
    image = load_image(data)
    assert same(image, shown(data, function=function))
    others = {"LINEAR", "LINEAR_EXACT", "SIGMOID"} - {function}
    assert not any(same(image, shown(data, function=other)) for other in others)


@pytest.mark.parametrize("name", CT_WINDOWS)
def test_named_ct_windows(name):
    data = dataset("693_UNCI.dcm")
    image = load_image(path("693_UNCI.dcm"), window=name)
    assert same(image, shown(data, window=CT_WINDOWS[name]))
    assert np.array_equal(image, load_image(data, window=CT_WINDOWS[name]))
    assert not np.array_equal(image, load_image(data))
    with pytest.raises(ValueError, match="expected a CT for a named window"):
        load_image(path("MR_small.dcm"), window=name)


def test_window_on_an_array_of_hounsfield_units():
    data = dataset("693_UNCI.dcm")
    units = modality(data)
    for values in (units.astype(np.int16), units.astype(np.float32), units.astype(np.int64)):
        assert same(
            load_image(values, window="brain"), np.rint(voi(units, 40, 80)).astype(np.uint8)
        )


@pytest.mark.parametrize("width", [0, -5, "nan"])
def test_a_window_the_standard_forbids_is_none(width):
    data = dataset("CT_small.dcm")
    expected = shown(data)
    data.WindowCenter = 40
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.WindowWidth = width
    assert same(load_image(data), expected)


def table_of(item) -> np.ndarray:
    data = item.LUTData
    return np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)


def test_voi_table():
    data = dataset("vlut_04.dcm")
    item = data.VOILUTSequence[0]
    entries, start, bits = item.LUTDescriptor
    index = np.clip(data.pixel_array.astype(int) - start, 0, entries - 1)
    for table in (table_of(item), table_of(item)[::-1]):
        item.LUTData = table.tobytes() if item["LUTData"].VR == "OW" else table.tolist()
        expected = np.rint(table[index] * (255 / (2**bits - 1))).astype(np.uint8)
        assert same(load_image(data), expected)
    assert not same(load_image(data), 255 - expected)


def test_voi_table_of_eight_bits_and_many_entries():
    data = dataset("MR2_UNCI.dcm")
    del data.RescaleSlope, data.RescaleIntercept
    table = np.linspace(255, 0, 4096).astype(np.uint8)  # inverts
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 8])
    item.add_new("LUTData", "US", table.tolist())
    data.VOILUTSequence = Sequence([item])
    assert same(load_image(data), table[data.pixel_array])


def test_modality_table():
    data = dataset("mlut_18.dcm")
    image = load_image(data)[..., 0].astype(int)
    item = data.ModalityLUTSequence[0]
    table = table_of(item)
    x = table[np.clip(data.pixel_array.astype(int) - item.LUTDescriptor[1], 0, len(table) - 1)]
    low, high = np.quantile(x, [0.001, 0.999], method="inverted_cdf")
    assert np.array_equal(image, np.rint((np.clip(x, low, high) - low) * (255 / (high - low))))


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_not_counted(kind):
    data = dataset("CT_small.dcm")
    data.PhotometricInterpretation = kind
    plain = data.pixel_array.copy()
    stored = plain.copy()
    stored[:40] = -2000
    data.PixelData = stored.tobytes()
    image = load_image(data)[..., 0]
    assert (image[:40] == 0).all()
    x = plain[40:].astype(float)
    low, high = np.quantile(x, [0.001, 0.999], method="inverted_cdf")
    grey = np.rint((np.clip(x, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    assert np.array_equal(image[40:], 255 - grey if kind == "MONOCHROME1" else grey)
    del data.PixelPaddingValue
    assert not np.array_equal(load_image(data)[..., 0], image)


def test_padding_range_and_unsigned_spelling():
    data = dataset("CT_small.dcm")
    stored = data.pixel_array.copy()
    stored[:10], stored[10:20] = -2000, -1990
    data.PixelData = stored.tobytes()
    data.add_new("PixelPaddingValue", "US", 2**16 - 2000)
    data.PixelPaddingRangeLimit = -1990
    assert (load_image(data)[:20] == 0).all()
    del data.PixelPaddingRangeLimit
    image = load_image(data)
    assert (image[:10] == 0).all()
    assert np.array_equal(image[30:], load_image(data)[30:])


def test_eight_bits_are_shown_as_they_are():
    data = dataset("JPGLosslessP14SV1_1s_1f_8b.dcm")
    del data.WindowCenter, data.WindowWidth
    assert same(load_image(data), data.pixel_array)


def test_frames_have_their_own_window():
    data = dataset("eCT_Supplemental.dcm")
    shared = data.SharedFunctionalGroupsSequence[0]
    scale = shared.PixelValueTransformationSequence[0]
    window = shared.FrameVOILUTSequence[0]
    for frame in range(2):
        x = data.pixel_array[frame] * float(scale.RescaleSlope) + float(scale.RescaleIntercept)
        y = voi(x, float(window.WindowCenter), float(window.WindowWidth))
        assert same(load_image(data, frame=frame), np.rint(y).astype(np.uint8))
    own = Dataset()
    own.WindowCenter, own.WindowWidth = 400, 1800
    data.PerFrameFunctionalGroupsSequence[1].FrameVOILUTSequence = Sequence([own])
    assert same(load_image(data, frame=1), np.rint(voi(x, 400, 1800)).astype(np.uint8))


@pytest.mark.parametrize(
    "file", ["emri_small.dcm", "emri_small_jpeg_2k_lossless.dcm", "rtdose.dcm", "liver.dcm"]
)
def test_frames_by_index(file, monkeypatch):
    data = dataset(file)
    frames = [load_image(path(file), frame=i) for i in range(data.NumberOfFrames)]
    assert len({frame.tobytes() for frame in frames}) > 1
    monkeypatch.setattr(images, "LARGE_FILE", 0)  # frames straight from the file
    for i, frame in enumerate(frames):
        assert np.array_equal(load_image(path(file), frame=i), frame)
        low, high = np.quantile(data.pixel_array[i], [0.001, 0.999], method="inverted_cdf")
        if file != "liver.dcm" and high > low:
            scaled = (np.clip(data.pixel_array[i], low, high).astype(float) - low) / (high - low)
            assert np.abs(frame[..., 0] - scaled * 255).max() <= 0.5 + 1e-9
    for bad in (-1, int(data.NumberOfFrames)):
        with pytest.raises(ValueError, match="load_image: expected a frame from 0 to"):
            load_image(path(file), frame=bad)


def test_segmentation_is_black_and_white():
    data = dataset("liver.dcm")
    assert same(load_image(data), data.pixel_array[0] * 255)


# DICOM: encodings and colours


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("RG1_J2KR.dcm", "RG1_UNCR.dcm"),
        ("RG3_J2KR.dcm", "RG3_UNCR.dcm"),
        ("US1_J2KR.dcm", "US1_UNCR.dcm"),  # YBR_RCT
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("MR_small_expb.dcm", "MR_small.dcm"),
        ("SC_rgb_rle_16bit.dcm", "SC_rgb_16bit.dcm"),
        ("OBXXXX1A_rle.dcm", "OBXXXX1A.dcm"),
        ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm"),  # a big-endian palette
        ("SC_rgb_16bit.dcm", "SC_rgb.dcm"),
        ("SC_rgb_32bit.dcm", "SC_rgb.dcm"),
    ],
)
def test_encodings_of_one_image(compressed, plain):
    assert np.array_equal(load_image(path(compressed)), load_image(path(plain)))


def test_palette():
    data = dataset("examples_palette.dcm")
    luts = [
        np.frombuffer(data[f"{c}PaletteColorLookupTableData"].value, "<u2") >> 8
        for c in ("Red", "Green", "Blue")
    ]
    expected = np.stack([lut[data.pixel_array] for lut in luts], -1).astype(np.uint8)
    assert np.array_equal(load_image(data), expected)


def test_ybr_becomes_rgb():
    data = dataset("SC_ybr_full_uncompressed.dcm")
    raw = np.frombuffer(data.PixelData, np.uint8).reshape(100, 100, 3).astype(float)
    y, cb, cr = raw[..., 0], raw[..., 1] - 128, raw[..., 2] - 128  # PS3.3 C.7.6.3.1.2
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    assert np.abs(load_image(data) - np.clip(rgb, 0, 255)).max() <= 0.51
    assert np.abs(load_image(data) - raw).max() > 100


def test_files_without_meta_information(tmp_path):
    data = dataset("CT_small.dcm")
    expected = load_image(data)
    bare = tmp_path / "bare.png"  # what it is, its content says
    with open(bare, "wb") as file:
        out = DicomFileLike(file)
        out.is_little_endian, out.is_implicit_VR = True, False
        write_dataset(out, data)
    assert np.array_equal(load_image(bare), expected)


# Pictures and arrays


def picture(name: str) -> Image.Image:
    file = SKIMAGE_FILES[name]
    return Image.open(_package_folder("scikit-image", file) / file)


@pytest.mark.parametrize("name", SKIMAGE_FILES)
def test_pictures_from_files(name):
    file = _package_folder("scikit-image", SKIMAGE_FILES[name]) / SKIMAGE_FILES[name]
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(load_image(file), expected)
    assert np.array_equal(load_image(str(file)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_modes_without_alpha(mode):
    converted = picture("fundus").resize((90, 80)).convert(mode)
    assert np.array_equal(load_image(converted), np.asarray(converted.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_laid_on_white(mode):
    base = picture("histology").resize((90, 80))
    converted = base.convert(mode)
    alpha = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8) * 2, (80, 1)))
    converted.putalpha(alpha)
    rgba = np.asarray(converted.convert("RGBA")).astype(float)
    expected = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    assert np.abs(load_image(converted) - expected).max() <= 1
    assert np.abs(load_image(converted) - rgba[..., :3]).max() > 100
    if mode == "RGBA":
        assert np.array_equal(load_image(np.asarray(converted)), load_image(converted))


def test_transparent_colour_of_a_palette():
    colours = picture("fundus").resize((64, 64)).quantize(8)
    colours.info["transparency"] = 3
    image = load_image(colours)
    assert (image[np.asarray(colours) == 3] == 255).all()
    opaque = np.asarray(colours) != 3
    assert np.array_equal(image[opaque], np.asarray(colours.convert("RGB"))[opaque])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation(orientation, format):
    upright = np.asarray(picture("histology").resize((64, 48)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(upright).save(file, format, exif=exif.tobytes() if format != "TIFF" else exif)
    stored = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    if format == "TIFF":  # Pillow turns it as it loads
        stored = upright
    turned = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1),
        7: np.rot90(stored, -1)[:, ::-1][::-1, ::-1] , 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    assert np.array_equal(load_image(file.getvalue()), turned)


def test_sixteen_bits_and_floats():
    levels = dataset("RG3_UNCR.dcm").pixel_array[600:1100, 600:1000]
    low, high = np.quantile(levels, [0.001, 0.999], method="inverted_cdf")
    expected = np.rint(
        (np.clip(levels, low, high).astype(float) - low) * (255 / (high - low))
    ).astype(np.uint8)
    assert same(load_image(levels), expected)
    assert same(load_image(levels.astype(">u2")), expected)
    assert same(load_image(Image.fromarray(levels)), expected)  # I;16
    for format in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(levels).save(file, format)
        assert same(load_image(file.getvalue()), expected)
    for mode in ("I", "F"):
        wide = Image.fromarray(levels.astype(np.int32 if mode == "I" else np.float32))
        assert wide.mode == mode
        assert np.abs(load_image(wide)[..., 0].astype(int) - expected).max() <= 1  # a sample's ends
    unit = expected / 255
    assert same(load_image(unit), expected)
    assert same(load_image(unit.astype(np.float32)[..., None]), expected)
    assert not same(load_image(levels), (levels >> 8).astype(np.uint8))


def test_arrays_of_colours_and_bits():
    colours = np.asarray(picture("histology"))
    assert np.array_equal(load_image(colours), colours)
    assert np.array_equal(load_image(colours.astype(np.uint16) * 257), colours)
    assert np.array_equal(load_image(colours / 255), colours)
    mask = colours[..., 0] > 128
    assert same(load_image(mask), mask.astype(np.uint8) * 255)
    assert same(load_image(np.full((5, 7), 900, np.uint16)), np.zeros((5, 7), np.uint8))


@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_of_any_byte_order(order):
    for kind in ("u2", "f4"):
        for shape in ((4, 5), (4, 5, 3), (4, 5, 4)):
            plain = np.linspace(0, 1 if kind == "f4" else 65_535, math.prod(shape))
            plain = plain.reshape(shape).astype(kind)
            assert np.array_equal(load_image(plain.astype(order + kind)), load_image(plain))


def test_bits_with_an_alpha():
    bits = np.ones((2, 2, 4), bool)
    bits[0, 0, :3], bits[1, 1, 3] = False, False
    shown = load_image(bits)
    assert shown.shape == (2, 2, 3)
    assert shown[0, 0].tolist() == [0, 0, 0]
    assert (shown[1] == 255).all()


def test_pages_of_a_tiff():
    pages = [picture(name).convert("RGB").resize((60, 50)) for name in ("fundus", "histology")]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    for frame, page in enumerate(pages):
        assert np.array_equal(load_image(file.getvalue(), frame=frame), np.asarray(page))
    with pytest.raises(ValueError, match="expected a frame from 0 to 1, got 2"):
        load_image(file.getvalue(), frame=2)


# Bounds


def test_max_pixels_keeps_the_aspect():
    for source in (path("MR2_UNCI.dcm"), np.asarray(picture("fundus")), picture("fundus")):
        whole = load_image(source)
        small = load_image(source, max_pixels=10_000)
        assert 9_500 < small.shape[0] * small.shape[1] <= 10_000
        assert abs(small.shape[0] / small.shape[1] - whole.shape[0] / whole.shape[1]) < 0.02
        expected = Image.fromarray(whole).resize(small.shape[1::-1], Image.Resampling.BICUBIC)
        difference = small.astype(int) - np.asarray(expected)
        assert np.abs(difference).mean() < 1
        assert np.array_equal(load_image(source, max_pixels=whole.shape[0] * whole.shape[1]), whole)
    assert load_image(np.zeros((1, 50_000), np.uint8), max_pixels=100).shape == (1, 100, 3)
    assert load_image(np.zeros((50_000, 1), np.uint8), max_pixels=100).shape == (100, 1, 3)


BIG = """
import io, resource, sys, time
import numpy as np
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from medgpt.images import MAX_PIXELS, load_image

kind = sys.argv[1]
side = 10_000
levels = np.tile(np.arange(side, dtype=np.uint16), (side, 1))
if kind == "dicom":
    source = dcmread(get_testdata_file("RG1_UNCR.dcm", download=False))
    source.Rows = source.Columns = side
    del source.WindowCenter, source.WindowWidth
    source.PixelData = levels.tobytes()
elif kind == "uint16":
    source = levels
elif kind == "jpeg":
    file = io.BytesIO()
    Image.fromarray((levels >> 6).astype(np.uint8)).convert("RGB").save(file, "JPEG")
    source = file.getvalue()
else:
    source = Image.fromarray((levels >> 6).astype(np.uint8)).convert("RGB")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.time()
image = load_image(source)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
assert image.shape[0] * image.shape[1] <= MAX_PIXELS and image.shape[0] > 1000, image.shape
profile = image[image.shape[0] // 2, :, 0].astype(int)
assert abs(profile[-1] - profile[0]) > 100
print(grown)
"""


@pytest.mark.parametrize(
    ("kind", "limit"), [("dicom", 600), ("uint16", 500), ("jpeg", 300), ("rgb", 900)]
)
def test_hundred_megapixels_stay_bounded(kind, limit):
    """Limits in MiB above what the source itself took; a float64 image alone would be 763."""
    done = subprocess.run(
        [sys.executable, "-c", BIG, kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of that size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_before_they_are_decoded():
    data = dataset("RG1_J2KR.dcm")
    data.Rows = data.Columns = 65_535
    huge = dataset("US1_UNCI.dcm")
    huge.Rows = huge.Columns = 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source in (data, huge):
        with pytest.raises(ValueError, match="expected at most 512 MiB a decoded frame, got"):
            load_image(source)
    for size in ((100_000, 100_000), (2**31 - 1, 1), (13_000, 13_000)):
        with pytest.raises(ValueError, match="load_image: expected"):
            load_image(png_of_size(*size))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize(
    ("format", "syntax"), [("JPEG2000", JPEG2000Lossless), ("JPEG", JPEGBaseline8Bit)]
)
def test_codestreams_larger_than_their_header_are_not_decoded(
    format, syntax, tmp_path, monkeypatch
):
    data = dataset("MR_small.dcm")
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelRepresentation = 0
    data.file_meta.TransferSyntaxUID = syntax
    for side in (64, 4000):
        file = io.BytesIO()
        Image.new("L", (side, side), 7).save(file, format)
        data.PixelData = encapsulate([file.getvalue()])
        data["PixelData"].VR = "OB"
        if side == 64:
            assert load_image(data).shape == (64, 64, 3)
    data.save_as(tmp_path / "bomb.dcm")
    monkeypatch.setattr(images, "LARGE_FILE", 0)  # one frame straight from the file
    for source in (data, tmp_path / "bomb.dcm"):
        with pytest.raises(ImageError, match="expected a frame of 64x64, got one of 4000x4000"):
            load_image(source)


def test_jpeg_ls_larger_than_its_header_is_not_decoded():
    data = dataset("MR_small_jpeg_ls_lossless.dcm")
    stream = bytearray(get_frame(data.PixelData, 0, number_of_frames=1))
    at = stream.index(b"\xff\xf7") + 5
    assert struct.unpack(">HH", stream[at : at + 4]) == (64, 64)
    stream[at : at + 4] = struct.pack(">HH", 20_000, 10_000)
    data.PixelData = encapsulate([bytes(stream)])
    with pytest.raises(ImageError, match="expected a frame of 64x64, got one of 20000x10000"):
        load_image(data)


def test_only_codestreams_are_checked_as_such():
    """The RLE header of twelve segments begins as a bitmap's does."""
    expected = load_image(path("SC_rgb_rle_16bit.dcm"))
    assert np.array_equal(load_image(path("SC_rgb_rle_32bit.dcm")), expected)


# Bad input


BAD = {
    "report (SR)": lambda: path("test-SR.dcm"),
    "plan": lambda: path("rtplan.dcm"),
    "waveform": lambda: path("waveform_ecg.dcm"),
    "truncated": lambda: path("MR_truncated.dcm"),
    "no pixels": lambda: path("no_meta.dcm"),
    "bad VR": lambda: path("badVR.dcm"),
    "text": lambda: path("README.txt"),
    "gzip": lambda: path("zipMR.gz"),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
    "a folder": lambda: str(Path(path("README.txt")).parent),
    "no file": lambda: "/no/such/file.dcm",
    "none": lambda: None,
    "number": lambda: 3,
    "list": lambda: [[1, 2], [3, 4]],
    "empty dataset": Dataset,
    "zero rows": lambda: np.zeros((0, 5), np.uint8),
    "zero columns": lambda: np.zeros((5, 0, 3), np.uint8),
    "two channels": lambda: np.zeros((5, 5, 2), np.uint8),
    "five channels": lambda: np.zeros((5, 5, 5), np.uint8),
    "channels first": lambda: np.zeros((3, 64, 64), np.uint8),
    "one dimension": lambda: np.zeros(5, np.uint8),
    "four dimensions": lambda: np.zeros((1, 5, 5, 3), np.uint8),
    "objects": lambda: np.full((5, 5), None),
    "strings": lambda: np.full((5, 5), "a"),
    "complex": lambda: np.zeros((5, 5), complex),
    "int16 colours": lambda: np.zeros((5, 5, 3), np.int16),
    "floats past 1 in colour": lambda: np.full((5, 5, 3), 2.0),
    "NaN": lambda: np.array([[0.5, np.nan]]),
    "infinity": lambda: np.array([[0.5, np.inf]], np.float32),
    "NaN picture": lambda: Image.fromarray(np.full((3, 3), np.nan, np.float32)),
    "empty picture": lambda: Image.new("RGB", (0, 4)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_error(name):
    with pytest.raises(ImageError, match=r"^load_image: expected .+, got .+$"):
        load_image(BAD[name]())


@pytest.mark.parametrize(
    "keyword", ["Rows", "Columns", "BitsAllocated", "PhotometricInterpretation", "PixelData"]
)
@pytest.mark.parametrize("how", ["gone", "empty", "zero", "wrong"])
def test_broken_headers(keyword, how):
    data = dataset("CT_small.dcm")
    data.PatientName = data.PatientID = data.InstitutionName = NAME
    if how == "gone":
        del data[keyword]
    else:
        text = keyword == "PhotometricInterpretation"
        wrong = NAME if text else b"" if keyword == "PixelData" else 4000
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data[keyword].value = {
                "empty": None,
                "zero": b"" if keyword == "PixelData" else 0,
                "wrong": wrong,
            }[how]
    with pytest.raises(ImageError, match=r"^load_image: expected .+, got .+$") as caught:
        load_image(data)
    assert "Doe" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "file", ["RG1_J2KR.dcm", "CT_small.dcm", "emri_small_jpeg_2k_lossless.dcm", "OBXXXX1A_rle.dcm"]
)
def test_truncated_anywhere(file, tmp_path):
    whole = Path(path(file)).read_bytes()
    for cut in (1, 100, 131, 132, 133, 150, 400, 1000, len(whole) // 2, int(len(whole) * 0.9)):
        part = tmp_path / "part.dcm"
        part.write_bytes(whole[:cut])
        for source in (part, whole[:cut]):
            try:
                image = load_image(source)
            except ImageError:
                continue
            # a decoder may show what it has, of the size that was promised
            assert image.shape == load_image(whole).shape


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_truncated_pictures(format):
    file = io.BytesIO()
    picture("fundus").resize((300, 200)).save(file, format)
    for cut in (3, 10, 50, len(file.getvalue()) // 2):
        with pytest.raises(ImageError):
            load_image(file.getvalue()[:cut])


def test_noise_in_the_header():
    rng = np.random.default_rng(0)
    whole = np.frombuffer(Path(path("CT_small.dcm")).read_bytes(), np.uint8)
    for _ in range(200):
        damaged = whole.copy()
        places = rng.integers(132, len(whole) - 2 * 128 * 128, 4)
        damaged[places] = rng.integers(0, 256, 4)
        with contextlib.suppress(ImageError):
            assert load_image(damaged.tobytes()).dtype == np.uint8


@pytest.mark.parametrize("window", ["chest", (40,), (40, 0), (40, float("nan")), ("a", "b"), 7, ()])
def test_bad_windows(window):
    with pytest.raises(ImageError, match="load_image: expected a window"):
        load_image(path("693_UNCI.dcm"), window=window)


def test_windows_of_pictures_in_colour():
    for source in (path("US1_UNCR.dcm"), np.zeros((4, 4, 3), np.uint8), picture("fundus")):
        with pytest.raises(ImageError, match="expected window None for a picture in colour"):
            load_image(source, window=(40, 80))


@pytest.mark.parametrize(
    "url",
    [
        "http://host/a.png",
        "HTTPS://host/a.dcm",
        "ftp://h/a",
        "data:image/png;base64,AAAA",
        "s3://b/k",
        "file:///etc/hosts",
    ],
)
def test_urls_are_refused(url, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    with pytest.raises(ImageError, match="got a URL: nothing is ever fetched"):
        load_image(url)


def test_headers_stay_out_of_warnings_logs_and_errors(caplog, recwarn, tmp_path):
    data = dataset("CT_small.dcm")
    data.PatientName = NAME
    file = io.BytesIO()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.save_as(file, enforce_file_format=True)
    # an invalid value: pydicom's own warning quotes it
    raw = file.getvalue().replace(
        data.SOPInstanceUID.encode(), b"Doe^Jane 1.2".ljust(len(data.SOPInstanceUID))
    )
    with caplog.at_level(logging.DEBUG):
        load_image(raw)
        with pytest.raises(ImageError):
            load_image(raw[: len(raw) // 2])
    assert not caplog.records
    assert not recwarn.list
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("pydicom").warning("heard again")
    assert "heard again" in caplog.text


def test_formats_that_start_another_program_are_refused(tmp_path):
    path = tmp_path / "page.eps"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(path) as picture:
        assert picture.format == "EPS"  # Pillow would read it
    with pytest.raises(ImageError):
        load_image(path)
