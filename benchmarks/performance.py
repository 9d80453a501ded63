"""docs/performance.md, its plots and README's figures, from the result files: make docs

With --check nothing is written: exit status 1 where a committed page differs from its results.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import figures

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Performance

Made by `make docs` from the files in [benchmarks/results](../benchmarks/results), not by hand.

Contenders of a case run interleaved, a call each in turn, and only if their outputs are right on
that very input. Times are medians, with the quartiles as short lines in the plots; a figure comes
from one file. The strongest peer is the fastest that does the op's whole work and is not ours; a
*bound* does less and is never counted as a peer. GFLOP/s count the least work the op needs, so
skipped masks earn nothing. `% of roof` is against what the machine's own copy and matrix product
reached in the same run. Cases named `x100` or `4 steps` time so many calls at once.
"""
KINDS = {
    "a GPU": lambda runs: any(r["device"] != "cpu" for _, r in runs),
    "memory against the number of tokens": lambda runs: any(r.get("memory") for _, r in runs),
    "tokens per second of a whole model": lambda runs: any(r.get("model") for _, r in runs),
}
PICTURE = re.compile(r"(<!-- picture -->\n).*?(<!-- end of picture -->)", re.DOTALL)
TABLE = re.compile(r"<!-- results: (\S+) -->\n(.*?)<!-- end of results -->", re.DOTALL)
ROW = re.compile(r"^\| `(.+?)` \| (\w+) \| [\d,.]+ \| (\w+) \| [\d,.]+ \| [\d.]+ \|$")


