"""Options, threads, the interleaved measurement behind each benchmark, and the closing table."""

import os
from pathlib import Path


def available_cores() -> int:
    """Physical cores this process may use: affinity, siblings and the container's quota."""
    usable = (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )
    siblings = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    cores = len(siblings)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return max(1, cores)


THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", str(available_cores())))
os.environ.setdefault("MKL_NUM_THREADS", str(THREADS))
os.environ["MEDGPT_KERNELS_STRICT"] = "1"  # a fallback would time the reference

import harness  # noqa: E402  after the thread count, which OpenMP reads once
import pytest  # noqa: E402
import results  # noqa: E402
import torch  # noqa: E402

from medgpt_kernels import roofline  # noqa: E402

torch.set_num_threads(THREADS)
MEASURED = pytest.StashKey[dict[str, results.Measured]]()


def pytest_addoption(parser):
    options = parser.getgroup("medgpt_kernels benchmarks")
    options.addoption("--short", action="store_true", help="small batches, few rounds, for CI")
    options.addoption("--save-result", action="store_true", help="write benchmarks/results/")
    options.addoption(
        "--device", default=None, help="cpu or cuda; default: cuda where there is one"
    )


def pytest_configure(config):
    config.stash[MEASURED] = {}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name.startswith("bench_"):
            item.add_marker(pytest.mark.benchmark(timer=harness.replay_clock))
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"))


@pytest.fixture(scope="session")
def short(request) -> bool:
    return request.config.getoption("--short")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(request.config.getoption("--device") or default)


@pytest.fixture
def timed(request, benchmark, short):
    """timed(group, case): the contender of this test, measured with all selected ones of its case.

    `group` is a function that builds the harness.Group; it is called once a case.
    """
    measured = request.config.stash[MEASURED]

    def selected(case: str) -> list[str]:
        calls = [
            item.callspec.params
            for item in request.session.items
            if getattr(item, "originalname", "") == request.node.originalname
        ]
        return [call["contender"] for call in calls if call["case"] == case]

    def run(build, case: str, contender: str) -> None:
        key = f"{request.node.originalname}:{case}"
        if key not in measured:
            group = build()
            rounds, slow_rounds = (3, 2) if short else (7, 3)
            here = [name for name in selected(case) if name in group.contenders]
            measured[key] = harness.measure(group, here, rounds, slow_rounds)
        found = measured[key]
        outcome = found.outcomes.get(contender)
        if outcome is None:
            pytest.skip("no contender of this case on this device")
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        if outcome.refused:
            pytest.fail(f"refused, {outcome.refused}", pytrace=False)
        benchmark.group = found.name
        benchmark.extra_info.update(
            bytes=found.cost.bytes, flops=found.cost.flops, **found.figures(contender)
        )
        harness.replay(benchmark, outcome.times)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    measured = list(config.stash[MEASURED].values())
    if not measured:
        return
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    roofs = roofline.measure_again(measured[0].roofs, device)
    for group in measured:
        group.roofs = roofs
    record = results.record(measured, device, short=config.getoption("--short"))
    terminalreporter.section("medians, interleaved; ratios above 1 are faster than the other")
    terminalreporter.write_line(results.table(record))
    if config.getoption("--save-result"):
        for path in results.save(record, Path(__file__).parent / "results"):
            terminalreporter.write_line(f"wrote {path}")
