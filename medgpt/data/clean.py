"""Image files without what they say of a patient: only the picture is kept.

DICOM keeps the elements that the grey-scale pipeline and a radiologist's reading need, all others
go, private ones, overlays and curves included: stricter than PS3.15's basic profile, which lists
what to remove. JPEG and PNG lose every segment but those of the picture, bit for bit; other formats
and turned JPEGs become PNG.
"""

import hashlib
import re
import warnings
from io import BytesIO

import numpy as np

from .rows import RowError

_KEPT = """
SOPClassUID Modality BurnedInAnnotation Rows Columns SamplesPerPixel PhotometricInterpretation
PlanarConfiguration BitsAllocated BitsStored HighBit PixelRepresentation NumberOfFrames PixelData
FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths
PixelPaddingValue PixelPaddingRangeLimit PixelAspectRatio PixelSpacing ImagerPixelSpacing
SliceThickness SpacingBetweenSlices LossyImageCompression RescaleSlope RescaleIntercept
RescaleType ModalityLUTSequence VOILUTSequence LUTDescriptor LUTData WindowCenter WindowWidth
VOILUTFunction RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor
BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData
GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
SegmentedBluePaletteColorLookupTableData SharedFunctionalGroupsSequence
PerFrameFunctionalGroupsSequence PixelValueTransformationSequence FrameVOILUTSequence
PixelMeasuresSequence PlaneOrientationSequence PlanePositionSequence ImageOrientationPatient
ImagePositionPatient ViewPosition Laterality ImageLaterality PatientOrientation BodyPartExamined
"""
KEPT = frozenset(_KEPT.split())
# codes that a device may fill with words: kept only where they look like a code
CODES = {"ViewPosition", "BodyPartExamined", "Laterality", "ImageLaterality", "PatientOrientation"}
CODE = re.compile(r"[A-Z0-9_ ]{0,16}")
IDENTIFYING = (
    "PatientName",
    "PatientID",
    "OtherPatientNames",
    "OtherPatientIDs",
    "PatientBirthName",
    "PatientMotherBirthName",
    "AccessionNumber",
    "StudyID",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy",
    "OperatorsName",
    "RequestingPhysician",
    "InstitutionName",
)
JPEG_KEPT = {0xE0, 0xEE}  # JFIF and Adobe's colour transform
PNG_DROPPED = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"iCCP", b"caBX"}
METHOD = "medgpt.data: elements of the image only"


def is_dicom(content: bytes) -> bool:
    return content[128:132] == b"DICM"


def identifiers(data) -> list[str]:
    """What a DICOM header names its patient, staff and study by; to be found in texts."""
    from pydicom.multival import MultiValue

    found = []
    for keyword in IDENTIFYING:
        value = data.get(keyword)
        values = value if isinstance(value, (MultiValue, list)) else [value]
        found += [str(v) for v in values if v is not None and str(v).strip()]
    return found


def _kept(data):
    from pydicom import Dataset
    from pydicom.datadict import keyword_for_tag

    clean = Dataset()
    for tag in data.keys():  # noqa: SIM118  a dataset's own iteration reads every value
        keyword = keyword_for_tag(tag)
        if keyword not in KEPT:
            continue
        element = data[tag]
        if keyword in CODES and not all(
            CODE.fullmatch(str(v)) for v in np.atleast_1d(np.array(element.value, object))
        ):
            continue
        if element.VR == "SQ":
            element = type(element)(tag, "SQ", [_kept(item) for item in element.value])
        clean[tag] = element
    return clean


