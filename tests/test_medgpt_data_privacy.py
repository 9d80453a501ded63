"""Identifiers in texts, headers and files go; what a physician wrote and saw stays."""

import importlib.metadata
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_material import crop, dicom, reports
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset

from medgpt.data.captions import caption_fault
from medgpt.data.clean import clean_dicom, clean_picture, identifiers, read_dicom
from medgpt.data.phi import deidentify
from medgpt.data.rows import RowError
from medgpt.images import ImageError, load_image

IDENTIFIED = (
    ("Seen by Dr. Adams and Dr O'Brien.", "Seen by Dr. [name] and Dr [name]."),
    ("Discussed with Dr. van der Berg at noon.", "Discussed with Dr. [name] at noon."),
    ("Mr. John Smith is a 93-year-old man.", "Mr. [name] is a [age]-year-old man."),
    ("Electronically signed by: Jane Q. Doe, MD", "Electronically signed by: [name]"),
    ("PATIENT NAME: SMITH, JOHN", "PATIENT NAME: [name]"),
    ("Header Smith^John^A here", "Header [name] here"),
    ("MRN: 00123456, accession 9981-22A.", "MRN: [id], accession [id]."),
    ("SSN 123-45-6789", "SSN [id]"),
    ("Call (617) 555-0199 or 555 123 4567, ext. 4412.", "Call [phone] or [phone], ext. [phone]."),
    ("Born 12 March 1931, seen March 3, 2019.", "Born [date], seen [date]."),
    (
        "Compared with 3/12/2019, 2019-03-12 and 3/12/19.",
        "Compared with [date], [date] and [date].",
    ),
    ("The study from 3/12 is worse.", "The study from [date] is worse."),
    ("At 12 North Main Street, Boston, MA 02115.", "At [address], [address]."),
    ("From Baptist Medical Center.", "From [hospital]."),
    ("x@y.org, https://a.b/c, 10.1.2.3", "[email], [url] [ip]"),
)
CLINICAL = (
    "Grade 2/6 murmur, strength 5/5, C5-6 and T12/L1, L4-5 disc, 1.2 x 3.4 cm, 3/4 views.",
    "MR brain with contrast; MS plaques; SUV 10.1; ratio 1/2/3; in 2019; 78-year-old.",
    "Baker cyst, Crohn disease, Kerley B lines; this may represent a scar. Patient: unremarkable",
    "From 1/3 to 2/3 of the femur. Name of the organ: Liver. Chest, PA and lateral.",
)


@pytest.mark.parametrize(("text", "expected"), IDENTIFIED)
def test_identifiers_are_replaced(text, expected):
    assert deidentify(text)[0] == expected


@pytest.mark.parametrize("text", CLINICAL)
def test_clinical_text_stays(text):
    assert deidentify(text) == (text, {})


def test_known_words_go_wherever_they_stand():
    text, counts = deidentify(
        "Quimby was seen; ada quimby, no 4711, 47112.", ["Quimby^Ada", "4711"]
    )
    assert text == "[known] was seen; [known] [known], no [known], 47112."
    assert counts == {"known": 4}


def planted() -> tuple[Dataset, list[str]]:
    """A radiograph with a word of its own in every text element that PS3.15 lists."""
    import dicomanonymizer.simpledicomanonymizer as profile

    data, planted = pydicom.dcmread(dicom("RG1_J2KR.dcm")), []
    words = ("LO", "SH", "PN", "LT", "ST", "UT", "UC", "AE")
    for tag in profile.initialize_actions_2024b():
        if len(tag) != 2 or tag[0] < 8 or pydicom.datadict.dictionary_has_tag(tag) is False:
            continue
        kind = pydicom.datadict.dictionary_VR(tag)
        if kind in words:
            planted.append(f"SECRET{len(planted)}X")
            data.add_new(tag, kind, planted[-1])
    return data, planted


