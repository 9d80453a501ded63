"""Rows of a data set from the hub, a folder or a file, and what exactly was loaded."""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Rows(NamedTuple):
    """Rows in their order, where their images are, and a description for the results.

    Attributes:
        loaded: source, files (name and sha256), rows, and sha256 of the rows themselves: equal
            rows have an equal hash whatever file they came in.
    """

    rows: list[dict]
    root: Path | None
    loaded: dict


def read_rows(
    data: str | Path,
    *,
    split: str = "",
    configs: tuple[str, ...] = (),
    images: str | Path | None = None,
) -> Rows:
    """Rows of a file, or of the files of a folder that belong to a split and to configs.

    Args:
        data: .jsonl, .json (a list, or rows by id), .csv, .tsv, .parquet or a folder of them.
        split: in a folder, files with it as a word of their path, such as test-00000.parquet.
        configs: in a folder, those under folders or names of these, where there are any.
        images: the folder that image paths are relative to; default that of the data.
    """
    path = Path(data)
    files = [path] if path.is_file() else _files(path, split, configs)
    rows: list[dict] = []
    for file in files:
        rows.extend(_read(file))
    if not rows:
        raise ValueError(f"read_rows: expected rows in {path.name}, got none")
    described = [{"name": f.name, "sha256": _file_hash(f)} for f in files]
    loaded = {"source": path.name, "files": described, "rows": len(rows), "sha256": rows_hash(rows)}
    root = Path(images) if images else (path.parent if path.is_file() else path)
    return Rows(rows, root, loaded)


def read_hub(hub: str, *, split: str, configs: tuple[str, ...] = ()) -> Rows:
    """Rows of a data set of the Hugging Face hub, images as their encoded bytes."""
    try:
        from datasets import Image, load_dataset
    except ImportError:
        raise ImportError("read_hub: expected the package datasets, got none") from None
    rows = []
    for config in configs or (None,):
        part = load_dataset(hub, config, split=split)
        for name, feature in part.features.items():
            if isinstance(feature, Image):
                part = part.cast_column(name, Image(decode=False))
        rows.extend(dict(row) for row in part)
    loaded = {"source": f"hub:{hub}", "split": split, "rows": len(rows), "sha256": rows_hash(rows)}
    return Rows(rows, None, loaded)


def _files(folder: Path, split: str, configs: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"read_rows: expected a file or folder, got {folder.name}, not there")
    files = sorted(f for f in folder.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    for wanted in (configs, (split,) if split else ()):
        named = [f for f in files if _words(f.relative_to(folder)) & {w.casefold() for w in wanted}]
        files = named or files
    if not files or (len(files) > 1 and split and not named):
        wanted = f"files of split {split or 'any'} in {folder.name}"
        raise ValueError(f"read_rows: expected {wanted}, got {len(files)}")
    return files


def _words(path: Path) -> set[str]:
    """Folder names, file name without suffix, and its pieces between - and . signs."""
    stem = path.name.split(".")[0]
    return {w.casefold() for w in (*path.parts[:-1], stem, *stem.split("-"), *stem.split("_"))}


def _read(file: Path) -> Iterable[dict]:
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ImportError("read_rows: expected the package pyarrow, got none") from None
        # a few rows at a time: one copy of their images in memory, not the whole table's beside it
        with parquet.ParquetFile(file) as opened:
            return [row for part in opened.iter_batches(batch_size=64) for row in part.to_pylist()]
    if file.suffix in (".csv", ".tsv"):
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append(_object(line, f"{file.name} line {number}"))
        return rows
    found = _loads(text, file.name)
    if isinstance(found, dict):
        found = [{"id": key, **row} for key, row in found.items() if isinstance(row, dict)]
    return [row for row in found if isinstance(row, dict)]


def _loads(text: str, what: str):
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"read_rows: expected JSON in {what}, got something else") from None


def _object(text: str, what: str) -> dict:
    row = _loads(text, what)
    if not isinstance(row, dict):
        raise ValueError(f"read_rows: expected an object in {what}, got {type(row).__name__}")
    return row


def _file_hash(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def rows_hash(rows: Iterable[Mapping]) -> str:
    """sha256 of rows in order; bytes count as their own sha256."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, default=_hashable).encode() + b"\n")
    return total.hexdigest()


def _hashable(value):
    if isinstance(value, (bytes, bytearray)):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return str(value)
