"""The support table says what the code says, and "tested" only of what ran."""

import json
import re
import shutil
from pathlib import Path

import make_support
import pytest

from medgpt_kernels import aot

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "README.md", "pyproject.toml", "CMakeLists.txt", "cmake/cuda.cmake", "docs/support.json",
    "docs/support.md", "medgpt_kernels/aot.py",
)  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def data() -> dict:
    return json.loads((ROOT / "docs" / "support.json").read_text())


def test_committed_tables_are_up_to_date():
    assert make_support.stale(ROOT) == [], "run make docs"


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("pyproject.toml", "torch>=2.11", "torch>=2.12"),
        ("medgpt_kernels/aot.py", '    "sm_86": ', '    "sm_87": '),
        ("cmake/cuda.cmake", "release_archs 80 86", "release_archs 80"),
        ("CMakeLists.txt", "  add_isa(v4 ", "  add_isa(v5 "),
        ("docs/support.json", "2.13.0", "2.99.0"),
    ],
)
def test_a_change_elsewhere_makes_them_stale(copy, path, old, new, monkeypatch):
    """Negative control."""
    monkeypatch.setitem(make_support.NAMES, "sm_87", "-")
    monkeypatch.setitem(make_support.ISAS, "v5", "-")
    assert make_support.stale(copy) == []
    text = (copy / path).read_text()
    assert old in text
    (copy / path).write_text(text.replace(old, new))
    assert make_support.stale(copy)


def test_cards_and_instruction_sets_are_the_gates_and_cmakes():
    assert list(make_support.cards(ROOT)) == list(aot.CARDS)
    assert make_support.isas(ROOT) == ["baseline", "v3", "v4", "v4_bf16"]
    assert {c for c, how in make_support.cards(ROOT).items() if "CUDA C++" in how} == {
        c for c, card in aot.CARDS.items() if card.backend == "cuda"
    }


def unfounded(cards: dict[str, str]) -> list[str]:
    """Cards called tested whose evidence is no result file of a GPU."""
    paths = {card: ROOT / "benchmarks" / "results" / file for card, file in cards.items()}
    return [
        card
        for card, path in paths.items()
        if not path.is_file() or json.loads(path.read_text())["device"] == "cpu"
    ]


def test_a_tested_card_has_a_result_file():
    assert unfounded(data()["cards"]) == []
    file = next((ROOT / "benchmarks" / "results").glob("amd-*.json")).name
    assert unfounded({"sm_90": "absent.json", "sm_80": file}) == ["sm_90", "sm_80"]


def test_cis_run_has_its_versions():
    (run,) = [r for r in data()["runs"] if r["what"].startswith("CI")]
    wanted = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert wanted.items() <= run.items()
    assert ".ci/run" in (ROOT / "docs" / "support.md").read_text()


def test_the_lowest_versions_were_run():
    for name in ("torch", "triton", "transformers"):
        least = make_support.bounds(ROOT)[name]
        seen = {make_support.short(r[name]) for r in data()["runs"] if r.get(name)}
        assert least in seen, f"no run of {name} {least}: make test-support"
