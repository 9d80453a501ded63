"""docs/support.md and README's support table from docs/support.json: make docs

What is "tested" follows from the runs in that file, and bounds, cards and instruction sets from
pyproject.toml, aot.CARDS and the CMake files, so the table says what the code says.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = range(10, 15)
BLOCK = re.compile(r"(<!-- support -->\n).*?(<!-- end of support -->)", re.DOTALL)
NAMES = {
    "sm_80": "A100", "sm_86": "RTX 30, A10", "sm_89": "RTX 40, L4, L40S", "sm_90": "H100, H200",
    "sm_100": "B200", "sm_120": "RTX 50, RTX PRO 6000", "gfx942": "AMD MI300",
}  # fmt: skip
ISAS = {
    "baseline": "any x86-64, and plain C++ on ARM", "v3": "AVX2 and FMA", "v4": "AVX-512",
    "v4_bf16": "AVX-512 with bf16 dot products",
}  # fmt: skip


def bounds(root: Path) -> dict[str, str]:
    """The least version of each package by pyproject.toml."""
    text = (root / "pyproject.toml").read_text()
    found = {n: re.search(rf'"{n}>=([\d.]+)', text)[1] for n in ("torch", "triton", "transformers")}
    return found | {"python": re.search(r'requires-python = ">=([\d.]+)"', text)[1]}


def cards(root: Path) -> dict[str, set[str]]:
    """{card: which compilers make kernels for it}."""
    gate = (root / "medgpt_kernels" / "aot.py").read_text()
    triton = re.findall(r'^    "((?:sm_|gfx)\w+)": ', gate, re.M)
    cmake = (root / "cmake" / "cuda.cmake").read_text()
    cuda = re.search(r"set\(release_archs ([\d ]+)\)", cmake)[1].split()
    return {
        c: {"Triton"} | ({"CUDA C++"} if c.removeprefix("sm_") in cuda else set()) for c in triton
    }


def isas(root: Path) -> list[str]:
    text = (root / "CMakeLists.txt").read_text()
    return ["baseline", *re.findall(r"^  add_isa\((\w+) ", text, re.M)]


def short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def newest_first(versions) -> list[str]:
    return sorted(versions, key=lambda v: [int(n) for n in v.split(".")], reverse=True)


def package_rows(data: dict, least: dict) -> list[tuple[str, str, str, str]]:
    """(what, tested, allowed but not run, unsupported) of Python and the packages."""
    rows = []
    for name in ("python", "torch", "triton", "transformers"):
        seen = {short(r[name]) for r in data["runs"] if r.get(name)}
        untested = f"others from {least[name]} on"
        if name == "python":
            known = {f"3.{minor}" for minor in PYTHONS}
            untested = ", ".join(newest_first(known - seen)) or "-"
        label = {"python": "Python", "torch": "PyTorch", "triton": "Triton"}.get(name, name)
        rows.append((label, ", ".join(newest_first(seen)), untested, f"below {least[name]}"))
    return rows


def state(names: list[str], data: dict, kind: str) -> str:
    """Of cards or instruction sets: those with evidence, and those without."""
    evidence = data[kind]
    return ", ".join(f"{n} ({evidence[n]})" if evidence.get(n) else n for n in names)


def tables(root: Path) -> dict[str, str]:
    data = json.loads((root / "docs" / "support.json").read_text())
    made, found = cards(root), isas(root)
    tested = {
        k: [n for n in names if data[k].get(n)] for k, names in (("cards", made), ("isas", found))
    }
    lines = ["| | tested | not run | unsupported |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in package_rows(data, bounds(root))]
    untested = [n for n in made if n not in tested["cards"]]
    compiled = ", ".join(untested) + " (compiled only)"
    lines.append(
        f"| GPU | {', '.join(tested['cards']) or 'none yet'} | {compiled} | older than sm_80 |"
    )
    rest = ", ".join(n for n in found if n not in tested["isas"])
    lines.append(f"| CPU | x86-64: {', '.join(tested['isas'])} | {rest or 'ARM'} | - |")
    lines.append(f"| System | {data['systems']['tested']} | {data['systems']['untested']} | - |")
    summary = "\n".join(lines) + "\n"
    return {"docs/support.md": page(data, made, found, summary), "summary": summary}


def page(data: dict, made: dict, found: list[str], summary: str) -> str:
    lines = ["# Support", "", "Made by `make docs` from [support.json](support.json), not by hand."]
    lines += ["*Tested* means that CI (`.ci/run`) or a run below executed it; *compiled only*"]
    lines += ["that the kernels pass the ahead-of-time gate for it, unexecuted.", "", summary]
    lines += ["## Cards", "", "| card | for example | kernels | state |", "|---|---|---|---|"]
    for name, compilers in made.items():
        evidence = data["cards"].get(name)
        what = f"tested: {evidence}" if evidence else "compiled only"
        lines.append(f"| {name} | {NAMES[name]} | {', '.join(sorted(compilers))} | {what} |")
    lines += [
        "",
        "Newer cards of a family run the CUDA C++ kernels through PTX. Float8 caches and MXFP4",
    ]
    lines += [
        "need no hardware of their own. A card without kernels takes Triton's at first call.",
        "",
    ]
    lines += ["## CPU instruction sets", "", "| name | needs | state |", "|---|---|---|"]
    for name in found:
        evidence = data["isas"].get(name)
        lines.append(
            f"| {name} | {ISAS[name]} | {f'tested: {evidence}' if evidence else 'compiled only'} |"
        )
    lines += ["", "The best that the machine has is taken; `MEDGPT_KERNELS_CPU_ISA` picks another."]
    lines += [
        "",
        "## Runs",
        "",
        "| date | Python | torch | triton | transformers | best ISA | what ran |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for r in data["runs"]:
        cells = [
            r["date"],
            r["python"],
            *(r.get(k) or "-" for k in ("torch", "triton", "transformers", "isa")),
        ]
        lines.append("| " + " | ".join([*cells, r["what"]]) + " |")
    lines += [
        "",
        "`make test-support` builds and self-tests under every Python it finds and adds rows.",
    ]
    return "\n".join([*lines, "", "## Notes", "", *(f"- {note}" for note in data["notes"])]) + "\n"


def generate(root: Path) -> dict[str, str]:
    """{path: text} of the page and of README with its table renewed."""
    made = tables(root)
    readme = (root / "README.md").read_text()
    text = BLOCK.sub(lambda found: found[1] + made["summary"] + found[2], readme)
    return {"docs/support.md": made["docs/support.md"], "README.md": text}


def stale(root: Path) -> list[str]:
    files = generate(root)
    return [p for p, t in files.items() if not (root / p).exists() or (root / p).read_text() != t]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    check = parser.parse_args().check
    wrong = stale(ROOT)
    for path in wrong:
        print(f"{'stale' if check else 'wrote'} {path}")
        if not check:
            (ROOT / path).write_text(generate(ROOT)[path])
    return int(check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
