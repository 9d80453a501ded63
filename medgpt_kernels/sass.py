"""Machine code of NVIDIA GPUs, as nvdisasm prints it: the hot loop, and what its instructions need.

A block of threads runs W warps. Most instructions are issued once by each warp; those that only one
elected warp issues (tcgen05) count once a block. Works on text alone: no GPU, no compiler.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
WIDTH = re.compile(r"\.(U8|S8|U16|S16|32|64|128)\b")
PAIRS = ("FADD2", "FMUL2", "FFMA2")  # two results a thread
BANKS_BYTES = 128  # of shared memory in one cycle; no access takes less, nor does a shuffle
OTHER = re.compile(
    "U[A-Z]|LD|ST|BAR|DEPBAR|BRA|CALL|EXIT|NOP|WARP|MEMBAR|FENCE|CCTL|S2|CS2R|R2UR|SYNCS|RED|ATOM|"
    "ERRBAR|BSSY|BSYNC|ELECT|REDUX|VOTE|NANOSLEEP|YIELD"
)  # uniform operations, global memory, control
HALVES = ("HFMA2", "HADD2", "HMUL2", "HMNMX2", "HSET2", "HSETP2")


class Instruction(NamedTuple):
    """One line of machine code."""

    guard: str  # "!P0", or empty
    opcode: str  # "HMMA.16816.F32.BF16"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


class Block(NamedTuple):
    """Instructions that run one after another, and the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    following: tuple[int, ...]


class Loop(NamedTuple):
    """One round of an innermost loop."""

    every_warp: tuple[Instruction, ...]
    one_warp: tuple[Instruction, ...]  # by the elected warp of each block of threads

    def all(self) -> tuple[Instruction, ...]:
        return self.every_warp + self.one_warp


class Counts(NamedTuple):
    """What one round of a loop asks of the units, for a whole block of threads."""

    flops: int  # of matrix instructions
    instructions: Counter  # issued, by unit; in warps
    issued: int  # of all
    shared_bytes: int  # of shared memory's bandwidth, operands of matrix instructions included
    global_bytes: int  # loaded through the L1 cache, asynchronous copies included


def parse(text: str) -> list[Block]:
    """The basic blocks of one kernel, in the order of its code."""
    starts, items = {}, []
    for line in text.splitlines():
        if label := LABEL.match(line):
            starts[label.group(1)] = len(items)
        elif found := LINE.search(line):
            items.append(Instruction(*(group or "" for group in found.groups()[1:])))
    ends = {i + 1 for i, item in enumerate(items) if TARGET.search(item.operands)}
    leaders = sorted({0, *starts.values(), *ends} - {len(items)})
    number = {start: i for i, start in enumerate(leaders)}
    blocks = []
    for i, start in enumerate(leaders):
        stop = leaders[i + 1] if i + 1 < len(leaders) else len(items)
        last = items[stop - 1]
        target = TARGET.search(last.operands)
        following = []
        if target and starts[target.group(1)] in number:
            following.append(number[starts[target.group(1)]])
        if not _leaves(last) and i + 1 < len(leaders):
            following.append(i + 1)
        blocks.append(Block(tuple(items[start:stop]), tuple(following)))
    return blocks


def _leaves(item: Instruction) -> bool:
    """Whether the next instruction is never reached from this one."""
    if item.guard:
        return False
    return item.name in ("EXIT", "RET") or (
        item.name in ("BRA", "CALL") and item.operands.startswith("`")
    )


def _dominators(blocks: list[Block]) -> list[set[int]]:
    """Of each block, those that every way to it passes."""
    before = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for j in block.following:
            before[j].append(i)
    everything = set(range(len(blocks)))
    found = [{0}] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            ways = [found[j] for j in before[i]]
            new = {i} | (set.intersection(*ways) if ways else set())
            if new != found[i]:
                found[i], changed = new, True
    return found


def _natural_loops(blocks: list[Block], dominators: list[set[int]]) -> dict[int, set[int]]:
    """By the block at its head, the blocks of each loop."""
    before = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for j in block.following:
            before[j].append(i)
    found: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for head in set(block.following) & dominators[i]:
            inside, waiting = {head}, [i]
            while waiting:
                j = waiting.pop()
                if j not in inside:
                    inside.add(j)
                    waiting += before[j]
            found[head] = found.get(head, set()) | inside
    return found


def loops(blocks: list[Block], matter=lambda item: True) -> Iterator[Loop]:
    """Innermost among the loops with an instruction that matters; loops without are part of theirs.

    Blocks with tcgen05 instructions that a round may pass by are the elected warp's.
    """
    dominators = _dominators(blocks)
    found = {
        head: inside
        for head, inside in _natural_loops(blocks, dominators).items()
        if any(matter(item) for i in inside for item in blocks[i].instructions)
    }
    for head, inside in sorted(found.items()):
        if any(other != head and other in inside for other in found):
            continue
        ends = [i for i in inside if head in blocks[i].following]
        every, one = [], []
        for i in sorted(inside):
            optional = any(i not in dominators[end] for end in ends)
            elected = any(item.name.startswith("UTC") for item in blocks[i].instructions)
            (one if optional and elected else every).extend(blocks[i].instructions)
        yield Loop(tuple(every), tuple(one))


