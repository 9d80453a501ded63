"""Other people's data sets to rows: items, listed in order at little cost, and each item's rows.

The process that leads lists items; workers make rows of them. What cannot become a row comes out as
Rejected, so that nothing is lost without a count.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import studies
from .config import Source
from .rows import RowError, checked, from_record, inside

DESCRIBE = "Describe this image."
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
BATCH = 16
IMAGE = "<image>"


class Item(NamedTuple):
    """Something that rows are made of; weight: about how many."""

    source: int  # number in the configuration
    data: object
    weight: int = 1


class Rejected(NamedTuple):
    """An input that is no row; count: how many it stands for."""

    id: str
    reason: str
    count: int = 1


def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.name.endswith(endings))
    if not path.is_file():
        raise ValueError(f"curate: expected a file or folder, got none at {path}")
    return [path]


def _json_records(file: Path) -> Iterator:
    """Of JSON lines one by one, of a JSON list all at once; None for what cannot be read."""
    if file.suffix == ".json":
        try:
            records = json.loads(file.read_text("utf-8"))
        except ValueError:
            records = None
        yield from records if isinstance(records, list) else [None]
        return
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield None


def _tables(file: Path) -> Iterator[tuple]:
    """("table", file, row group, rows) of a parquet file; None where its footer is broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            yield "table", str(file), group, metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError):
        yield None


def items(number: int, source: Source) -> Iterator[Item]:
    """A source's items in their order.

    Raises:
        ValueError: a path where nothing is.
    """
    path = Path(source.path)
    if source.kind == "studies":
        for weight, patient in studies.patients(source):
            yield Item(number, patient, weight)
        return
    endings = {"rows": (".parquet",), "llava": (".json", ".jsonl")}
    for file in _files(path, endings.get(source.kind, (".csv", ".jsonl", ".json", ".parquet"))):
        if file.suffix == ".parquet":
            for table in _tables(file):
                yield Item(number, table or ("broken", file.name), table[3] if table else 1)
        elif file.suffix == ".csv":
            with open(file, encoding="utf-8", errors="replace", newline="") as lines:
                for n, record in enumerate(csv.DictReader(lines)):
                    yield Item(number, ("record", f"{file.stem}-{n}", record))
        else:
            for n, record in enumerate(_json_records(file)):
                yield Item(number, ("record", f"{file.stem}-{n}", record))


def _table_records(data: tuple) -> Iterator[tuple[str, dict] | Rejected]:
    """The records of a row group; those behind a broken page are counted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _, file, group, rows = data
    stem, seen = f"{Path(file).stem}-{group}", 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(BATCH, row_groups=[group]):
            for record in batch.to_pylist():
                yield f"{stem}-{seen}", record
                seen += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        if seen < rows:
            yield Rejected(f"{stem}-{seen}", "unreadable_parquet", rows - seen)


def _caption_row(name: str, record: dict, source: Source) -> dict:
    caption, image = record.get(source.caption_column), record.get(source.image_column)
    if not isinstance(caption, str) or not caption.strip():
        raise RowError("empty_text")
    if isinstance(image, dict):  # datasets' own way
        image = image.get("bytes") or image.get("path")
    if not image or not isinstance(image, (str, bytes)):
        raise RowError("image_count")
    held = {"bytes": image} if isinstance(image, bytes) else {"path": image}
    ask = [{"type": "image"}, {"type": "text", "text": source.prompt or DESCRIBE}]
    return {
        "id": str(record.get(source.id_column) or name),
        "images": [held],
        "messages": [
            {"role": "user", "content": ask},
            {"role": "assistant", "content": [{"type": "text", "text": caption.strip()}]},
        ],
        "meta": {"prompt": "shared", "kind": "caption"},
    }


def _llava_content(text: str) -> list[dict]:
    """`<image>`s of a turn as parts of their own."""
    parts: list[dict] = []
    for index, piece in enumerate(text.split(IMAGE)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n ")})
    return parts


def _llava_row(name: str, record: dict) -> dict:
    turns, images = record.get("conversations"), record.get("image", record.get("images"))
    if not isinstance(turns, list) or not turns:
        raise RowError("bad_message")
    images = [images] if isinstance(images, str) else images or []
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise RowError("bad_row")
    messages = []
    for turn in turns:
        said = turn.get("value") if isinstance(turn, dict) else None
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(said, str) or speaker not in (*ROLES, "system"):
            raise RowError("bad_message")
        if not said.strip():
            raise RowError("empty_text")
        if speaker in ("human", "user"):
            messages.append({"role": "user", "content": _llava_content(said)})
        else:
            text = [{"type": "text", "text": said.strip()}]
            messages.append({"role": ROLES.get(speaker, "system"), "content": text})
    return {
        "id": str(record.get("id") or name),
        "images": [{"path": i} for i in images],
        "messages": messages,
    }


def _resolved(row: dict, root: Path) -> dict:
    """Image names as files under root, so that workers need no folder."""
    for image in row["images"]:
        if image.get("bytes") is None:
            if not isinstance(image.get("path"), str):
                raise RowError("bad_row")
            image["path"] = str(inside(root, image["path"]))
    return row


def _made(name: str, record, source: Source, root: Path) -> dict:
    if not isinstance(record, dict):
        raise RowError("unreadable_record")
    if source.kind == "rows":
        row = from_record(record)
    elif source.kind == "llava":
        row = _llava_row(name, record)
    else:
        row = _caption_row(name, record, source)
    return _resolved(checked(row), root)


def rows_of(item: Item, source: Source) -> Iterator[dict | Rejected]:
    """The rows of an item, each checked, their image paths absolute; and what is none."""
    kind = item.data[0]
    if kind == "patient":
        found = studies.rows_of_patient(item.data, source)
        root = Path(source.path)
    elif kind == "broken":
        found = [Rejected(f"{source.name}/{item.data[1]}", "unreadable_parquet")]
        root = Path(source.path)
    else:
        found = _table_records(item.data) if kind == "table" else [item.data[1:]]
        file = Path(source.path)
        root = Path(source.images) if source.images else file if file.is_dir() else file.parent
    for entry in found:
        if isinstance(entry, studies.Refused):
            yield Rejected(f"{source.name}/{entry.id}", entry.reason)
            continue
        if isinstance(entry, Rejected):
            yield entry._replace(id=f"{source.name}/{entry.id}") if kind == "table" else entry
            continue
        name, record = entry
        try:
            row = record if kind == "patient" else _made(name, record, source, root)
            row = _resolved(checked(row), root) if kind == "patient" else row
        except RowError as error:
            yield Rejected(f"{source.name}/{name}", error.reason)
            continue
        row["id"] = f"{source.name}/{row['id']}"
        row["source"] = source.name
        row["license"] = source.license or row["license"]
        yield row
