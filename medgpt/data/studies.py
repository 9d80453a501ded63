"""Folders of chest studies as MIMIC-CXR has them, to rows of one, several and consecutive studies.

root/**/patient/study/image.{dcm,jpg,png}, the report at root/**/patient/study.txt or inside the
study's folder. Views and dates come from a metadata CSV or from DICOM headers; without dates there
is no order, and so no prior study.
"""

import csv
import gzip
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .clean import read_dicom
from .config import Source
from .rows import RowError

IMAGES = (".dcm", ".jpg", ".jpeg", ".png")
SECTION = re.compile(r"^[ \t]*([A-Z][A-Z /()&-]{2,40}):", re.MULTILINE)
FRONTAL = ("PA", "AP", "")
ANSWERED = ("FINDINGS", "IMPRESSION")
ASK = "Write the findings and the impression of this study."
ASK_PRIOR = "Write the findings and the impression of the current study, compared with the prior."


class Refused(NamedTuple):
    id: str
    reason: str


class Image(NamedTuple):
    path: str  # from the source's folder
    view: str
    date: str  # YYYYMMDDhhmmss, "" if unknown


class Study(NamedTuple):
    name: str
    images: list[Image]
    sections: dict[str, str]
    date: str


def _table(source: Source) -> dict[str, dict]:
    """Rows of the metadata CSV by dicom_id."""
    if source.metadata is None:
        return {}
    path = Path(source.metadata)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as lines:
        names = ("ViewPosition", "StudyDate", "StudyTime")
        return {r["dicom_id"]: {n: r.get(n) or "" for n in names} for r in csv.DictReader(lines)}


def patients(source: Source) -> Iterator[tuple[int, tuple]]:
    """(weight, ("patient", folder, {study: images}, metadata of those images)), by folder name.

    A study is a folder with images; its patient is the folder above.
    """
    root, table = Path(source.path), _table(source)
    if not root.is_dir():
        raise ValueError(f"curate: expected a folder of studies, got none at {root}")
    for folder, below, _ in os.walk(root):
        below.sort()
        found = {}
        for name in below:
            files = sorted(
                f.name for f in os.scandir(Path(folder) / name) if f.name.lower().endswith(IMAGES)
            )
            if files:
                found[name] = files
        if found:
            stems = [Path(f).stem for files in found.values() for f in files]
            known = {stem: table[stem] for stem in stems if stem in table}
            relative = str(Path(folder).relative_to(root))
            yield sum(map(len, found.values())), ("patient", relative, found, known)


def sections(report: str) -> dict[str, str]:
    """A report's parts by their heading in capitals, white space made even."""
    found, marks = {}, list(SECTION.finditer(report))
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        text = report[mark.end() : after.start() if after else len(report)]
        text = " ".join(text.split())
        if text:
            found.setdefault(mark[1].strip(), text)
    return found


def _report(folder: Path, name: str) -> str:
    beside = folder / f"{name}.txt"
    inside = sorted((folder / name).glob("*.txt"))
    path = beside if beside.is_file() else inside[0] if inside else None
    if path is None:
        raise RowError("no_report")
    return path.read_text("utf-8", errors="replace")


def _image(root: Path, relative: Path, known: dict) -> Image:
    """View and date by the metadata, else by the DICOM header."""
    said = known.get(relative.stem)
    if said is None and relative.suffix.lower() == ".dcm":
        data = read_dicom((root / relative).read_bytes())
        if not any(k in data for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise RowError("dicom_without_pixels")
        said = {n: str(data.get(n) or "") for n in ("ViewPosition", "StudyDate", "StudyTime")}
    said = said or {"ViewPosition": "", "StudyDate": "", "StudyTime": ""}
    date, time = said["StudyDate"], said["StudyTime"].split(".")[0]
    date = date + time.zfill(6) if re.fullmatch(r"\d{8}", date) else ""
    return Image(str(relative), said["ViewPosition"].upper(), date)


def _studies(data: tuple, source: Source) -> Iterator[Study | Refused]:
    _, folder, found, known = data
    root = Path(source.path)
    for name, files in found.items():
        images = []
        for file in files:
            try:
                images.append(_image(root, Path(folder) / name / file, known))
            except RowError as error:
                yield Refused(_name(source, folder, name, file), error.reason)
        if not images:
            continue
        try:
            parts = sections(_report(root / folder, name))
            if not any(parts.get(title) for title in ANSWERED):
                raise RowError("empty_text")
        except RowError as error:
            yield Refused(_name(source, folder, name), error.reason)
            continue
        dates = [image.date for image in images if image.date]
        yield Study(name, images, parts, min(dates, default=""))


def _name(source: Source, *parts: str) -> str:
    path = "/".join(parts)
    if not source.hash_ids:
        return path
    return hashlib.sha256(f"{source.name}/{path}".encode()).hexdigest()[:20]


def _answer(study: Study) -> str:
    return "\n".join(
        f"{t.capitalize()}: {study.sections[t]}" for t in ANSWERED if t in study.sections
    )


def _row(name: str, view: str, text: str, images: list[Image], study: Study, prior=None) -> dict:
    """images: those of the study; the prior's stand before them."""
    parts: list[dict] = []
    shown = list(images)
    if prior is not None:
        old = _frontal(prior)[0]
        shown = [old, *images]
        parts += [{"type": "text", "text": "Prior study:"}, {"type": "image"}]
        parts += [{"type": "text", "text": f"{_answer(prior)}\nCurrent study:"}]
    parts += [{"type": "image"}] * len(images)
    reason = study.sections.get("INDICATION") or study.sections.get("HISTORY")
    asked = f"Indication: {reason}\n{text}" if reason else text
    return {
        "id": f"{name}/{view}",
        "images": [{"path": image.path} for image in shown],
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": [{"type": "text", "text": _answer(study)}]},
        ],
        "meta": {"kind": "report", "view": view, "views": [image.view for image in shown]},
    }


def _frontal(study: Study) -> list[Image]:
    return [image for image in study.images if image.view in FRONTAL] or study.images[:1]


def rows_of_patient(data: tuple, source: Source) -> Iterator[tuple[str, dict] | Refused]:
    """Rows of every study: one a frontal image, one of all images, one with the prior study."""
    found = list(_studies(data, source))
    yield from (entry for entry in found if isinstance(entry, Refused))
    current = [entry for entry in found if isinstance(entry, Study)]
    current.sort(key=lambda study: (study.date, study.name))
    for place, study in enumerate(current):
        name = _name(source, data[1], study.name)
        text = source.prompt or ASK
        if "single" in source.views:
            for number, image in enumerate(_frontal(study)):
                row = _row(name, f"single-{number}", text, [image], study)
                yield row["id"], row
        if "multi" in source.views and len(study.images) > 1:
            row = _row(name, "multi", text, study.images, study)
            yield row["id"], row
        earlier = [s for s in current[:place] if s.date and s.date < study.date]
        if "longitudinal" in source.views and earlier:
            prior_text = source.prompt or ASK_PRIOR
            row = _row(name, "longitudinal", prior_text, study.images, study, earlier[-1])
            yield row["id"], row
