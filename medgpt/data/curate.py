"""A curation from end to end: chunks by worker processes, then one pass in order over what is left.

A run that was killed goes on where it stood, and what it writes is the same to the byte, whatever
the number of workers.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

from .chunks import chunked, paths, run_chunk, write_whole
from .config import Curation
from .decontaminate import contamination
from .inspector import Inspector, token_counter
from .merge import REPORT, merge

WORK = "work"  # folder of what a run has not finished
_inspector: Inspector | None = None


def _start_worker(config: Curation, found) -> None:
    """In a worker: its inspector, and an end with the leading process's."""
    global _inspector
    _inspector = Inspector(config, found, token_counter(config.tokenizer))
    leader = parent_process()
    if leader is not None:

        def follow() -> None:
            leader.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _work(number: int, chunk: list, folder: Path) -> dict:
    assert _inspector is not None
    return run_chunk(number, chunk, folder, _inspector)


@contextlib.contextmanager
def _alone(folder: Path):
    """Only one run a folder; the lock goes with the process."""
    import fcntl

    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"curate: expected {folder} to be free, got another run") from None
        yield


def _begin(config: Curation, output: Path) -> Path:
    """The folder of chunks, of this very configuration."""
    folder, mark = output / WORK, output / "config.sha256"
    folder.mkdir(parents=True, exist_ok=True)
    if mark.exists() and mark.read_text() != config.fingerprint():
        raise ValueError(
            f"curate: expected the configuration and inputs that {output} was begun with, "
            "got others; choose another output or remove it"
        )
    write_whole(mark, config.fingerprint())
    for left in (*folder.glob("*.tmp"), *output.glob("*.tmp")):
        left.unlink()
    return folder


def _chunks(config: Curation, folder: Path, workers: int) -> Iterator[dict]:
    """Counts of every chunk as it is done; those done before come as {"again": True}."""
    found = contamination(config.benchmarks)
    pending: set[Future] = set()
    context = get_context("spawn")
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    workers, context, initializer=_start_worker, initargs=(config, found)
                )
            )
        else:
            inspector = Inspector(config, found, token_counter(config.tokenizer))
        number = -1
        for number, chunk in enumerate(chunked(config)):
            if paths(folder, number)[1].exists():
                yield {"seen": sum(item.weight for item in chunk), "kept": 0, "again": True}
            elif workers > 1:
                pending.add(pool.submit(_work, number, chunk, folder))
                if len(pending) >= 2 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            else:
                yield run_chunk(number, chunk, folder, inspector)
        for future in wait(pending).done:
            yield future.result()
        yield {"chunks": number + 1}


def _watched(counts: Iterator[dict]) -> Iterator[dict]:
    try:
        yield from counts
    except BrokenProcessPool:
        raise ValueError(
            "curate: expected workers to live, got one that was killed or crashed; what is done is "
            "kept: run it again, with fewer workers if memory ran out"
        ) from None


def curate(config: Curation, *, workers: int = 1, progress: bool = True) -> dict:
    """Runs a curation, or goes on with one that was stopped; of a finished one reads the report.

    Args:
        workers: processes; the output does not depend on them.
        progress: a bar on stderr.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: another configuration's output, another run at work, missing inputs.
    """
    from tqdm import tqdm

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        folder = _begin(config, output)
        if (output / REPORT).exists():
            return json.loads((output / REPORT).read_text("utf-8"))
        seen = kept = 0
        with tqdm(unit=" rows", desc="curate", disable=not progress) as bar:
            for counts in _watched(_chunks(config, folder, workers)):
                if "chunks" in counts:
                    count = counts["chunks"]
                    continue
                bar.update(counts["seen"])
                if "again" not in counts:
                    seen, kept = seen + counts["seen"], kept + counts["kept"]
                    bar.set_postfix(passed=f"{kept}/{seen}")
        return merge(config, folder, count, output, progress=progress)


def remove_work(output: str | Path) -> None:
    """The chunks of a finished run, which only a run that is repeated would need."""
    if (Path(output) / REPORT).exists():
        shutil.rmtree(Path(output) / WORK, ignore_errors=True)
