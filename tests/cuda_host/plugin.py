"""A pytest plugin: `pytest -p cuda_host.plugin -k cuda` runs the CUDA backend on the CPU."""

import os

import cuda_host

library = cuda_host.install()
library.runtime.seed(int(os.environ.get("CUDA_HOST_SEED", "0")))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"launches: {dict(library.launches)}")
