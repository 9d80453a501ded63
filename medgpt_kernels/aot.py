"""The ahead-of-time gate: every Triton kernel compiled for every card, with no GPU at hand.

An op joins by a function `aot_kernels()` in its triton module, which yields what `record` gives:
the op's own launchers run on meta tensors, and each launch they would make is kept with its
arguments and configuration. Worker processes compile.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from medgpt_kernels import static_model


class Card(NamedTuple):
    """What one GPU architecture offers, per streaming multiprocessor or compute unit."""

    backend: str
    arch: int | str
    warp_size: int
    block_shared: int  # bytes one block may take
    shared: int  # bytes
    warps: int
    blocks: int
    registers: int  # 32-bit, of one warp's or wave's lane times lanes
    matrix: str  # instruction of 16-bit products


def _nvidia(arch: int, block_kb: int, shared_kb: int, warps: int, blocks: int, matrix: str) -> Card:
    return Card("cuda", arch, 32, block_kb * 1024, shared_kb * 1024, warps, blocks, 65536, matrix)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; CDNA 3 ISA guide
CARDS = {
    "sm_80": _nvidia(80, 163, 164, 64, 32, "mma.sync"),
    "sm_86": _nvidia(86, 99, 100, 48, 16, "mma.sync"),
    "sm_89": _nvidia(89, 99, 100, 48, 24, "mma.sync"),
    "sm_90": _nvidia(90, 227, 228, 64, 32, "wgmma"),
    "sm_100": _nvidia(100, 227, 228, 64, 32, "tcgen05"),
    "sm_120": _nvidia(120, 99, 100, 48, 24, "mma.sync"),
    "gfx942": Card("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 32, 32, 4 * 512 * 64, "v_mfma"),
}
INSTRUCTIONS = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma.sync"}

# What a kernel may declare about its products: none, 16-bit operands (in tiles of fewer than 64
# rows: wgmma and tcgen05 have no such), fp32 ones by ieee or tf32x3.
FEW_ROWS = "half, few rows"
PRODUCTS = ("none", "half", FEW_ROWS, "ieee", "tf32x3")


class AotKernel(NamedTuple):
    """One kernel in one configuration, as a launcher would launch it."""

    name: str  # "_patch_embed_fwd_kernel[bf16-uint8-linear]"
    fn: Any  # triton.JITFunction
    arguments: dict[str, Any]  # by parameter name; tensors are meta tensors
    options: dict[str, Any]  # num_warps, num_stages
    products: str  # one of PRODUCTS
    quick: bool  # in the bounded part of the gate
    cards: tuple[str, ...] = tuple(CARDS)  # those whose launcher would choose this configuration


class Report(NamedTuple):
    """What one compilation made, and what is wrong with it."""

    kernel: str
    card: str
    warps: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a block
    occupancy: float  # of the warps that the card can hold
    instruction: str
    problems: tuple[str, ...]
    static: static_model.Static | None = None  # where asked for, on NVIDIA's cards


def record(
    variant: str,
    call: Callable[[], Any],
    products: dict[str, str],
    *,
    quick: bool = False,
    cards: tuple[str, ...] = tuple(CARDS),
) -> Iterator[AotKernel]:
    """The launches that `call` makes, none of which is run.

    Args:
        variant: what sets this call apart; goes into the kernels' names.
        call: runs launchers on meta tensors.
        products: by kernel name, what it declares to multiply; others declare "none".
        quick: whether these belong to the bounded part.
        cards: for which of CARDS the launchers chose their configurations.
    """
    import triton

    launches = []

    def keep(self, *args, grid, warmup, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append((self, arguments))

    original = triton.JITFunction.run
    triton.JITFunction.run = keep
    try:
        call()
    finally:
        triton.JITFunction.run = original
    for fn, arguments in launches:
        name = fn.__name__
        options = {k: v for k, v in arguments.items() if k not in fn.arg_names}
        arguments = {k: arguments[k] for k in fn.arg_names}
        declared = products.get(name, "none")
        yield AotKernel(f"{name}[{variant}]", fn, arguments, options, declared, quick, cards)


def _specialise(param, value, card: Card) -> tuple[str, Any]:
    """An argument's type and its specialisation, by the rules of Triton's launcher."""
    import triton.language as tl
    from triton.runtime.jit import type_canonicalisation_dict

    if param.is_constexpr or value is None:
        return "constexpr", value
    if isinstance(value, torch.Tensor):
        attributes = []
        if value.storage_offset() * value.itemsize % 16 == 0:
            attributes.append(["tt.divisibility", 16])
        if card.backend == "hip" and value.untyped_storage().nbytes() < 2**31:
            attributes.append(["tt.pointer_range", 32])
        return "*" + type_canonicalisation_dict[str(value.dtype).split(".")[1]], attributes
    if isinstance(value, bool):
        return "u1", []
    if isinstance(value, int):
        if value == 1 and not param.do_not_specialize:
            return "constexpr", value
        divisible = value % 16 == 0 and not param.do_not_specialize
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, [["tt.divisibility", 16]] if divisible else []
    if isinstance(value, float):
        return "fp32", []
    assert not isinstance(value, tl.constexpr)
    raise TypeError(f"{param.name}: {type(value).__name__} in a recorded launch")


def _source(kernel: AotKernel, card: Card):
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.fn.params):
        value = kernel.arguments[param.name]
        signature[param.name], special = _specialise(param, value, card)
        if signature[param.name] == "constexpr":
            constants[(i,)] = value
        elif special:
            attributes[(i,)] = special
    return ASTSource(kernel.fn, signature, constants, attributes)


def identity(kernel: AotKernel) -> tuple:
    """Equal for launches that compile to the same code."""
    source = _source(kernel, CARDS["gfx942"])
    parts = (source.signature, source.constants, source.attrs, kernel.options)
    return kernel.fn.__name__, *(str(p) for p in parts)


def _products_problems(kernel: AotKernel, ttir: str) -> Iterator[str]:
    """Products written in the kernel against what it declares."""
    found = set()
    for line in re.findall(r"tt\.dot .*", ttir):
        operand = line.split(":")[-1]
        precision = re.search(r"inputPrecision = (\w+)", line)
        if "xf32>" in operand.split("*")[0]:
            found.add(precision.group(1) if precision else "ieee")
        else:
            found.add("half")
    if "tf32" in found:
        yield "a product of fp32 operands in plain tf32"
    declared = "half" if kernel.products == FEW_ROWS else kernel.products
    if found - {"tf32"} - {declared} or (kernel.products != "none" and not found):
        yield f"declares products {kernel.products}, has {', '.join(sorted(found)) or 'none'}"


def _instruction_problems(kernel: AotKernel, card: Card, instruction: str, text: str):
    """The matrix instruction, and tf32 where it was not asked for."""
    expected = {"none": "none", "half": card.matrix}.get(kernel.products)
    if kernel.products == FEW_ROWS:
        expected = "v_mfma" if card.backend == "hip" else "mma.sync"
    if kernel.products == "ieee":
        expected = "v_mfma" if card.backend == "hip" else "none"
    if kernel.products == "tf32x3":
        expected = instruction if instruction != "none" else "a tf32 instruction"
    if instruction != expected:
        yield f"expected matrix instruction {expected}, found {instruction}"
    tf32 = re.search(r"mma\S*tf32|xf32", text)
    if tf32 and kernel.products != "tf32x3":
        yield f"tf32 instruction {tf32.group(0)} in a kernel that declares {kernel.products}"


def _nvidia_resources(compiled) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, from Triton's own cuobjdump."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", text).group(1))
    return registers, sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text))


def _amd_resources(text: str) -> tuple[int, int]:
    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))

    return value("vgpr_count"), value("private_segment_fixed_size")


def _occupancy(card: Card, warps: int, registers: int, shared: int) -> float:
    """Warps that fit at once, as a part of what the card can hold."""
    granule = 8 * card.warp_size if card.backend == "hip" else 256
    a_warp = max(-(-registers * card.warp_size // granule) * granule, 1)
    blocks = min(card.registers // a_warp // warps, card.warps // warps, card.blocks)
    reserved = 1024 if card.backend == "cuda" else 0
    if shared + reserved:
        blocks = min(blocks, card.shared // (shared + reserved))
    return blocks * warps / card.warps


def compile_kernel(kernel: AotKernel, card_name: str, static: bool = False) -> Report:
    """Compile for one card and judge the result; static: with the bounds from its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    card = CARDS[card_name]
    target = GPUTarget(card.backend, card.arch, card.warp_size)
    compiled = triton.compile(_source(kernel, card), target=target, options=kernel.options)
    if card.backend == "cuda":
        text = compiled.asm["ptx"]
        registers, spilled = _nvidia_resources(compiled)
        found = [name for pattern, name in INSTRUCTIONS.items() if pattern in text]
        instruction = found[0] if found else "none"
    else:
        text = compiled.asm["amdgcn"]
        registers, spilled = _amd_resources(text)
        instruction = "v_mfma" if "v_mfma" in text else "none"
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    problems = [
        *_products_problems(kernel, compiled.asm["ttir"]),
        *_instruction_problems(kernel, card, instruction, text),
    ]
    if spilled:
        problems.append(f"spills {spilled} bytes a thread")
    if shared > card.block_shared:
        problems.append(f"{shared} bytes of shared memory, the card has {card.block_shared}")
    occupancy = _occupancy(card, warps, registers, shared)
    bounds = None
    if static and card.backend == "cuda":
        bounds = static_model.of_cubin(kernel.name, card_name, compiled.asm["cubin"], warps)
    return Report(
        kernel.name, card_name, warps, registers, spilled, shared, occupancy, instruction,
        tuple(problems), bounds,
    )  # fmt: skip


