"""Install a wheel into an empty environment, away from the sources, and run its self-test."""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for command in (
            ["-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), wheel],
            ["-m", "medgpt_kernels"],
            ["-m", "medgpt_kernels", "--selftest"],
        ):
            arguments = [str(python), *command]
            subprocess.run(arguments, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
