"""A chunk of inputs to two files: its kept rows with their features, and what became of all.

A chunk's files depend on its inputs alone. The second is written last and whole: where it is, the
chunk is done.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .config import Curation
from .features import Features
from .importers import Item, Rejected, items, rows_of
from .inspector import Inspector
from .rows import RowError, RowWriter, schema, texts

FEATURES = ("text", "images", "minhash", "hashes")
EXAMPLE = 400  # characters


def chunk_schema():
    """rows.schema() and the features."""
    import pyarrow as pa

    found = schema()
    for name in FEATURES:
        found = found.append(pa.field(f"feature_{name}", pa.binary()))
    return found.append(pa.field("tokens", pa.int32()))


def chunked(config: Curation) -> Iterator[list[Item]]:
    """All inputs in their order, about chunk_rows rows at a time."""
    chunk, weight = [], 0
    for number, source in enumerate(config.sources):
        for item in items(number, source):
            chunk.append(item)
            weight += item.weight
            if weight >= config.chunk_rows:
                yield chunk
                chunk, weight = [], 0
    if chunk:
        yield chunk


def paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:08d}.parquet", folder / f"{number:08d}.json"


def write_whole(path: Path, content: str) -> None:
    """All of it, or nothing, also if the process is killed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Tally:
    """What became of the inputs of one chunk."""

    def __init__(self, examples: int):
        self.seen: Counter = Counter()  # by source
        self.dropped: list[list] = []  # source, id, reason, count
        self.hits: list[list] = []  # benchmark, item, row id
        self.replaced: Counter = Counter()
        self.flags: Counter = Counter()
        self.examples: dict[str, list[str]] = {}
        self.most = examples

    def drop(self, source: str, name: str, reason: str, count: int = 1, text: str = "") -> None:
        self.dropped.append([source, name, reason, count])
        kept = self.examples.setdefault(reason, []) if self.most and text else []
        if len(kept) < self.most:
            kept.append(text[:EXAMPLE])

    def as_dict(self, kept: dict) -> dict:
        names = ("seen", "dropped", "hits", "replaced", "flags", "examples")
        return {**{name: getattr(self, name) for name in names}, "kept": kept}


def _inspected(
    chunk: Iterable[Item], config: Curation, inspector: Inspector, tally: Tally
) -> Iterator[dict]:
    for item in chunk:
        source = config.sources[item.source]
        for row in rows_of(item, source):
            if isinstance(row, Rejected):
                tally.seen[source.name] += row.count
                tally.drop(source.name, row.id, row.reason, row.count)
                continue
            tally.seen[source.name] += 1
            try:
                found = inspector(row, source)
            except RowError as error:
                text = "\n".join(texts(row)) if config.examples else ""
                tally.drop(source.name, row["id"], error.reason, text=text)
                tally.hits += [[*hit, row["id"]] for hit in getattr(error, "hits", ())]
                continue
            tally.replaced.update(found.replaced)
            tally.flags.update(found.row["meta"].get("flags", ()))
            named = {f"feature_{name}": getattr(found.features, name) for name in FEATURES}
            yield {**found.row, **named, "tokens": found.tokens}


def run_chunk(number: int, chunk: list[Item], folder: Path, inspector: Inspector) -> dict:
    """Writes a chunk's two files; {seen, kept} counts for the progress bar."""
    rows_path, done_path = paths(folder, number)
    temporary = rows_path.with_name(f"{rows_path.name}.{os.getpid()}.tmp")
    config = inspector.config
    tally, kept = Tally(config.examples), Counter()
    with RowWriter(temporary, chunk_schema()) as writer:
        for row in _inspected(chunk, config, inspector, tally):
            kept[row["source"]] += 1
            writer.write(row)
    os.replace(temporary, rows_path)
    write_whole(done_path, json.dumps(tally.as_dict(kept), sort_keys=True))
    return {"seen": tally.seen.total(), "kept": kept.total()}


def chunk_rows(path: Path) -> Iterator[tuple[dict, Features, int]]:
    """A chunk's kept records as parquet holds them, their features and tokens."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        for record in file.read_row_group(group).to_pylist():
            found = Features(*(record.pop(f"feature_{name}") for name in FEATURES))
            yield record, found, record.pop("tokens")