def _ops() -> list[str]:
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/triton.py"))


def kernels(modules: Iterable[str] | None = None) -> dict[str, AotKernel]:
    """Every listed kernel by name, launches that compile alike only once.

    Args:
        modules: which to ask for `aot_kernels`; default: the triton module of every op.
    """
    if modules is None:
        modules = [f"medgpt_kernels.{op}.triton" for op in _ops()]
    found, seen = {}, {}
    for module in modules:
        for kernel in importlib.import_module(module).aot_kernels():
            key = (*identity(kernel), kernel.products)
            if key in seen:
                same = found[seen[key]]
                cards = tuple(dict.fromkeys(same.cards + kernel.cards))
                found[same.name] = same._replace(cards=cards, quick=same.quick or kernel.quick)
                continue
            name, number = kernel.name, 2
            while name in found:
                name, number = f"{kernel.name[:-1]}-{number}]", number + 1
            seen[key] = name
            found[name] = kernel._replace(name=name)
    return found


_listed: dict[tuple | None, dict[str, AotKernel]] = {}


def _start_worker(path: list[str]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated
    sys.path[:] = path


def _list_job(modules: tuple[str, ...] | None) -> list[tuple[str, str, bool]]:
    if modules not in _listed:
        _listed[modules] = kernels(modules)
    return [(k.name, card, k.quick) for k in _listed[modules].values() for card in k.cards]


def _compile_job(modules: tuple[str, ...] | None, name: str, card: str, static: bool) -> Report:
    _list_job(modules)
    kernel = _listed[modules][name]
    try:
        return compile_kernel(kernel, card, static)
    except Exception as error:
        text = f"does not compile: {type(error).__name__}: {str(error).strip()[-400:]}"
        return Report(name, card, 0, 0, 0, 0, 0.0, "none", (text,))


class Gate:
    """Compiles kernels in worker processes of its own; one that dies costs only its own kernel."""

    def __init__(
        self, processes: int = 2, modules: tuple[str, ...] | None = None, static: bool = False
    ):
        self.modules, self.static = modules, static
        self._threads = ThreadPoolExecutor(processes)
        self._pools: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(processes):
            self._pools.put(self._new_pool())

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_start_worker, initargs=(list(sys.path),)
        )

    def _in_worker(self, job: Callable, *args):
        pool = self._pools.get()
        try:
            return pool.submit(job, self.modules, *args).result()
        except BrokenProcessPool:
            pool = self._new_pool()
            raise
        finally:
            self._pools.put(pool)

    def jobs(self) -> list[tuple[str, str, bool]]:
        """Every kernel's name and each of its cards, and whether it is in the bounded part."""
        return self._in_worker(_list_job)

    def names(self) -> list[tuple[str, bool]]:
        """Every kernel's name, and whether it is in the bounded part."""
        return list(dict.fromkeys((name, quick) for name, _, quick in self.jobs()))

    def submit(self, name: str, card: str) -> "Future[Report]":
        """Compile one kernel for one card; the Report comes when a worker is free."""
        return self._threads.submit(self._compile, name, card)

    def _compile(self, name: str, card: str) -> Report:
        try:
            return self._in_worker(_compile_job, name, card, self.static)
        except BrokenProcessPool:
            problem = ("the compiler's process died",)
            return Report(name, card, 0, 0, 0, 0, 0.0, "none", problem)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._pools.empty():
            self._pools.get().shutdown()