def is_matrix(item: Instruction) -> bool:
    return item.name in ("HMMA", "HGMMA", "UTCHMMA")


def hot_loop(text: str, warps: int) -> Loop | None:
    """The loop that a kernel spends its time in; None where there is no loop.

    The first of the loops with at least three quarters of the most products; of those that load and
    multiply as much, the one with the fewest instructions: full tiles rather than masked edges.
    Without matrix instructions, the loop that loads most.
    """
    blocks = parse(text)
    candidates = [(count(loop, warps), loop) for loop in loops(blocks, is_matrix)]
    if candidates:
        most = max(size.flops for size, _ in candidates)
        first = next(size for size, _ in candidates if 4 * size.flops >= 3 * most)
        work = (first.flops, first.global_bytes)
        same = [(s.issued, loop) for s, loop in candidates if (s.flops, s.global_bytes) == work]
        return min(same, key=lambda pair: pair[0])[1]
    candidates = list(loops(blocks))
    return max(candidates, key=lambda c: count(c, warps)[3:], default=None)


def unit_of(item: Instruction) -> str:
    """Which unit an instruction occupies: one of matrix, exp, fma, half, imad, int, shared, other.

    exp is the unit of exponentials and of conversions that have none of their own; int also does
    comparisons, minima, selections, permutations of bytes, and packs fp32 into 16 bits (Nsight
    Compute's ALU); imad is the half of the FMA units that multiplies integers.
    """
    name = item.name
    if is_matrix(item):
        return "matrix"
    if name in ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV", "FRND", "I2I"):
        return "exp"
    if name in ("FADD", "FMUL", "FFMA", "FFMA32I", "FADD32I", "FMUL32I", *PAIRS):
        return "fma"
    if name in HALVES:
        return "half"
    if name == "IMAD":
        return "imad"
    if name in ("LDS", "STS", "LDSM", "STSM", "ATOMS", "SHFL", "MOVM"):
        return "shared"
    return "other" if OTHER.match(name) else "int"


def _bytes(item: Instruction) -> int:
    """Bytes that a warp's memory instruction moves."""
    if item.name in ("LDSM", "STSM"):
        matrices = re.search(r"\.([124])$|\.([124])\.", item.opcode)
        return 128 * int(next(filter(None, matrices.groups()))) if matrices else 128
    width = WIDTH.search(item.opcode)
    bits = int(re.sub(r"\D", "", width.group(1))) if width else 32
    return 32 * bits // 8


def _matrix(item: Instruction, instruction_descriptors: dict[str, int]) -> tuple[int, int]:
    """Operations of one matrix instruction, and the bytes of shared memory that it reads."""
    if item.name == "HMMA":
        m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8)}[item.opcode.split(".")[1]]
        return 2 * m * n * k, 0
    # a descriptor in place of the first operand means that both lie in shared memory
    left = item.operands.split(", ")[item.name == "HGMMA"].startswith("gdesc")
    if item.name == "HGMMA":
        m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", item.opcode).groups())
    else:  # PTX ISA, "Instruction descriptor" of tcgen05: N / 8 from bit 17, M / 16 from bit 24
        value = instruction_descriptors[re.search(r"idesc\[(\w+)\]", item.operands).group(1)]
        m, n, k = (value >> 24 & 31) * 16, (value >> 17 & 63) * 8, 16
    return 2 * m * n * k, 2 * k * (n + m * left)


def _asked(items: Iterable[Instruction], times: int) -> Iterator[tuple[str, int]]:
    """(what, how much) of instructions that `times` warps run."""
    descriptors: dict[str, int] = {}
    for item in items:
        if item.name == "UMOV" and (found := re.match(r"(UR\d+), (0x[0-9a-f]+)$", item.operands)):
            descriptors[found.group(1)] = int(found.group(2), 16)
        often = 1 if item.name.startswith("UTC") else times
        yield "issued", often
        if item.guard == "!PT":
            continue
        unit = unit_of(item)
        yield unit, often * (2 if item.name in PAIRS else 1)
        if unit == "matrix":
            # wgmma is one instruction of the four warps of a group
            products = often // 4 if item.name == "HGMMA" else often
            flops, operands = _matrix(item, descriptors)
            yield "flops", flops * products
            yield "shared bytes", operands * products
        elif unit == "shared":
            yield "shared bytes", max(_bytes(item), BANKS_BYTES) * often
        elif item.name in ("LDG", "LDGSTS"):
            yield "global bytes", _bytes(item) * often


def count(loop: Loop, warps: int) -> Counts:
    """What a round of the loop asks of the units, for a block of `warps` warps."""
    totals = Counter()
    for items, times in ((loop.every_warp, warps), (loop.one_warp, 1)):
        for what, much in _asked(items, times):
            totals[what] += much
    parts = [totals.pop(name, 0) for name in ("flops", "issued", "shared bytes", "global bytes")]
    return Counts(parts[0], totals, *parts[1:])