def clean_dataset(data):
    """A new pydicom dataset of the kept elements; its UID is of its pixels, not of the old one.

    Raises:
        RowError: dicom_without_pixels.
    """
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset

    from ..dicom import PIXELS, _set_transfer_syntax

    if not any(keyword in data for keyword in PIXELS):
        raise RowError("dicom_without_pixels")
    if getattr(data, "file_meta", None) is None or "TransferSyntaxUID" not in data.file_meta:
        _set_transfer_syntax(data)
    clean = _kept(data)
    pixels = next(data[k].value for k in PIXELS if k in data)
    digest = int.from_bytes(hashlib.sha256(bytes(pixels)).digest()[:15], "big")
    clean.SOPInstanceUID = f"2.25.{digest}"
    clean.PatientIdentityRemoved, clean.DeidentificationMethod = "YES", METHOD
    clean.file_meta = FileMetaDataset()
    clean.file_meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    sop_class = data.get("SOPClassUID") or uid.SecondaryCaptureImageStorage
    clean.SOPClassUID = clean.file_meta.MediaStorageSOPClassUID = sop_class
    clean.file_meta.MediaStorageSOPInstanceUID = clean.SOPInstanceUID
    clean.set_original_encoding(*data.original_encoding)
    return clean


def read_dicom(content: bytes):
    """A pydicom dataset of a file's bytes, quietly; RowError("unreadable_image")."""
    from pydicom import dcmread

    from ..dicom import quiet

    try:
        with quiet():
            return dcmread(BytesIO(content), force=True)
    except Exception:
        raise RowError("unreadable_image") from None


def clean_dicom(data) -> bytes:
    """A DICOM file of the kept elements, its pixels as they were compressed."""
    from ..dicom import quiet

    out = BytesIO()
    try:
        with quiet():
            clean_dataset(data).save_as(out, enforce_file_format=True)
    except RowError:
        raise
    except Exception:  # a library's words may quote the header
        raise RowError("unreadable_image") from None
    return out.getvalue()


def clean_jpeg(content: bytes) -> bytes:
    """The segments of the picture, from its start to its end; RowError("unreadable_image")."""
    out, place = [b"\xff\xd8"], 2
    marker_in_scan = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
    while place + 4 <= len(content):
        if content[place] != 0xFF:
            break
        code = content[place + 1]
        if code == 0xFF:
            place += 1
            continue
        if code == 0xD9:
            return b"".join([*out, b"\xff\xd9"])
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if code < 0xE0 or code in JPEG_KEPT or 0xF0 <= code < 0xFE:
            out.append(content[place:end])
        place = end
        if code == 0xDA:
            found = marker_in_scan.search(content, end)
            place = found.start() if found else len(content)
            out.append(content[end:place])
    if content[place : place + 2] == b"\xff\xd9":
        return b"".join([*out, b"\xff\xd9"])
    raise RowError("unreadable_image")


def clean_png(content: bytes) -> bytes:
    """The chunks of the picture; RowError("unreadable_image") where its end is missing."""
    out, place = [content[:8]], 8
    while place + 12 <= len(content):
        size, kind = (
            int.from_bytes(content[place : place + 4], "big"),
            content[place + 4 : place + 8],
        )
        if kind not in PNG_DROPPED:
            out.append(content[place : place + 12 + size])
        place += 12 + size
        if kind == b"IEND":
            return b"".join(out)
    raise RowError("unreadable_image")


def as_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG, grey where it is."""
    from PIL import Image

    same = (image == image[..., :1]).all()
    out = BytesIO()
    Image.fromarray(image[..., 0].copy() if same else image).save(out, "PNG")
    return out.getvalue()


def clean_picture(content: bytes, image: np.ndarray) -> bytes:
    """A picture's file without comments, EXIF and what stands behind its end.

    Args:
        image: what load_image made of it.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(BytesIO(content)) as picture:
            warnings.simplefilter("ignore")
            turned = picture.getexif().get(0x0112, 1) != 1
            single = getattr(picture, "n_frames", 1) == 1
            kind = picture.format
    except Exception:
        raise RowError("unreadable_image") from None
    if single and not turned and kind == "JPEG":
        return clean_jpeg(content)
    if single and not turned and kind == "PNG":
        return clean_png(content)
    return as_png(image)
