"""Choose tiles on the card at hand: python benchmarks/tune.py, or gpu_report.py --tune.

For each workload it notes which entries of the family's table (medgpt_kernels/configs) launchers
ask for, then walks from each entry to its best neighbour: a block twice or half as large, warps,
stages. A candidate must compile, give right results and be faster by more than 2 %. The table is
written after every entry, so it may be stopped; then `make aot` must still pass before a commit.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "tests")]

import harness  # noqa: E402
import torch  # noqa: E402
from gpu import attention, moe, tokens  # noqa: E402
from gpu.timing import ColdL2, Place, reason  # noqa: E402

from medgpt_kernels import tiles  # noqa: E402

GAIN = 0.98  # of the present time that a candidate must stay below
SAMPLES = 7
BLOCKS = (16, 256)  # the least and the largest block
WARPS, STAGES = (1, 16), (1, 6)
SPLITS = (64, 4096)


def neighbours(tile: tiles.Tile) -> Iterator[tiles.Tile]:
    """Tiles one step away in one direction."""
    for name, value in tile.items():
        if name == "num_stages":
            steps, (least, most) = (value - 1, value + 1), STAGES
        elif name == "USE_POLY_EXP2":
            yield tile | {name: not value}
            continue
        else:
            bounds = {"num_warps": WARPS, "SPLIT": SPLITS}
            steps, (least, most) = (value // 2, value * 2), bounds.get(name, BLOCKS)
            least = min(least, value)  # an entry may lie beyond the bounds already
        yield from (tile | {name: step} for step in steps if least <= step <= most)


def dumps(table: dict) -> str:
    """A table as it is committed: a line an entry."""
    kernels = []
    for kernel, choices in table.items():
        entries = ",\n".join(f"    {json.dumps(k)}: {json.dumps(t)}" for k, t in choices.items())
        kernels.append(f"  {json.dumps(kernel)}: {{\n{entries}\n  }}")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def workloads(place: Place) -> Iterator[tuple[Callable[[int], harness.Group], int, int]]:
    """(group, size that is timed, size that is checked) of calls that decide about speed."""
    for window in (0, attention.WINDOW):
        for backward in (False, True):
            build = partial(attention.attention_group, place, window, backward, False)
            yield build, place.size(8192, 40), place.size(1024, 40)
    for batch in place.size((1, 32), (1,)):
        build = partial(attention.decode_group, place, batch, 0)
        yield build, place.size(32768, 64), place.size(2048, 64)
    shapes = ((1, True, None, 0), (64, True, None, 0), (512, True, None, 0), (4096, True, None, 0),
              (4096, True, "frozen", 0), (4096, True, "frozen", moe.RANK), (4096, False, None, 0),
              (4096, False, "trainable", 0))  # fmt: skip
    for count, packed, backward, rank in place.size(shapes, shapes[:1]):
        build = partial(moe.experts_group, place, packed, backward, rank)
        yield build, count, place.size(min(count, 1024), 1)
    if not place.dry:
        yield partial(tokens.patch_group, place, True), len(tokens.SIZES), len(tokens.SIZES)
        yield partial(tokens.rotary_group, place), 16384, 1024


def asked(run: Callable[[], object], family: str) -> list[tuple[str, str]]:
    """The entries of the table that one call takes, in the order of its launches."""
    taken, entry = {}, tiles.entry

    def noting(which, kernel, keys):
        key, tile = entry(which, kernel, keys)
        if which == family:
            taken[kernel, key] = None
        return key, tile

    tiles.entry = noting
    try:
        run()
    finally:
        tiles.entry = entry
    return list(taken)


class Search:
    """The walk from one entry, for one workload."""

    def __init__(self, small: harness.Group, group: harness.Group, place: Place):
        self.small, self.place = small, place
        self.run = group.contenders["triton"]().run
        self.cold = None if place.dry else ColdL2()
        self.tried: dict[tuple, float] = {}

    def seconds(self, kernel: str, key: str, tile: tiles.Tile) -> float:
        """Of the workload with this tile, infinite where it does not compile."""
        name = (kernel, key, *sorted(tile.items()))
        if name in self.tried:
            return self.tried[name]
        try:
            with tiles.overriding(kernel, key, tile):
                self.run()
                taken = 1.0
                if self.cold:
                    taken = statistics.median(self.cold.seconds(self.run) for _ in range(SAMPLES))
        except Exception as error:
            if "illegal memory access" in str(error):
                raise  # nothing in this process can be believed any more
            taken = float("inf")
            print(f"    {kernel} {key} {tile}: {reason(error)}", flush=True)
        self.tried[name] = taken
        return taken

    def right(self, kernel: str, key: str, tile: tiles.Tile) -> bool:
        with tiles.overriding(kernel, key, tile):
            _, outcomes = harness.prepare(self.small, ["triton"])
        return not outcomes["triton"].refused

    def walk(self, kernel: str, key: str, tile: tiles.Tile, deadline: float) -> tiles.Tile:
        """The best tile found from `tile` on; itself where nothing near is better."""
        best = self.seconds(kernel, key, tile)
        while time.monotonic() < deadline:
            around = {self.seconds(kernel, key, t): t for t in neighbours(tile)}
            faster = sorted(s for s in around if s < GAIN * best)
            right = (s for s in faster if self.right(kernel, key, around[s]))
            seconds = next(right, None)
            if seconds is None:
                break
            if not self.place.dry:
                print(f"    {kernel} {key}: {best * 1e3:.3f} -> {seconds * 1e3:.3f} ms", flush=True)
            tile, best = around[seconds], seconds
        return tile


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time-limit", type=float, default=1800.0, metavar="S")
    parser.add_argument("--kernels", nargs="+", help="only these, as the table names them")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, by the interpreter")
    parser.add_argument("--out", type=Path, default=tiles.FOLDER, help="folder of the table")
    options = parser.parse_args(arguments)
    place = Place(options.dry_run)
    if options.dry_run:
        from gpu.part import stand_in_for_a_card

        stand_in_for_a_card()
        options.out = ROOT / "build" if options.out == tiles.FOLDER else options.out
    elif not torch.cuda.is_available():
        print("no CUDA device; --dry-run runs every candidate on the CPU", file=sys.stderr)
        return 2
    family = tiles.INTERPRETER if options.dry_run else tiles.device_family(0)
    table, deadline = tiles.table(family), time.monotonic() + options.time_limit
    options.out.mkdir(parents=True, exist_ok=True)
    path, done = options.out / f"{family}.json", set()
    for build, size, checked in workloads(place):
        if time.monotonic() > deadline:
            print("stopped: no time left")
            break
        group = build(size)
        search = Search(build(checked), group, place)
        print(f"  {group.name}", flush=True)
        for kernel, key in asked(search.run, family):
            if (kernel, key) in done or kernel not in (options.kernels or table):
                continue
            done.add((kernel, key))
            table[kernel][key] = search.walk(kernel, key, table[kernel][key], deadline)
            path.write_text(dumps(table))
    print(f"wrote {path}: {len(done)} entries looked at")
    return 0


if __name__ == "__main__":
    sys.exit(main())
