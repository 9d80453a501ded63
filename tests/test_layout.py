"""One op, one stem: every op has its files, and every file belongs somewhere."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "medgpt_kernels"
OPS = sorted(p.parent.name for p in PACKAGE.glob("*/op.py"))
BACKENDS = {"reference", "cpu", "triton", "cuda"}
SHARED_NATIVE = {
    "cpu": {
        "kernels.h",
        "library.cpp",
        "numerics.cpp",
        "simd.h",
        "gemm.h",
        "buffer.h",
        "dispatch.h",
        "dot.h",
        "linear.cpp",
        "linear_int8.h",
        "linear_int8.cpp",
        "decoder_layer.cpp",
        "fp8.h",
        "vmath.h",
        "grouped_gemm.h",
        "grouped_gemm.cpp",
        "grouped_pack.h",
        "grouped_few.h",
        "grouped_splits.h",
        "mxfp4_decode.h",
    },
    "cuda": {"kernels.h", "intrinsics.h", "library.cu", "probe.cu"},
}


def tracked(pattern: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines()]


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_files(op):
    folder = PACKAGE / op
    stems = {p.stem for p in folder.glob("*.py")} - {"__init__", "op", "tables"}
    assert "reference" in stems
    parts = {s for s in stems if re.fullmatch(r"(triton|cuda|cpu)_(fwd|bwd|\w+)", s)}
    assert stems - parts <= BACKENDS, stems
    assert {s.split("_")[0] for s in parts} <= stems, "a part needs its backend's module"
    assert (ROOT / "tests" / f"test_{op}.py").exists()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").exists()
    for backend, suffix in (("cpu", "cpp"), ("cuda", "cu")):
        if backend in stems:
            assert (ROOT / "csrc" / backend / f"{op}.{suffix}").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_native_sources_belong_to_an_op(device):
    for path in (ROOT / "csrc" / device).iterdir():
        stem = re.sub(r"_(fwd|bwd)$", "", path.stem)
        assert stem in OPS or path.name in SHARED_NATIVE[device], path


HEADINGS = {"Maths", "Memory traffic", "Design", "Limits", "Proof"}


def missing_headings(page: str) -> set[str]:
    return HEADINGS - set(re.findall(r"^## (.+)$", page, re.M))


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_page(op):
    page = (ROOT / "docs" / f"{op}.md").read_text()
    assert not missing_headings(page)
    assert missing_headings(page.replace("## Limits", "## Bounds")) == {"Limits"}
    assert f"]({op}.md)" in (ROOT / "docs" / "README.md").read_text()


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of a page to files that are not there."""
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    files = (link.split("#")[0] for link in links if not link.startswith(("http", "#")))
    return [link for link in files if not (path.parent / link).exists()]


def test_links_lead_somewhere():
    for path in tracked("*.md"):
        assert not broken_links(path, path.read_text()), path
    assert broken_links(ROOT / "README.md", "[a](docs/absent.md)") == ["docs/absent.md"]


def test_make_has_what_it_names():
    text = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([\w-]+):", text, re.M))
    assert set(re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split()) == rules
    for path in tracked("*.md"):
        named = set(re.findall(r"`make ([\w-]+)", path.read_text()))
        assert named <= rules, (path, named - rules)


def test_no_torch_in_native_code():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_modules_open_with_one_sentence():
    for path in tracked("*.py"):
        text = path.read_text()
        if text.strip():
            assert text.startswith(('"""', "#!")), f"{path} has no docstring"


def test_no_pickle_and_no_remote_code():
    for path in tracked("*.py"):
        if path.name != Path(__file__).name:
            text = path.read_text()
            refused = text.replace("trust_remote_code=False", "")  # else transformers asks the user
            assert "trust_remote_code" not in refused, path
            assert not re.search(r"torch\.load\(|import pickle", text), path


def test_kernels_never_import_medgpt():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) medgpt\b", path.read_text(), re.M), path


def allocations_without_dtype(source: str) -> list[str]:
    """Calls that make tensors of torch's default dtype, but for shapes on "meta" and integers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not re.fullmatch(
            r"torch\.(empty|zeros|ones|rand|randn)", ast.unparse(node.func)
        ):
            continue
        named = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if not {"dtype", None} & named.keys() and named.get("device") != "'meta'":
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("op", OPS)
def test_backends_name_the_dtype_of_what_they_allocate(op):
    """A kernel that writes fp32 into a buffer of the default dtype overruns it in bf16."""
    for path in (PACKAGE / op).glob("*.py"):
        assert not allocations_without_dtype(path.read_text()), path
    assert allocations_without_dtype("y = torch.empty(3, device=x.device)")
