"""Build, install and self-test under several Pythons: python tests/check_support.py [PYTHON ...]

Each interpreter (by default every python3.10 ... 3.14 on the PATH) builds the package from the
tracked files into a folder of its own and runs `--selftest` there, away from the sources. One that
has torch is used as it is; another gets an environment with constraints.txt's torch, a download of
gigabytes where no CPU build is at hand. --save writes what passed into docs/support.json.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINORS = range(10, 15)
FACTS = """
import importlib.metadata as m, json, platform
def version(name):
    try: return m.version(name).split("+")[0]
    except m.PackageNotFoundError: return None
from medgpt_kernels import native, registry
try: isa = native.cpu().isa
except registry.Unsupported: isa = None
versions = {"torch": version("torch"), "triton": None, "transformers": None}  # not run here
print(json.dumps({"python": platform.python_version(), **versions, "isa": isa}))
"""


def found() -> list[str]:
    """Interpreters on the PATH that start: a shim of a version that is not set up does not."""
    paths = (shutil.which(f"python3.{minor}") for minor in MINORS)
    return [p for p in paths if p and not subprocess.run([p, "-V"], capture_output=True).returncode]


def has_torch(python: str) -> bool:
    return not subprocess.run([python, "-c", "import torch"], capture_output=True).returncode


def sources(folder: Path) -> Path:
    """A copy of the tracked files, so that nothing built before is at hand."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def check(python: str, folder: Path) -> dict:
    """One interpreter: what it has and whether the self-test passes."""
    if not has_torch(python):
        subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
        python = str(folder / "venv" / "bin" / "python")
        wanted = ["-c", str(ROOT / "constraints.txt"), "torch", "numpy"]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    target = folder / "installed"
    environment = {**os.environ, "PYTHONPATH": str(target), "MEDGPT_REQUIRE_NATIVE": "1"}
    package = str(sources(folder / "sources"))
    for command in (
        ["-m", "pip", "install", "-q", "--no-deps", "--target", str(target), package],
        ["-m", "medgpt_kernels", "--selftest"],
    ):
        subprocess.run([python, *command], cwd=folder, env=environment, check=True)
    facts = subprocess.run(
        [python, "-c", FACTS],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(facts.stdout)


def save(rows: list[dict]) -> None:
    """Add runs to the data file; one of the same versions takes the older one's place."""
    path = ROOT / "docs" / "support.json"
    data = json.loads(path.read_text())
    new = {(r["python"], r["torch"], r["what"]): r for r in rows}
    kept = [r for r in data["runs"] if (r["python"], r["torch"], r["what"]) not in new]
    data["runs"] = [*kept, *new.values()]
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="*", help="interpreters; those with torch are used as is")
    parser.add_argument("--save", action="store_true", help="write docs/support.json")
    options = parser.parse_args()
    rows, failed = [], 0
    for python in options.python or found():
        with tempfile.TemporaryDirectory() as folder:
            try:
                facts = check(python, Path(folder))
            except subprocess.CalledProcessError as error:
                print(f"{python}: failed: {error}", file=sys.stderr)
                failed += 1
                continue
        today = datetime.date.today().isoformat()
        rows.append({"date": today, "what": "build, install, --selftest", **facts})
        print(json.dumps(rows[-1]), flush=True)
    if options.save:
        save(rows)
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    sys.exit(main())
