"""The registry: which backend runs, what happens when one cannot, and that nothing is ignored."""

import subprocess
import sys
import warnings

import pytest
import torch

import medgpt_kernels as mk
from medgpt_kernels import native, registry, testing


@pytest.fixture
def operator():
    """An operator with one backend that can be told to refuse."""

    def reference(x):
        return "reference"

    def cpu(x):
        if x is None:
            raise registry.Unsupported("x is None")
        return "cpu"

    modules = {name: f"made_up.{name}" for name in ("reference", "cpu", "triton")}
    made = registry.Operator("made_up", modules)
    made.loaded = {"reference": reference, "cpu": cpu}
    made.loaded["cuda"] = "made_up has no cuda backend"
    made.loaded["triton"] = "made_up.triton is not installed"
    registry._warned.clear()
    return made


def test_fastest_backend_runs(operator):
    assert registry.dispatch(operator, "cpu", (1,)) == "cpu"
    assert registry.dispatch(operator, "", (1,)) == "reference"


def test_backend_narrows_and_restores(operator, monkeypatch):
    with mk.backend("reference"):
        assert registry.dispatch(operator, "cpu", (1,)) == "reference"
        with mk.backend("cpu"):
            assert registry.dispatch(operator, "cpu", (1,)) == "cpu"
        assert registry.chosen_backend() == "reference"
    assert registry.chosen_backend() is None
    monkeypatch.setenv("MEDGPT_KERNELS_BACKEND", "reference")
    assert registry.dispatch(operator, "cpu", (1,)) == "reference"


def test_unknown_backend_raises(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"backend: expected one of .*, got 'fast'"),
        mk.backend("fast"),
    ):
        pass
    monkeypatch.setenv("MEDGPT_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        registry.chosen_backend()


def test_unsupported_call_falls_back_with_one_warning(operator, recwarn):
    for _ in range(3):
        assert registry.dispatch(operator, "cpu", (None,)) == "reference"
    assert len(recwarn) == 1
    text = str(recwarn[0].message)
    assert "made_up" in text
    assert "x is None" in text


def test_unsupported_call_raises_when_strict(operator, monkeypatch):
    monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")
    with pytest.raises(registry.BackendError, match="x is None"):
        registry.dispatch(operator, "cpu", (None,))


def test_missing_backend_asked_for_by_name(operator, monkeypatch):
    with mk.backend("cuda"):
        with pytest.warns(UserWarning, match="made_up has no cuda backend"):
            assert registry.dispatch(operator, "cuda", (1,)) == "reference"
        registry._warned.clear()
        with pytest.warns(UserWarning, match="the cuda backend takes no tensors on cpu"):
            assert registry.dispatch(operator, "cpu", (1,)) == "reference"
        monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")
        with pytest.raises(registry.BackendError, match="no cuda backend"):
            registry.dispatch(operator, "cuda", (1,))


def test_backend_of_another_device_never_gets_the_tensors(operator):
    with mk.backend("cpu"), pytest.warns(UserWarning, match="takes no tensors on cuda"):
        assert registry.dispatch(operator, "cuda", (1,)) == "reference"


def test_next_backend_serves_before_the_reference(operator, recwarn, monkeypatch):
    def refuse(x):
        raise registry.Unsupported("not today")

    monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")
    operator.loaded |= {"cuda": refuse, "triton": lambda x: "triton"}
    assert registry.dispatch(operator, "cuda", (1,)) == "triton"
    assert len(recwarn) == 0


def test_what_a_backend_passes_on_by_design_is_no_failure(operator, recwarn, monkeypatch):
    """backend("cuda") then reaches Triton, and the reference only with the reason."""

    def pass_on(x):
        raise registry.PassedOn("too many")

    operator.loaded |= {"cuda": pass_on, "triton": lambda x: "triton"}
    with mk.backend("cuda"):
        assert registry.dispatch(operator, "cuda", (1,)) == "triton"
        assert len(recwarn) == 0
        del operator.loaded["triton"]
        monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")
        with pytest.raises(registry.BackendError, match="too many"):
            registry.dispatch(operator, "cuda", (1,))


def test_strict_is_zero_or_one(monkeypatch):
    monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "true")
    with pytest.raises(ValueError, match="expected 0 or 1, got 'true'"):
        registry.strict()


