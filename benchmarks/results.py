"""What a run measured: medians and ratios, its machine and versions; as JSON, Markdown, a table."""

import datetime
import json
import platform
import re
import statistics
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from medgpt_kernels import roofline
from medgpt_kernels.roofline import Cost, Roofs

BASELINE = "reference"


@dataclass
class Outcome:
    """What became of one contender: durations, or why there are none."""

    kind: str  # "baseline", "ours", "peer" or "bound"
    times: list[float] = field(default_factory=list)  # seconds
    refused: str = ""  # wrong, or crashed
    skipped: str = ""  # not available here

    @property
    def median(self) -> float:
        return statistics.median(self.times)


@dataclass
class Measured:
    """A group's outcomes with what they are judged by; the group's tensors are gone."""

    name: str
    cost: Cost
    dtype: torch.dtype
    roofs: Roofs
    outcomes: dict[str, Outcome]

    def strongest_peer(self) -> str | None:
        """The fastest contender that does the op's whole work and is not ours."""
        rivals = {n: o for n, o in self.outcomes.items() if o.kind in ("baseline", "peer")}
        timed = {n: o.median for n, o in rivals.items() if o.times}
        return min(timed, key=timed.get) if timed else None

    def figures(self, name: str) -> dict:
        """The numbers of one timed contender; ratios above 1 mean faster than the other."""
        outcome = self.outcomes[name]
        seconds = outcome.median
        low, _, high = (
            statistics.quantiles(outcome.times, n=4, method="inclusive")
            if len(outcome.times) > 1
            else [seconds] * 3
        )
        row = {
            "kind": outcome.kind,
            "rounds": len(outcome.times),
            "median_ms": seconds * 1e3,
            "q1_ms": low * 1e3,
            "q3_ms": high * 1e3,
            "gflops": self.cost.flops / seconds / 1e9,
            "gbs": self.cost.bytes / seconds / 1e9,
            "percent_of_roof": roofline.percent_of_roof(self.cost, seconds, self.roofs, self.dtype),
        }
        for key, other in (("vs_baseline", BASELINE), ("vs_peer", self.strongest_peer())):
            there = other in self.outcomes and self.outcomes[other].times
            row[key] = self.outcomes[other].median / seconds if there else None
        return row


def cpu_name() -> str:
    """The processor's model, its best instruction set known to torch, and its usable threads."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {isa}, {torch.get_num_threads()} threads"


def machine_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def header(device: str, *, short: bool) -> dict:
    """Where, when and with what versions."""
    packages = ("torch", "transformers", "triton", "numpy", "medgpt-kernels")
    return {
        "machine": machine_name(device),
        "device": device.split(":")[0],
        "date": datetime.date.today().isoformat(),
        "short": short,
        "versions": {p: _version(p) for p in packages} | {"python": platform.python_version()},
    }


def stem(machine: str, date: str) -> str:
    """What a result file is called."""
    return f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}-{date}"


def record(measured: list[Measured], device: str, *, short: bool) -> dict:
    """Everything a later reader needs to judge or compare the run."""
    roofs = measured[0].roofs
    groups = {}
    for group in measured:
        timed = {n: group.figures(n) for n, o in group.outcomes.items() if o.times}
        refused = {n: o.refused for n, o in group.outcomes.items() if o.refused}
        groups[group.name] = {
            "baseline": BASELINE,
            "strongest_peer": group.strongest_peer(),
            "bytes": group.cost.bytes,
            "flops": group.cost.flops,
            "contenders": timed,
            "refused": refused,
        }
    return {
        **header(device, short=short),
        "roofs": {
            "copy_gbs": roofs.copy_gbs,
            "gemm_gflops": {str(k).split(".")[-1]: v for k, v in roofs.gemm_gflops.items()},
        },
        "groups": groups,
    }


COLUMNS = (
    ("contender", "{}"), ("median_ms", "{:.1f}"), ("q1_ms", "{:.1f}"), ("q3_ms", "{:.1f}"),
    ("rounds", "{}"), ("gflops", "{:.1f}"), ("gbs", "{:.2f}"), ("percent_of_roof", "{:.0f}"),
    ("vs_baseline", "{:.2f}"), ("vs_peer", "{:.2f}"),
)  # fmt: skip
HEADINGS = (
    "contender", "median ms", "q1", "q3", "n", "GFLOP/s", "GB/s", "% of roof", "x baseline",
    "x best peer",
)  # fmt: skip


def _cells(name: str, row: dict) -> list[str]:
    row = {**row, "contender": f"{name} *" if row["kind"] == "ours" else name}
    return ["-" if row[key] is None else form.format(row[key]) for key, form in COLUMNS]


def _rows(group: dict) -> list[list[str]]:
    ordered = sorted(group["contenders"].items(), key=lambda item: item[1]["median_ms"])
    rows = [_cells(name, row) for name, row in ordered]
    return rows + [[name, "refused", *[""] * 8] for name in group["refused"]]


def _heading(name: str, group: dict) -> str:
    return f"{name} (baseline {group['baseline']}, best peer {group['strongest_peer']})"


def _roofs_line(run: dict) -> str:
    rates = ", ".join(f"{k} GEMM {v:.0f} GFLOP/s" for k, v in run["roofs"]["gemm_gflops"].items())
    return f"measured roofs: copy {run['roofs']['copy_gbs']:.1f} GB/s, {rates}"


def table(run: dict) -> str:
    """For the terminal; our backends are marked with a star."""
    lines = [f"{run['machine']}; {_roofs_line(run)}"]
    for name, group in run["groups"].items():
        rows = [list(HEADINGS), *_rows(group)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
        lines += ["", _heading(name, group)]
        for row in rows:
            first, *rest = (
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join(["  " + first, *rest]))
    return "\n".join(lines)


def markdown(run: dict) -> str:
    """The same for reading on a page."""
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
    kind = "short run" if run["short"] else "full run"
    lines = [f"# {run['machine']}", "", f"{run['date']}, {kind}; {versions}; {_roofs_line(run)}."]
    lines += ["", "Medians of interleaved rounds; `*` marks this package's backends; `x` ratios"]
    lines += ["above 1 mean faster. GFLOP/s and GB/s count the op's least work and traffic."]
    for name, group in run["groups"].items():
        lines += ["", f"## {_heading(name, group)}", ""]
        for i, row in enumerate([list(HEADINGS), *_rows(group)]):
            lines.append("| " + " | ".join(row) + " |")
            if i == 0:
                lines.append("|---" + "|--:" * (len(row) - 1) + "|")
    return "\n".join(lines) + "\n"


def save(run: dict, folder: Path) -> list[Path]:
    """Write <machine>-<date>.json and .md; a short run says so in its name.

    Groups of an earlier run of that day, machine and versions stay where this run has none.
    """
    folder.mkdir(exist_ok=True)
    name = stem(run["machine"], run["date"]) + ("-short" if run["short"] else "")
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    if paths[0].exists():
        earlier = json.loads(paths[0].read_text())
        if earlier["versions"] == run["versions"]:
            run = {**run, "groups": earlier["groups"] | run["groups"]}
    paths[0].write_text(json.dumps(run, indent=1) + "\n")
    paths[1].write_text(markdown(run))
    return paths
