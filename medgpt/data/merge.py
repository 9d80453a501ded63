"""Chunks to the output in their order: duplicates out, shards written, all inputs accounted for."""

import json
import os
from collections import Counter
from pathlib import Path

from .chunks import chunk_rows, paths, write_whole
from .config import Curation
from .dedup import Duplicates
from .report import Statistics, html
from .rows import RowWriter, from_record

REPORT = "report.json"  # where it is, the run is finished


class Shards:
    """rows-00000.parquet, ... of at most `rows` rows each, renamed once they are whole."""

    def __init__(self, output: Path, rows: int):
        self.output, self.rows = output, rows
        self.writer: RowWriter | None = None
        self.done: list[tuple[Path, Path]] = []

    def write(self, row: dict) -> None:
        if self.writer is None:
            path = self.output / f"rows-{len(self.done):05d}.parquet"
            self.done.append((path.with_name(f"{path.name}.tmp"), path))
            self.writer = RowWriter(self.done[-1][0]).__enter__()
        self.writer.write(row)
        if self.writer.count >= self.rows:
            self.close()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.__exit__(None)
            self.writer = None

    def publish(self) -> None:
        """Renames all, and removes shards that an earlier, longer run may have left."""
        self.close()
        names = set()
        for temporary, path in self.done:
            os.replace(temporary, path)
            names.add(path)
        for path in self.output.glob("rows-*.parquet"):
            if path not in names:
                path.unlink()


class Ledger:
    """What became of every input: seen = kept + dropped by reason."""

    def __init__(self, names: list[str]):
        self.seen, self.kept = Counter(dict.fromkeys(names, 0)), Counter(dict.fromkeys(names, 0))
        self.dropped = {name: Counter() for name in names}

    def close(self) -> dict:
        """Counts by source and in all; an AssertionError if a single input is missing."""
        by_source = {}
        for name in self.seen:
            dropped = dict(sorted(self.dropped[name].items()))
            by_source[name] = {"in": self.seen[name], "kept": self.kept[name], "dropped": dropped}
            assert self.seen[name] == self.kept[name] + sum(dropped.values()), (
                f"{name}: {self.seen[name]} in, {self.kept[name]} kept, "
                f"{sum(dropped.values())} dropped"
            )
        reasons: Counter = sum(self.dropped.values(), Counter())
        return {
            "in": self.seen.total(),
            "kept": self.kept.total(),
            "dropped": dict(sorted(reasons.items())),
            "sources": by_source,
        }


def merge(config: Curation, folder: Path, count: int, output: Path, *, progress: bool) -> dict:
    """Writes rows-*.parquet, dropped.jsonl, contaminated.json, report.html and, last, report.json.

    Args:
        folder, count: of the chunks.
    """
    from tqdm import tqdm

    ledger = Ledger([source.name for source in config.sources])
    index = folder / "duplicates.tmp"
    duplicates = Duplicates(
        mode=config.duplicates,
        near_text=config.near_text,
        near_image=config.near_image,
        path=index,
    )
    statistics, hits = Statistics(config.examples), {}
    shards = Shards(output, config.shard_rows)
    dropped_path = output / "dropped.jsonl"
    temporary = dropped_path.with_name("dropped.jsonl.tmp")
    with open(temporary, "w", encoding="utf-8") as log:

        def drop(source: str, name: str, reason: str, number: int = 1) -> None:
            ledger.dropped[source][reason] += number
            entry = {"source": source, "id": name, "reason": reason, "count": number}
            log.write(json.dumps(entry) + "\n")

        for number in tqdm(range(count), unit=" chunks", desc="merge", disable=not progress):
            rows_path, done_path = paths(folder, number)
            told = json.loads(done_path.read_text("utf-8"))
            ledger.seen.update(told["seen"])
            statistics.add_chunk(told)
            for entry in told["dropped"]:
                drop(*entry)
            for benchmark, item, name in told["hits"]:
                hits.setdefault(benchmark, {}).setdefault(item, []).append(name)
            for record, features, tokens in chunk_rows(rows_path):
                row = from_record(record)
                fault = duplicates.fault(features)
                if fault is not None:
                    drop(row["source"], row["id"], fault)
                    statistics.add_example(fault, row)
                    continue
                ledger.kept[row["source"]] += 1
                statistics.add_row(row, tokens)
                shards.write(row)
    duplicates.close()
    index.unlink()
    report = {**ledger.close(), **statistics.as_dict()}
    shards.publish()
    os.replace(temporary, dropped_path)
    write_whole(output / "contaminated.json", json.dumps(hits, indent=1, sort_keys=True))
    report["contaminated"] = {benchmark: len(items) for benchmark, items in sorted(hits.items())}
    write_whole(output / "report.html", html(report))
    report.pop("examples")
    write_whole(output / REPORT, json.dumps(report, indent=1))
    return report
