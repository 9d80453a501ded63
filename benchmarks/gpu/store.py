"""Where the report's results lie: one JSON a card, each part with the source it came from."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEASURED = (
    "medgpt_kernels",
    "csrc",
    "benchmarks",
    "tests",
    "examples",
    "medgpt/train",
    "setup.py",
    "CMakeLists.txt",
)
PACKAGES = (
    "torch", "triton", "transformers", "flash-attn", "flash-attn-4", "liger-kernel",
    "triton-kernels", "scattermoe",
)  # fmt: skip
SUFFIXES = {".py", ".cu", ".h", ".cpp"}  # a build leaves others


def source_digest() -> str:
    """Of everything that a result depends on: equal digests, equal code, committed or not."""
    found = hashlib.sha256()
    for name in MEASURED:
        path = ROOT / name
        inside = sorted(path.rglob("*"))
        tables = [p for p in inside if p.suffix == ".json" and p.parent.name == "configs"]
        for file in [path] if path.is_file() else [p for p in inside if p.suffix in SUFFIXES]:
            found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
        for file in tables:
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str:
    """The commit that is checked out, "unknown" outside a checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def about(dry: bool) -> dict:
    """The card, its driver and the versions of what runs on it."""
    import torch

    versions = {p: v for p in PACKAGES if (v := _version(p))} | {
        "python": platform.python_version()
    }
    if dry:
        return {"card": "dry run on the CPU", "versions": versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": properties.L2_cache_size / 2**20,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "versions": versions,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


class Store:
    """The JSON of one card."""

    def __init__(self, folder: Path, dry: bool):
        self.machine = about(dry)
        stem = re.sub(r"[^a-z0-9]+", "-", self.machine["card"].lower()).strip("-")
        self.path = folder / f"gpu-{stem}.json"
        self.source = source_digest()
        record = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.record = {"dry_run": dry, **self.machine, "parts": record.get("parts", {})}

    def known(self, part: str) -> dict | None:
        """This part as measured completely from this very source on this card, if it was."""
        found = self.record["parts"].get(part)
        same = found is not None and found["source"] == self.source
        same = same and found["versions"] == self.machine["versions"]
        return found if same and found["complete"] and not found["failures"] else None

    def put(self, part: str, found: dict, seconds: float) -> None:
        """Write one part's findings at once."""
        self.record["parts"][part] = {
            **found,
            "seconds": round(seconds, 1),
            "date": date.today().isoformat(),
            "commit": commit(),
            "source": self.source,
            "versions": self.machine["versions"],
        }
        self.record |= self._as_run()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(written, self.path)

    def _as_run(self) -> dict:
        """The comparisons as the CPU's result files have theirs, for `make docs`."""
        findings = (f for part in self.record["parts"].values() for f in part["findings"])
        return {
            "machine": self.machine["card"],
            "device": "cuda",
            "date": date.today().isoformat(),
            "short": self.record["dry_run"],  # which no page shows
            "roofs": self.roofs(),
            "groups": {f["name"]: f for f in findings if "tokens" in f},
        }

    def roofs(self) -> dict | None:
        """The measured roofs of this card, as `--roofs` of a part takes them."""
        part = self.record["parts"].get("roofs")
        found = part["findings"][0] if part and part["findings"] else None
        if self.record["dry_run"] or found is None or not found["copy_gbs"]:
            return None
        return {k: found[k] for k in ("copy_gbs", "gemm_gflops")}


def environment(dry: bool) -> dict[str, str]:
    """Of the process of a part."""
    paths = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "tests")]
    made = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(paths),
        "MEDGPT_KERNELS_STRICT": "1",  # a fallback would time the reference
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    made.pop("TRITON_INTERPRET", None)
    if dry:
        made |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return made


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
