"""README's claims: its example runs, and its table is the committed result file's."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_embedding_example_runs(capsys):
    pytest.importorskip("pydicom")
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    assert "[15566, 1152]" in capsys.readouterr().out


def test_gpt_oss_example_runs():
    pytest.importorskip("transformers")
    names = {}
    exec(compile(EXAMPLES[1], "README.md", "exec"), names)
    sinks = names["model"].model.layers[0].self_attn.sinks
    assert sinks.grad.abs().min() > 0
    exec(compile(EXAMPLES[2], "README.md", "exec"), names)
    assert names["answer"].shape == (1, 352)
    assert names["cache"].get_seq_length() == 351


def test_medgpt_example_runs():
    pytest.importorskip("transformers")
    names = {}
    exec(compile(EXAMPLES[3], "README.md", "exec"), names)
    answer = names["answer"]
    assert next(iter(answer)) == "research_use_only"
    assert answer["usage"]["image_tokens"] == 1440


def test_examples_are_short():
    assert all(len(code.splitlines()) <= 20 for code in EXAMPLES)


def test_commands_are_those_of_ci():
    script = (ROOT / ".ci" / "run").read_text()
    assert '.[dev]" && pytest benchmarks/ --benchmark-only' in README
    assert 'pip install -q -c constraints.txt -e ".[dev]"' in script
    assert "pytest benchmarks/ --benchmark-only --short" in script


def test_figures_come_from_a_result_file():
    table = re.search(r"<!-- results: (\S+) -->\n(.*?)<!-- end", README, re.DOTALL)
    run = json.loads((ROOT / table.group(1)).read_text())
    assert not run["short"]
    rows = re.findall(
        r"^\| `(.+?)` \| (.+?) \| ([\d,.]+) \| (.+?) \| ([\d,.]+) \|", table.group(2), re.M
    )
    assert rows
    for group, ours, ours_ms, peer, peer_ms in rows:
        found = run["groups"][group]["contenders"]
        for name, text in ((ours, ours_ms), (peer, peer_ms)):
            assert float(text.replace(",", "")) == pytest.approx(found[name]["median_ms"], abs=0.06)


def test_paths_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
