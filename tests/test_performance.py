"""docs/performance.md, its plots and README's figures are what `make docs` makes of the results."""

import itertools
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import figures
import performance
import pytest
import svg

ROOT = Path(__file__).resolve().parents[1]
RUN = "amd-epyc-avx512-2-threads-2026-11-24.json"


@pytest.fixture
def copy(tmp_path):
    """The results, the pages made of them and README in a folder of their own."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy2(ROOT / "README.md", tmp_path)
    return tmp_path


def edit(root: Path, change, name: str = RUN, to: str | None = None) -> None:
    folder = root / "benchmarks" / "results"
    run = json.loads((folder / name).read_text())
    change(run)
    (folder / (to or name)).write_text(json.dumps(run))


def test_committed_pages_are_what_the_results_give():
    assert performance.stale(ROOT, performance.generate(ROOT)) == [], "run make docs"


def test_a_changed_result_makes_pages_stale(copy, capsys):
    """Negative control; and make docs mends it, once for all."""

    def slower(run):
        name = "attention window_fwd float32 T2048 H64/8 D64"
        run["groups"][name]["contenders"]["cpu"]["median_ms"] *= 2

    for path in (copy / "benchmarks" / "results").glob("*.json"):
        if path.name != RUN:
            path.unlink()
    performance.main([], copy)
    assert performance.main(["--check"], copy) == 0
    edit(copy, slower)
    capsys.readouterr()
    assert performance.main(["--check"], copy) == 1
    told = capsys.readouterr().out
    assert "stale docs/performance.md" in told
    assert "-speedup.svg" in told
    assert performance.main([], copy) == 0
    assert performance.main(["--check"], copy) == 0
    assert "| cpu | 59.6 |" in (copy / "docs" / "performance.md").read_text()


def test_a_plot_that_nothing_makes_is_removed(copy):
    left = copy / "docs" / "plots" / "old.svg"
    left.write_text("<svg/>")
    assert "docs/plots/old.svg" in performance.stale(copy, performance.generate(copy))
    performance.main([], copy)
    assert not left.exists()


def test_what_no_file_has_is_said(copy):
    page = "docs/performance.md"
    for path in (copy / "benchmarks" / "results").glob("*.json"):
        if json.loads(path.read_text())["device"] != "cpu":
            path.unlink()
    assert "No result file of a GPU is committed" in performance.generate(copy)[page]
    edit(copy, lambda run: run.update(machine="NVIDIA X", device="cuda", short=True), to="x.json")
    assert "NVIDIA X" not in performance.generate(copy)[page], "short runs are not shown"
    edit(copy, lambda run: run.update(machine="NVIDIA X", device="cuda"), to="x.json")
    made = performance.generate(copy)
    assert "of a GPU" not in made[page]
    assert made[page].index("## NVIDIA X") < made[page].index("## AMD")
    assert "docs/plots/nvidia-x-speedup.svg" in made["README.md"]


def test_every_plot_names_its_source_and_stays_inside():
    plots = {p: t for p, t in performance.generate(ROOT).items() if p.endswith(".svg")}
    assert plots
    for text in plots.values():
        tree = ElementTree.fromstring(text)
        height = float(tree.get("height"))
        words = [e.text for e in tree.iter() if e.tag.endswith("}text")]
        assert any(".json" in w and re.search(r"\d{4}-\d\d-\d\d;", w) for w in words)
        assert any("torch 2." in w for w in words)
        for element in tree.iter():
            for key, limit in (("x", svg.WIDTH), ("cx", svg.WIDTH), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(key, 0)) <= limit


def test_a_figure_needs_two_sizes():
    run = performance.load(ROOT / "benchmarks" / "results")[0][1]
    name = "attention window_fwd float32 T4096 H64/8 D64"
    arguments = ("attention", "window_fwd", "float32")
    assert figures.sweep(RUN, run, *arguments)
    fewer = {**run, "groups": {n: g for n, g in run["groups"].items() if n != name}}
    assert figures.sweep(RUN, fewer, *arguments) is None


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("experts mxfp4_fwd_T1 float32 E32 top4 H2880 4 steps", ("mxfp4_fwd", "float32", 1, 4)),
        ("decode_attention cache bfloat16 S1024 H64/8 D64", ("cache", "bfloat16", 1024, 1)),
        ("routing fwd float32 T16 x20", ("fwd", "float32", 16, 20)),
        ("patch_embed clip fwd float32 13x336px D1024 P14", ("clip_fwd", "float32", 0, 1)),
    ],
)
def test_names_are_taken_apart(name, case):
    assert figures.parse(name)[1:] == case


def test_groups_of_a_card_say_it_themselves():
    facts = {"dtype": "bfloat16", "tokens": 4096}
    assert figures.parse("attention window fwd+bwd T4096", facts) == (
        "attention", "window_fwdbwd", "bfloat16", 4096, 1,
    )  # fmt: skip
    facts["tokens"] = 32768
    assert figures.parse("decode_attention full B1 S32768", facts)[1] == "cache"
    assert figures.parse("decode_attention full B32 S32768", facts)[1] == "full_B32"


def test_a_name_without_dtype_is_refused():
    with pytest.raises(ValueError, match="figures: expected"):
        figures.parse("attention full")


def test_axes():
    assert svg.linear_ticks(198) == (0, 50, 100, 150, 200)
    assert svg.log_ticks(2.3, 6400) == (1, 10, 100, 1000, 10000)
    assert svg.log_ticks(3, 40) == (2, 5, 10, 20, 50)
    placed = svg.spread([50, 51, 52, 300], 0, 300)
    assert placed == sorted(placed)
    assert all(b - a >= svg.LINE for a, b in itertools.pairwise(placed))