def load(folder: Path) -> list[tuple[str, dict]]:
    """(file name, run) of the full runs, oldest first; other files of that folder are passed by."""
    runs = [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    for group in (g for _, run in runs for g in run.get("groups", {}).values()):
        timed = {n: row for n, row in group["contenders"].items() if "median_ms" in row}
        group["contenders"] = timed  # on a card those that failed or are not installed stand beside
    return sorted(
        ((name, run) for name, run in runs if not run.get("short", True)),
        key=lambda item: (item[1]["date"], item[0]),
    )


def machine_stem(machine: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def drawn(runs: list[tuple[str, dict]]) -> dict[str, str]:
    """{figure: SVG} of one machine; a newer file's figure takes the place of an older one's."""
    found = {}
    for name, run in runs:
        found |= dict(figures.figures(name, run))
    order = [name for _, run in runs for name, _ in figures.figures("", run)]
    return {name: found[name] for name in dict.fromkeys(order)}


def newest_groups(runs: list[tuple[str, dict]]) -> dict[str, tuple[str, dict]]:
    """{group: (file, group)}, each from the newest file that has it."""
    return {n: (name, g) for name, run in runs for n, g in run["groups"].items()}


def table(runs: list[tuple[str, dict]]) -> list[str]:
    """Every case, also those that are lost."""
    lines = ["| case | ours | ms | % of roof | strongest peer | its ms | ratio | bounds, ms |"]
    lines.append("|---|---|--:|--:|---|--:|--:|---|")
    for name, (_, group) in newest_groups(runs).items():
        ours, peer = figures.fastest(group), group["strongest_peer"]
        if not ours or not peer:
            continue
        row, other = ours[1], group["contenders"][peer]
        bounds = [
            f"{figures.label(n)} {figures.milliseconds(r['median_ms'])}"
            for n, r in group["contenders"].items()
            if r["kind"] == "bound"
        ]
        cells = (
            f"`{name}`", ours[0], figures.milliseconds(row["median_ms"]),
            f"{row['percent_of_roof']:.0f}", figures.label(peer),
            figures.milliseconds(other["median_ms"]),
            f"{other['median_ms'] / row['median_ms']:.2f}", ", ".join(bounds),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def legend(runs: list[tuple[str, dict]]) -> list[str]:
    present = {c for _, run in runs for g in run["groups"].values() for c in g["contenders"]}
    names = [(*figures.OTHERS[n], n) for n in figures.OTHERS if n in present]
    return [f"- **{short}** (`{n}`): {words}." for short, words, n in names]


def section(machine: str, runs: list[tuple[str, dict]]) -> tuple[list[str], dict[str, str]]:
    """One machine's part of the page, and its plots by file name."""
    stem = machine_stem(machine)
    lines, plots = [f"## {machine}", ""], {}
    for name, run in runs:
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
        roofs = run.get("roofs")
        rates = [f"copy {roofs['copy_gbs']:.0f} GB/s"] if roofs else []
        rates += [
            f"{k} GEMM {v:.0f} GFLOP/s" for k, v in (roofs or {}).get("gemm_gflops", {}).items()
        ]
        measured = f"; roofs: {', '.join(rates)}" if rates else ""
        lines.append(
            f"- [{name}](../benchmarks/results/{name}), {run['date']}; {versions}{measured}."
        )
    for figure, svg in drawn(runs).items():
        title = re.search(r"<title>(.*?)</title>", svg)[1]
        plots[f"{stem}-{figure}.svg"] = svg
        lines += ["", f"![{title}](plots/{stem}-{figure}.svg)"]
    if newest_groups(runs):
        lines += ["", "### Every case", "", *table(runs), "", "### Who is who", "", *legend(runs)]
    return [*lines, ""], plots


def by_machine(runs: list[tuple[str, dict]]) -> dict[str, list[tuple[str, dict]]]:
    """Machines with a GPU first."""
    found: dict[str, list] = {}
    for item in sorted(runs, key=lambda item: item[1]["device"] == "cpu"):
        found.setdefault(item[1]["machine"], []).append(item)
    return found


def missing(runs: list[tuple[str, dict]]) -> list[str]:
    lacking = [
        f"- No result file of {what} is committed." for what, has in KINDS.items() if not has(runs)
    ]
    return ["## Not measured", "", *lacking, ""] if lacking else []


def readme_table(text: str, runs: list[tuple[str, dict]]) -> str:
    """README's chosen rows with the figures of the newest file that has all of them."""
    found = TABLE.search(text)
    lines = found[2].splitlines()
    rows = {i: m for i, line in enumerate(lines) if (m := ROW.match(line))}

    def complete(run: dict) -> bool:
        groups = run["groups"]
        return all(
            {m[2], m[3]} <= groups.get(m[1], {}).get("contenders", {}).keys() for m in rows.values()
        )

    name, run = next(item for item in reversed(runs) if complete(item[1]))
    for i, m in rows.items():
        ours, peer = (run["groups"][m[1]]["contenders"][n]["median_ms"] for n in (m[2], m[3]))
        digits = 1 if ours >= 1 else 3
        times = f"| {m[2]} | {ours:,.{digits}f} | {m[3]} | {peer:,.{digits}f} |"
        lines[i] = f"| `{m[1]}` {times} {peer / ours:.2f} |"
    body = "\n".join(lines)
    made = f"<!-- results: benchmarks/results/{name} -->\n{body}\n<!-- end of results -->"
    return text[: found.start()] + made + text[found.end() :]


def readme_picture(text: str, machines: dict) -> str:
    """The first machine's main picture and where it comes from."""
    pictured = [
        (machine, n)
        for machine, runs in machines.items()
        for n, run in reversed(runs)
        if "speedup" in dict(figures.figures(n, run))
    ]
    if not pictured:
        return text
    machine, name = pictured[0]
    plot = f"docs/plots/{machine_stem(machine)}-speedup.svg"
    made = (
        f"![Times as fast as the strongest exact peer, by case]({plot})\n\n"
        f"{machine}, from [{name}](benchmarks/results/{name});\n"
        "[every case and more plots](docs/performance.md).\n"
    )
    return PICTURE.sub(lambda found: found[1] + made + found[2], text)


def generate(root: Path) -> dict[str, str]:
    """{path below the root: text} of everything this script makes."""
    runs = load(root / "benchmarks" / "results")
    machines = by_machine(runs)
    lines, files = HEAD.splitlines(), {}
    lines.append("")
    lines += missing(runs)
    for machine, own in machines.items():
        part, plots = section(machine, own)
        lines += part
        files |= {f"docs/plots/{name}": text for name, text in plots.items()}
    files["docs/performance.md"] = "\n".join(lines).rstrip() + "\n"
    readme = readme_table((root / "README.md").read_text(), runs)
    files["README.md"] = readme_picture(readme, machines)
    return files


def stale(root: Path, files: dict[str, str]) -> list[str]:
    """Paths that differ from what they should be, plots that nothing makes any more among them."""
    wrong = [
        p for p, text in files.items() if not (root / p).exists() or (root / p).read_text() != text
    ]
    left = {p.relative_to(root).as_posix() for p in (root / "docs" / "plots").glob("*.svg")}
    return sorted([*wrong, *(left - files.keys())])


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    check = parser.parse_args(arguments).check
    files = generate(root)
    for path in stale(root, files):
        print(f"{'stale' if check else 'wrote' if path in files else 'removed'} {path}")
        if check:
            continue
        if path in files:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(files[path])
        else:
            (root / path).unlink()
    return int(check and bool(stale(root, files)))


if __name__ == "__main__":
    sys.exit(main())
