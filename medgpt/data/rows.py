"""Rows of images and conversations as parquet, checked on the way in (reader.py reads them).

A row: {id, source, license, images: [{bytes | path, height, width}], messages: [{role, channel,
thinking, content: [{type: "image"} | {type: "text", text}]}], meta}. An image holds the bytes of
its file, or a path under the folder of the parquet file; height and width are of the picture as
load_image returns it. Parquet keeps meta as JSON.
"""

import json
import os
from functools import cache
from pathlib import Path

ROLES = ("system", "developer", "user", "assistant")
CHANNELS = (None, "analysis", "final")
GROUP_ROWS, GROUP_BYTES = 64, 4 << 20  # a row group: what one read at random costs


class RowError(ValueError):
    """A row that is left out; `reason` is a short code that is counted, no text of the row."""

    def __init__(self, reason: str):
        super().__init__(f"row: expected a row to keep, got {reason}")
        self.reason = reason

    def __reduce__(self):
        return RowError, (self.reason,)


@cache
def schema():
    """The arrow schema of a file of rows."""
    import pyarrow as pa

    text = pa.string()
    part = pa.struct([("type", text), ("text", text)])
    image = pa.struct(
        [("bytes", pa.binary()), ("path", text), ("height", pa.int32()), ("width", pa.int32())]
    )
    message = pa.struct(
        [("role", text), ("channel", text), ("thinking", text), ("content", pa.list_(part))]
    )
    return pa.schema(
        [
            ("id", text),
            ("source", text),
            ("license", text),
            ("images", pa.list_(image)),
            ("messages", pa.list_(message)),
            ("meta", text),
        ]
    )


def inside(root: str | os.PathLike, name: str) -> Path:
    """The file `name` under root; RowError("path_outside") for one that leaves it."""
    root = Path(root).resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise RowError("path_outside") from None
    if not path.is_relative_to(root):
        raise RowError("path_outside")
    return path


def texts(row: dict, role: str | None = None) -> list[str]:
    """The row's texts in order, of one role or of all."""
    return [
        part["text"]
        for message in row["messages"]
        if role in (None, message["role"])
        for part in message["content"]
        if part["type"] == "text"
    ]


def _content(message: dict) -> list[dict]:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)) or not parts:
        raise RowError("bad_message")
    clean = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image" and message["role"] == "user":
            clean.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            clean.append({"type": "text", "text": part["text"]})
        else:
            raise RowError("bad_message")
    return clean


def _message(message: dict) -> dict:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RowError("bad_message")
    clean = {"role": message["role"], "content": _content(message)}
    for name in ("channel", "thinking"):
        value = message.get(name)
        if value is not None and (message["role"] != "assistant" or not isinstance(value, str)):
            raise RowError("bad_message")
        if value:
            clean[name] = value
    if clean.get("channel") not in CHANNELS:
        raise RowError("bad_message")
    return clean


def checked(row: dict) -> dict:
    """The row in its one form.

    Raises:
        RowError: bad_row, bad_message, empty_text (a text part, or an assistant's answer, without
            letters), no_answer (no assistant message), image_count (image parts that are not as
            many as images).
    """
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not row["id"]:
        raise RowError("bad_row")
    messages, images = row.get("messages"), row.get("images")
    images = [] if images is None else images
    if not isinstance(messages, (list, tuple)) or not isinstance(images, (list, tuple)):
        raise RowError("bad_row")
    if not messages or not all(isinstance(i, dict) for i in images):
        raise RowError("bad_row")
    meta = row.get("meta")
    meta = {} if meta is None else meta
    if not isinstance(meta, dict):
        raise RowError("bad_row")
    names = {name: row.get(name) or "" for name in ("source", "license")}
    if not all(isinstance(name, str) for name in names.values()):
        raise RowError("bad_row")
    clean = {"id": row["id"], **names, "images": list(images)}
    clean["messages"] = [_message(message) for message in messages]
    clean["meta"] = meta
    if not any(m["role"] == "assistant" for m in clean["messages"]):
        raise RowError("no_answer")
    if not all(text.strip() for text in texts(clean)) or not all(
        any(p["type"] == "text" for p in m["content"])
        for m in clean["messages"]
        if m["role"] == "assistant"
    ):
        raise RowError("empty_text")
    parts = sum(p["type"] == "image" for m in clean["messages"] for p in m["content"])
    if parts != len(images):
        raise RowError("image_count")
    return clean


def to_record(row: dict) -> dict:
    """A row as parquet keeps it."""
    return {**row, "meta": json.dumps(row["meta"], sort_keys=True, ensure_ascii=False)}


def from_record(record: dict) -> dict:
    """A parquet record as a checked row."""
    try:
        meta = json.loads(record.get("meta") or "{}")
    except (TypeError, ValueError):
        raise RowError("bad_row") from None
    return checked({**record, "meta": meta})


def row_bytes(row: dict) -> int:
    """Bytes of a row's images and texts."""
    return sum(len(i.get("bytes") or b"") for i in row["images"]) + sum(map(len, texts(row)))


class RowWriter:
    """Writes rows to one parquet file in small row groups; the same rows give the same bytes."""

    def __init__(self, path: str | os.PathLike, schema=None):
        self.path, self.schema = Path(path), schema
        self.rows, self.bytes, self.count = [], 0, 0

    def __enter__(self) -> "RowWriter":
        import pyarrow.parquet as pq

        self.schema = self.schema or schema()
        self.file = pq.ParquetWriter(self.path, self.schema, compression="zstd")
        return self

    def write(self, row: dict) -> None:
        self.rows.append(to_record(row))
        self.bytes += row_bytes(row)
        self.count += 1
        if len(self.rows) >= GROUP_ROWS or self.bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.rows:
            self.file.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
            self.rows, self.bytes = [], 0

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._flush()
        self.file.close()


def write_rows(path: str | os.PathLike, rows) -> int:
    """Checks and writes rows; how many."""
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(checked(row))
    return writer.count