def test_headers_keep_nothing_that_ps3_15_removes():
    pytest.importorskip("dicomanonymizer", reason="pip install -e '.[dev]'")
    data, words = planted()
    assert len(words) > 200
    nested = Dataset()
    nested.PatientName = "SECRETNESTED"
    data.ReferencedImageSequence = [nested]
    groups = Dataset()
    groups.FrameVOILUTSequence = [Dataset()]
    groups.FrameVOILUTSequence[0].WindowCenter, groups.FrameVOILUTSequence[0].WindowWidth = 40, 80
    groups.FrameVOILUTSequence[0].WindowCenterWidthExplanation = "SECRETWINDOW"
    groups.FrameContentSequence = [nested]
    data.SharedFunctionalGroupsSequence = [groups]
    data.private_block(0x0099, "SECRETMAKER", create=True).add_new(1, "LO", "SECRETPRIVATE")
    data.add_new((0x6000, 0x3000), "OW", b"SECRETOVERLAY.")
    data.BodyPartExamined = "Ada's SECRET"
    out = io.BytesIO()
    data.save_as(out)
    assert out.getvalue().count(b"SECRET") > len(words)
    clean = clean_dicom(read_dicom(out.getvalue()))
    assert b"SECRET" not in clean
    read = pydicom.dcmread(io.BytesIO(clean))
    assert read.ViewPosition == "PA"
    window = read.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    assert window.WindowCenter == 40
    assert read.PatientIdentityRemoved == "YES"
    assert str(data.SOPInstanceUID) not in str(read)
    assert {"SECRETNESTED"}.isdisjoint(identifiers(data))
    assert data.PatientName in identifiers(data)


def test_cleaned_dicom_shows_the_same_picture():
    shown = 0
    for path in sorted(importlib.metadata.files("pydicom-data"), key=str):
        if path.suffix != ".dcm":
            continue
        content = Path(path.locate()).read_bytes()
        if len(content) > 2_000_000:
            continue
        try:
            expected = load_image(content)
        except ImageError:
            continue
        clean = clean_dicom(read_dicom(content))
        assert np.array_equal(load_image(clean), expected), path.name
        assert clean == clean_dicom(read_dicom(content))  # the same bytes each time
        shown += 1
    assert shown > 40


def with_notes(kind: str) -> bytes:
    picture, out = Image.fromarray(crop("fundus", 3)), io.BytesIO()
    if kind == "JPEG":
        exif = Image.Exif()
        exif[0x010E] = "SECRET description"
        picture.save(out, "JPEG", exif=exif, comment=b"SECRET comment", progressive=True)
        return out.getvalue() + b"SECRET after the end"
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Patient", "SECRET")
    notes.add_text("Long", "SECRET" * 9, zip=True)
    picture.save(out, "PNG", pnginfo=notes)
    return out.getvalue() + b"SECRET after the end"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_lose_their_notes_and_not_a_bit_of_the_picture(kind):
    content = with_notes(kind)
    assert b"SECRET" in content
    image = load_image(content)
    clean = clean_picture(content, image)
    assert b"SECRET" not in clean
    assert b"zTXt" not in clean
    assert np.array_equal(load_image(clean), image)
    with pytest.raises(RowError, match="unreadable_image"):
        clean_picture(content[: len(content) // 3], image)


def test_a_turned_jpeg_is_kept_as_it_is_shown():
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(crop("fundus", 3)[:150]).save(out, "JPEG", exif=exif)
    image = load_image(out.getvalue())
    assert image.shape == (200, 150, 3)
    assert np.array_equal(load_image(clean_picture(out.getvalue(), image)), image)


@pytest.mark.slow
def test_real_reports_keep_all_but_names_and_are_all_clinical():
    found = reports()
    assert len(found) == 3419
    touched = [deidentify("\n".join(parts))[1] for parts in found]
    # nine of them name a masked physician ("Dr. XXXX")
    assert sum(bool(counts) for counts in touched) == 9
    assert all(set(counts) <= {"name"} for counts in touched)
    assert all(caption_fault("\n".join(parts)) is None for parts in found)