def test_a_missing_backend_keeps_no_tensor_alive():
    import gc
    import weakref

    operator = registry.Operator("leaky", {"cpu": "medgpt_kernels.no_such_module"})
    operator.loaded["reference"] = lambda x: None
    seen = []
    for _ in range(5):
        x = torch.zeros(3)
        seen.append(weakref.ref(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            registry.dispatch(operator, "cpu", (x,))
    del x
    gc.collect()
    assert [r for r in seen if r() is not None] == []


def test_backward_follows_the_forwards_backend():
    """Outside the block, and so in autograd's own threads on a GPU."""
    operator = registry.operators["patch_embed_bwd"]
    calls = []
    kernel = operator.kernel("reference")
    operator.loaded["reference"] = lambda *a: calls.append(1) or kernel(*a)
    try:
        weight = torch.ones(2, 768, requires_grad=True)
        images = mk.pack_images([torch.ones(16, 16, 3, dtype=torch.uint8)])
        with mk.backend("reference"):
            out = mk.patch_embed(
                images, weight, None, patch_size=16, weight_layout="linear",
                mean=[0.5] * 3, std=[0.5] * 3,
            )  # fmt: skip
        out.tokens.sum().backward()
    finally:
        operator.loaded["reference"] = kernel
    assert calls == [1]


def test_every_operator_has_its_functions():
    """All backend files of an op have the same functions with the same signatures."""
    import inspect

    for operator in registry.operators.values():
        signatures = {}
        for name in operator.modules:
            try:
                signatures[name] = list(inspect.signature(operator.kernel(name)).parameters)
            except registry.Unsupported as reason:
                assert name != "reference", reason  # noqa: PT017
        assert len(set(map(tuple, signatures.values()))) == 1, (operator.name, signatures)


def test_sizes_in_schemas_are_symbolic():
    for name in registry.operators:
        schema = str(getattr(torch.ops.medgpt_kernels, name).default._schema)
        assert " int " not in schema.split("->")[0].replace("(", "( "), schema


def test_isa_from_the_environment(monkeypatch):
    for isa in native.supported_isas():
        monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", isa)
        assert native.cpu().isa == isa
    monkeypatch.setenv("MEDGPT_KERNELS_CPU_ISA", "v9")
    with pytest.raises(registry.Unsupported, match="v9: this machine has"):
        native.cpu()


def test_cuda_reason():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here; the gpu tests run the module")
    with pytest.raises(registry.Unsupported, match=r"probe launch|not built|no CUDA module"):
        native.cuda()


def run_python(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    """Under 0.3 s beyond torch, and nothing heavy comes along."""
    code = """
import sys, time, torch
before, start = set(sys.modules), time.perf_counter()
import medgpt_kernels
seconds = time.perf_counter() - start
new = {m.split(".")[0] for m in set(sys.modules) - before}
print(seconds, *(new & {"triton", "transformers", "PIL", "scipy", "matplotlib"}))
"""
    seconds, *heavy = run_python(code).split()
    assert float(seconds) < 0.3
    assert heavy == []


def test_works_without_native_code_and_without_triton():
    """No compiler, no GPU, no triton: the reference serves, with the reason in a warning."""
    code = """
import sys, warnings
for name in ("triton", "medgpt_kernels._c"):
    sys.modules[name] = None
import torch, medgpt_kernels as mk
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    out = mk.patch_embed(
        mk.pack_images([torch.zeros(16, 16, 3, dtype=torch.uint8)]), torch.ones(2, 768), None,
        patch_size=16, weight_layout="linear", mean=[0.5] * 3, std=[0.5] * 3)
print(out.tokens.tolist(), [str(w.message) for w in seen if "medgpt" in str(w.message)
                            or "patch_embed" in str(w.message)])
from medgpt_kernels.__main__ import main
sys.exit(main([]))
"""
    text = run_python(code)
    assert "[[-768.0, -768.0]]" in text
    assert "the cpu backend cannot serve this call" in text
    assert "patch_embed_fwd      cpu   reference" in text


def test_report_and_selftest():
    from medgpt_kernels import __main__, selftest

    assert __main__.main([]) == 0
    seen = list(selftest.verdicts())
    assert {op for op, *_ in seen} == set(selftest.OPS)
    assert [v for v in seen if v[4] != "ok"] == []


def test_selftest_notices_a_wrong_kernel(monkeypatch):
    from medgpt_kernels import selftest
    from medgpt_kernels.patch_embed import cpu

    right = cpu.patch_embed_fwd

    def wrong(*arguments):
        tokens, *rest = right(*arguments)
        tokens[0, 0] += 0.1
        return tokens, *rest

    operator = registry.operators["patch_embed_fwd"]
    monkeypatch.setitem(operator.loaded, "cpu", wrong)
    assert selftest.main() == 1


def test_poisoned_empty_and_tolerance():
    with testing.poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(2).new_empty(4).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == 2**31 - 1).all()
    truth = torch.linspace(-1, 1, 100, dtype=torch.float64)
    eager = truth.float()
    testing.assert_close(eager, eager, truth)
    for wrong in (eager + 3e-7, eager * 1.000001, eager.clone().fill_(float("nan")), eager[:50]):
        with pytest.raises(testing.ToleranceError):
            testing.assert_close(wrong, eager, truth)
    holes = truth.clone()
    holes[3] = float("nan")
    testing.assert_close(holes.float(), holes.float(), holes)
    with pytest.raises(testing.ToleranceError, match="not finite"):
        testing.assert_close(eager, holes.float(), holes)
    with pytest.raises(testing.ToleranceError, match="integers differ in 1"):
        testing.assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 3]))


def test_forward_mode_is_refused_past_the_dispatcher_too():
    """Calls without gradients go past PyTorch's dispatcher, which would have kept the tangent."""
    import torch.autograd.forward_ad as forward_ad

    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            mk.routing(dual, weight, None, 2)
