"""Every Triton kernel of the project on every card, and that the gate sees what it must.

pytest -m aot               everything: kernels x cards
pytest -m aot -k quick      the bounded part for CI: main configurations on sm_80 and sm_90, and
                            the planted faults
"""

import re

import pytest

from medgpt_kernels import aot

pytest.importorskip("triton")
pytestmark = pytest.mark.aot
QUICK_CARDS = ("sm_80", "sm_90")


@pytest.fixture(scope="session")
def gate():
    made = aot.Gate()
    yield made
    made.close()


@pytest.fixture(scope="session")
def reports(gate, request):
    """The compilations of all selected tests, started at once."""
    chosen = [i.callspec.params for i in request.session.items if "kernel" in i.fixturenames]
    keys = [(p["kernel"], p["card"]) for p in chosen if "kernel" in p]
    return {key: gate.submit(*key) for key in keys}


@pytest.fixture(scope="session")
def planted():
    made = aot.Gate(processes=1, modules=("planted_kernels",))
    names = {re.search(r"\[(.*)\]", name).group(1): name for name, _ in made.names()}
    yield lambda variant, card: made.submit(names[variant], card).result()
    made.close()


def selected(config) -> bool:
    """Listing the kernels takes seconds: not where this file's tests are deselected anyway."""
    return bool(re.search(r"(?<!not )\baot\b", config.option.markexpr))


def pytest_generate_tests(metafunc):
    if metafunc.function is not test_kernel:
        return
    cases = []
    for name, kernel in aot.kernels().items() if selected(metafunc.config) else ():
        for card in kernel.cards:
            quick = "quick-" if kernel.quick and card in QUICK_CARDS else ""
            cases.append(pytest.param(name, card, id=f"{quick}{card}-{name}"))
    metafunc.parametrize(("kernel", "card"), cases)


def test_kernel(kernel, card, reports):
    report = reports[kernel, card].result()
    assert not report.problems, f"{report}"


@pytest.mark.parametrize(
    ("variant", "card", "problems"),
    [
        ("sound", "sm_80", []),
        ("sound", "sm_90", []),
        ("sound", "sm_100", []),
        ("sound", "gfx942", []),
        ("sound-x3", "sm_80", []),
        ("tf32", "sm_80", ["in plain tf32", "tf32 instruction"]),
        ("tf32", "sm_90", ["in plain tf32", "tf32 instruction"]),
        ("tf32-declared-x3", "sm_80", ["in plain tf32"]),
        ("spill", "sm_80", [r"spills \d+ bytes"]),
        ("spill-amd", "gfx942", [r"spills \d+ bytes"]),
        ("shared", "sm_86", [r"\d+ bytes of shared memory, the card has 101376"]),
        ("shared", "sm_80", [r"\d+ bytes of shared memory, the card has 166912"]),
        ("few-rows", "sm_90", ["expected matrix instruction wgmma, found mma.sync"]),
        ("undeclared", "sm_80", ["declares products none, has half", "instruction none, found"]),
        ("no-product", "sm_80", ["declares products half, has none", "found none"]),
        ("broken", "sm_80", ["does not compile: .*planted"]),
        ("deadly", "sm_80", ["process died"]),
    ],
)
def test_quick_planted_faults(variant, card, problems, planted):
    report = planted(variant, card)
    found = " | ".join(report.problems)
    for problem in problems:
        assert re.search(problem, found, re.S), found
    if not problems:
        assert not found


def test_quick_gate_survives_a_dead_worker(planted):
    assert planted("deadly", "sm_80").problems
    assert not planted("sound", "sm_80").problems


@pytest.mark.parametrize("card", ["sm_90", "gfx942"])
def test_quick_signatures_are_those_of_the_launcher(card):
    """What the gate compiles is what Triton's own launcher would have specialised."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    about = aot.CARDS[card]
    backend = make_backend(GPUTarget(about.backend, about.arch, about.warp_size))
    for kernel in aot.kernels().values():
        fn, source = kernel.fn, aot._source(kernel, about)
        bind = create_function_from_signature(fn.signature, fn.params, backend)
        bound, special, options = bind(**kernel.arguments, **kernel.options)
        _, signature, constants, attributes = fn._pack_args(
            backend, dict(kernel.options), bound, special, options
        )
        assert source.signature == signature, kernel.name
        assert source.constants == constants, kernel.name
        assert source.attrs == {k: v for k, v in attributes.items() if v}, kernel.name


def test_quick_table(capsys):
    status = aot.main(["-k", "_patch_embed_prefix_kernel[float32", "--card", "sm_80", "gfx942"])
    out = capsys.readouterr().out
    assert status == 0
    assert out.startswith("| kernel | card |")
    assert "0 with problems" in out
    assert len(re.findall(r"\| (sm_80|gfx942) \|", out)) >= 2


def test_quick_occupancy():
    """Against NVIDIA's occupancy calculator: registers, shared memory and blocks as the limit."""
    sm_90, sm_86 = aot.CARDS["sm_90"], aot.CARDS["sm_86"]
    assert aot._occupancy(sm_90, warps=4, registers=32, shared=0) == 1.0
    assert aot._occupancy(sm_90, warps=8, registers=255, shared=0) == 8 / 64
    assert aot._occupancy(sm_90, warps=4, registers=32, shared=100 * 1024) == 8 / 64
    assert aot._occupancy(sm_90, warps=1, registers=32, shared=0) == 32 / 64
    assert aot._occupancy(sm_86, warps=4, registers=64, shared=0) == 32 / 48
    assert aot._occupancy(sm_86, warps=4, registers=32, shared=48 * 1024) == 8 / 48
