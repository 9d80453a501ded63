"""Peak memory of attention over sizes, into a result file: python benchmarks/memory_sweep.py

Each size and contender is a process of its own (memory_attention.py), forward and backward at
gpt-oss's heads. Sizes are bytes, not times: a busy machine gives the same. Linux only.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

import results

ROOT = Path(__file__).resolve().parents[1]
# window, tokens of ours and the peer, tokens up to which eager's scores of T x T fit
SIZES = ((0, (512, 1024, 2048, 4096), 1024), (128, (512, 1024, 2048, 4096, 8192, 16384), 1024))
PEERS = {0: "lse", 128: "lse_chunk"}


def one(tokens: int, window: int, contender: str) -> dict:
    script = str(ROOT / "benchmarks" / "memory_attention.py")
    options = ["--tokens", str(tokens), "--window", str(window), "--contender", contender]
    done = subprocess.run(
        [sys.executable, script, *options], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def row(found: dict) -> dict:
    """The keys by which figures find it."""
    kinds = {"cpu": "ours", "reference": "baseline"}
    return {
        "op": "attention",
        "case": "window" if found["window"] else "full",
        "dtype": found["dtype"],
        "tokens": found["tokens"],
        "contender": found["contender"],
        "kind": kinds.get(found["contender"], "peer"),
        "least_mb": found["least_mb"],
        "peak_mb": found["peak_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-result", action="store_true", help="write benchmarks/results/")
    save = parser.parse_args().save_result
    rows = []
    for window, sizes, eager_limit in SIZES:
        for tokens in sizes:
            for contender in ("cpu", PEERS[window], "reference"):
                if contender != "reference" or tokens <= eager_limit:
                    rows.append(row(one(tokens, window, contender)))
                    print(rows[-1], flush=True)
    if save:
        run = results.header("cpu", short=False) | {"groups": {}, "memory": rows}
        stem = results.stem(run["machine"], datetime.date.today().isoformat())
        path = ROOT / "benchmarks" / "results" / f"{stem}-memory.json"
        path.write_text(json.dumps(run, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
