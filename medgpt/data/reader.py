"""Parquet files of rows as one sequence, read at random, and where their images are."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from .rows import RowError, from_record, inside

CACHED_GROUPS = 8
BROKEN = "unreadable_parquet"


def row_files(paths) -> list[Path]:
    """The parquet files of one path or several; of a folder all *.parquet, by name."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise ValueError(f"rows: expected parquet files, got none at {path}")
        files += found
    if not files:
        raise ValueError("rows: expected parquet files, got no path")
    return files


class Rows(Sequence):
    """Files of rows as one sequence, read at random a row group at a time.

    Open files stay in the process that opened them: it can be sent to workers.

    Args:
        paths: of row_files.
        skip_broken: files without a readable footer go to `broken`; else they raise.

    Raises:
        ValueError: no files, a broken one; `rows[i]`: a RowError, "unreadable_parquet" for what
            parquet cannot decode.
    """

    def __init__(self, paths, *, skip_broken: bool = False):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files: list[Path] = []
        self.broken: list[Path] = []
        self.groups: list[tuple[int, int, int]] = []  # file, row group, first row
        self.count = 0
        for file in row_files(paths):
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError):
                if not skip_broken:
                    raise ValueError(
                        f"rows: expected a parquet file, got another: {file}"
                    ) from None
                self.broken.append(file)
                continue
            for group in range(metadata.num_row_groups):
                self.groups.append((len(self.files), group, self.count))
                self.count += metadata.row_group(group).num_rows
            self.files.append(file)
        self._reset()

    def _reset(self) -> None:
        self._open: dict = {}
        self._cached: OrderedDict = OrderedDict()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_cached")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self.count

    def _table(self, place: int):
        import pyarrow as pa
        import pyarrow.parquet as pq

        if place in self._cached:
            self._cached.move_to_end(place)
            return self._cached[place]
        number, group, _ = self.groups[place]
        try:
            if number not in self._open:
                self._open[number] = pq.ParquetFile(self.files[number], memory_map=True)
            table = self._open[number].read_row_group(group)
        except (pa.ArrowException, OSError):
            raise RowError(BROKEN) from None
        self._cached[place] = table
        if len(self._cached) > CACHED_GROUPS:
            self._cached.popitem(last=False)
        return table

    def _place(self, index: int) -> int:
        """The row group of a row."""
        return bisect_right(self.groups, index, key=lambda group: group[2]) - 1

    def __getitem__(self, index: int) -> dict:
        import pyarrow as pa

        if not -self.count <= index < self.count:
            raise IndexError(f"rows: expected an index below {self.count}, got {index}")
        index %= self.count
        place = self._place(index)
        try:
            record = self._table(place).slice(index - self.groups[place][2], 1).to_pylist()[0]
        except (pa.ArrowException, UnicodeDecodeError):
            raise RowError(BROKEN) from None
        return from_record(record)

    def name(self, index: int) -> str:
        """file:row, for a row that has no readable id."""
        number = self.groups[self._place(index)][0]
        start = next(f for n, _, f in self.groups if n == number)
        return f"{self.files[number].name}:{index - start}"

    def folder(self, index: int) -> Path:
        """Where the paths of that row's images start."""
        return self.files[self.groups[self._place(index)][0]].parent

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(self.count))


def image_sources(row: dict, folder: str | os.PathLike) -> list[bytes | Path]:
    """What load_image takes for each of the row's images."""
    sources = []
    for image in row["images"]:
        if image.get("bytes") is not None:
            sources.append(image["bytes"])
        elif isinstance(image.get("path"), str):
            sources.append(inside(folder, image["path"]))
        else:
            raise RowError("bad_row")
    return sources