def table(reports: Iterable[Report]) -> str:
    """The reports as a Markdown table."""
    head = "| kernel | card | warps | registers | spilled | shared | occupancy | instruction |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for r in reports:
        rows.append(
            f"| {r.kernel} | {r.card} | {r.warps} | {r.registers} | {r.spilled} | {r.shared} | "
            f"{r.occupancy:.0%} | {r.instruction} |"
        )
        rows += [f"| | | | | | | | **{problem}** |" for problem in r.problems]
    return "\n".join(rows)


def _wanted(options, name: str, card: str, quick: bool) -> bool:
    """Whether the command line asks for this compilation."""
    kept = all(part in name for part in options.k) and card in options.card
    return kept and (quick or not options.quick)


def _print_static(reports: list[Report], options) -> None:
    """The bounds on kernels with a loop: matrix kernels, and those that only move data."""
    statics = [r.static for r in reports if r.static]
    if options.json:
        Path(options.json).write_text(json.dumps([s._asdict() for s in statics], indent=1) + "\n")
    print(static_model.markdown(statics) if options.markdown else static_model.table(statics))


def main(argv: list[str] | None = None) -> int:
    """Compile what is asked for and print the tables; 1 where a kernel has a problem."""
    parser = argparse.ArgumentParser(prog="medgpt_kernels --aot", description=__doc__)
    parser.add_argument("-k", nargs="+", default=[], help="only kernels with all these in the name")
    parser.add_argument("--op", choices=_ops(), help="only this op's kernels")
    parser.add_argument("--card", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--quick", action="store_true", help="only the bounded part")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="write the bounds from the machine code to this file")
    parser.add_argument("--markdown", action="store_true", help="only the bounds, for docs/")
    options = parser.parse_args(argv)
    modules = (f"medgpt_kernels.{options.op}.triton",) if options.op else None
    gate = Gate(options.processes, modules, static=True)
    try:
        waiting = [
            gate.submit(name, card)
            for name, card, quick in gate.jobs()
            if _wanted(options, name, card, quick)
        ]
        reports = [w.result() for w in waiting]
    finally:
        gate.close()
    wrong = sum(bool(r.problems) for r in reports)
    if not options.markdown:
        print(f"{table(reports)}\n\n{len(reports)} compilations, {wrong} with problems\n")
    _print_static(reports, options)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
