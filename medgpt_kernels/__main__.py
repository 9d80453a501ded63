"""python -m medgpt_kernels: versions, devices, and which backend serves which operator here."""

import argparse
import importlib.metadata
import platform
import sys

import torch

import medgpt_kernels as mk
from medgpt_kernels import native, registry

PEERS = ("triton", "transformers", "flash-attn", "liger-kernel")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _native_lines():
    yield "build", native.build_info()
    try:
        yield (
            "cpu kernels",
            f"{native.cpu().isa} (this machine: {', '.join(native.supported_isas())})",
        )
    except registry.Unsupported as reason:
        yield "cpu kernels", f"none: {reason}"
    for i in range(torch.cuda.device_count()):
        try:
            native.cuda(i)
            state = "runs our CUDA kernels"
        except registry.Unsupported as reason:
            state = f"no CUDA kernels: {reason}"
        name = torch.cuda.get_device_name(i)
        major, minor = torch.cuda.get_device_capability(i)
        yield f"cuda:{i}", f"{name}, sm_{major}{minor}, {state}"
    if not torch.cuda.is_available():
        yield "cuda", "no device that torch can use"


def report() -> int:
    """Print what is installed and what will run."""
    rows = [
        ("medgpt_kernels", mk.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((p, _version(p)) for p in PEERS),
        ("threads", str(torch.get_num_threads())),
        *_native_lines(),
    ]
    for name, text in rows:
        print(f"{name:15} {text}")
    chosen = registry.chosen_backend()
    print(f"\nserved by{f' (narrowed to {chosen})' if chosen else ''}:")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for operator in registry.operators.values():
        for device in devices:
            name, reasons = registry.select(operator, device)
            why = f"   not {'; not '.join(reasons)}" if reasons else ""
            print(f"  {operator.name:20} {device:5} {name}{why}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medgpt_kernels", description=__doc__)
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run every op x dtype x backend against its reference (about half a minute)",
    )
    parser.add_argument(
        "--aot",
        action="store_true",
        help="compile every Triton kernel for every card and print the table (minutes); "
        "--aot --help has more",
    )
    argv = sys.argv[1:] if argv is None else argv
    if "--aot" in argv:
        from medgpt_kernels import aot

        return aot.main([argument for argument in argv if argument != "--aot"])
    arguments = parser.parse_args(argv)
    if arguments.selftest:
        from medgpt_kernels import selftest

        return selftest.main()
    return report()


if __name__ == "__main__":
    sys.exit(main())
