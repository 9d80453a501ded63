"""Every CUDA kernel compiled by nvcc for every card: no spills, and the committed budget.

pytest                                          sm_80 and sm_90
pytest -m aot tests/test_cuda_build.py          the other cards and PTX
python tests/test_cuda_build.py --update        writes tests/cuda_budget.json anew

The budget holds registers and bytes of static shared memory of each kernel on each card. Another
release of nvcc allocates otherwise: then only spills and the cards' limits are checked.
"""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("cuda_budget.json")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FAST_CARDS = ("sm_80", "sm_90")
OTHER_CARDS = ("sm_86", "sm_89", "sm_100", "sm_120")
CARDS = (*FAST_CARDS, *OTHER_CARDS)
STATIC_SHARED = 48 << 10  # bytes a block, on every card

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def nvcc(*arguments: str) -> str:
    command = ["nvcc", "-O3", "-std=c++17", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"
    return done.stdout + done.stderr


def release() -> str:
    return re.search(r"release ([\d.]+)", nvcc("--version")).group(1)


def parse(log: str) -> dict[str, dict[str, int]]:
    """Registers, shared, stack and spilled bytes of each kernel in ptxas's words."""
    found, kernel = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = found.setdefault(match.group(1), {})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            kernel["stack"], kernel["spills"] = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(match.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            kernel["shared"] = int(shared.group(1)) if shared else 0
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True)
    return {short(n): k for n, k in zip(names.stdout.splitlines(), found.values(), strict=True)}


def short(name: str) -> str:
    """void (anonymous namespace)::kernel<float, 4>(...) -> kernel<float, 4>"""
    return re.search(r"(\w+(?:<.*?>)?)\((?!anonymous)", name).group(1)


def compile_for(card: str, source: Path) -> dict[str, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        architecture = f"arch=compute_{card[3:]},code={card}"
        log = nvcc(
            "-Xptxas=-v", f"-gencode={architecture}", "-c", str(source), "-o", f"{folder}/out.o"
        )
    return parse(log)


@functools.cache
def compilations():
    """What has been started: cards side by side, since one takes a core most of a minute."""
    return ThreadPoolExecutor(2), {}


def kernels_on(card: str) -> dict[str, dict[str, int]]:
    pool, started = compilations()
    for source in SOURCES:
        if (card, source) not in started:
            started[card, source] = pool.submit(compile_for, card, source)
    merged = {}
    for source in SOURCES:
        merged |= started[card, source].result()
    return merged


@pytest.fixture(scope="module")
def compiled(request):
    """Starts all selected cards at once."""
    pool, started = compilations()
    for item in request.session.items:
        card = getattr(item, "callspec", None) and item.callspec.params.get("card")
        if card and item.path == request.path:
            for source in SOURCES:
                if (card, source) not in started:
                    started[card, source] = pool.submit(compile_for, card, source)
    return kernels_on


def check(found: dict, budget: dict, card: str, same_release: bool) -> list[str]:
    """What is wrong with the kernels of a card, one line each."""
    problems = []
    for name, kernel in found.items():
        if kernel["spills"] or kernel["stack"]:
            problems.append(f"{name} spills {kernel['spills']} bytes, stack {kernel['stack']}")
        if kernel["shared"] > STATIC_SHARED:
            problems.append(f"{name} has {kernel['shared']} bytes of shared memory")
    if same_release:
        expected = {name: cards[card] for name, cards in budget["kernels"].items()}
        actual = {name: [k["registers"], k["shared"]] for name, k in found.items()}
        problems += [
            f"{name}: [registers, shared] {actual.get(name)}, budget {expected.get(name)}"
            for name in sorted({*expected, *actual})
            if expected.get(name) != actual.get(name)
        ]
    return problems


@needs_nvcc
@pytest.mark.parametrize(
    "card", [*FAST_CARDS, *(pytest.param(c, marks=pytest.mark.aot) for c in OTHER_CARDS)]
)
def test_budget(card, compiled):
    budget = json.loads(BUDGET.read_text())
    problems = check(compiled(card), budget, card, release() == budget["nvcc"])
    assert not problems, "\n".join([*problems, "python tests/test_cuda_build.py --update"])


@needs_nvcc
@pytest.mark.aot
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_ptx(source, tmp_path):
    nvcc("-ptx", "-arch=compute_120", str(source), "-o", str(tmp_path / "out.ptx"))


SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; i++) v[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 64; i++)
#pragma unroll
    for (int j = 0; j < 64; j++) v[i] = fmaf(v[j], v[i], v[63 - i]);
#pragma unroll
  for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = v[i];
}
"""


@needs_nvcc
def test_a_spill_and_a_changed_budget_are_noticed(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    found = compile_for("sm_80", source)
    kernel = found["spilling"]
    assert kernel["spills"] > 0
    budget = {"kernels": {"spilling": {"sm_80": [kernel["registers"], 0]}}}
    assert [p[:15] for p in check(found, budget, "sm_80", True)] == ["spilling spills"]
    sound = {"spilling": kernel | {"spills": 0, "stack": 0}}
    assert check(sound, budget, "sm_80", True) == []
    budget["kernels"]["spilling"]["sm_80"][0] -= 1
    assert len(check(sound, budget, "sm_80", True)) == 1
    assert check(sound, budget, "sm_80", False) == []


def test_budget_names_every_card():
    budget = json.loads(BUDGET.read_text())
    assert all(set(cards) == set(CARDS) for cards in budget["kernels"].values())


def update() -> None:
    pool, _ = compilations()
    found = dict(zip(CARDS, pool.map(_all_sources, CARDS), strict=True))
    kernels = {
        name: {card: [k["registers"], k["shared"]] for card in CARDS for k in (found[card][name],)}
        for name in sorted(found[CARDS[0]])
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(cards)}" for name, cards in kernels.items()]
    body = ",\n".join(lines)
    BUDGET.write_text(f'{{"nvcc": "{release()}", "kernels": {{\n{body}\n}}}}\n')
    for card in CARDS:
        for problem in check(found[card], {}, card, False):
            print(f"{card}: {problem}", file=sys.stderr)


def _all_sources(card: str) -> dict:
    merged = {}
    for source in SOURCES:
        merged |= compile_for(card, source)
    return merged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", required=True, help="write the budget")
    parser.parse_args()
    update()
