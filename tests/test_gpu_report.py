"""The GPU report without a GPU: its dry run, what becomes of failures, what it never writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import gpu_report
import harness
from gpu import page, store
from gpu.timing import Comparison, Place, compare

from medgpt_kernels.roofline import Cost

ROOT = Path(__file__).resolve().parents[1]


def report(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_process_and_the_command_know_the_same_parts():
    code = "from gpu.part import PARTS; print(*PARTS)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=store.environment(dry=True),
    )  # fmt: skip
    assert done.stdout.split() == list(gpu_report.PARTS)


def test_known_parts_are_skipped_and_the_time_limit_says_so(tmp_path):
    first = report("roofs", "--out", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "roofs: known from" not in first.stdout
    assert "roofs: known from" in report("roofs", "--out", str(tmp_path)).stdout
    assert "roofs: known from" not in report("roofs", "--again", "--out", str(tmp_path)).stdout
    late = report("mxfp4", "--time-limit", "0", "--out", str(tmp_path))
    assert late.returncode == 0
    assert "not run: mxfp4" in late.stdout
    text = (tmp_path / "gpu-dry-run-on-the-cpu.md").read_text()
    assert "| mxfp4 | not run |" in text
    assert "| roofs | done |" in text


def test_a_part_that_dies_fails_the_report(tmp_path):
    done = report("build", "--out", str(tmp_path), CUDA_HOST_LIBRARY="/no/such/library.so")
    assert done.returncode == 1
    assert "FAILED build: exit status 1" in done.stdout
    assert "| build | failed |" in (tmp_path / "gpu-dry-run-on-the-cpu.md").read_text()
    (part,) = json.loads((tmp_path / "gpu-dry-run-on-the-cpu.json").read_text())["parts"].values()
    assert not part["complete"]


def test_a_part_that_takes_too_long_is_stopped(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(gpu_report.PARTS, "tests", 0.2)
    assert gpu_report.main(["tests", "--dry-run", "--out", str(tmp_path)]) == 1
    assert "FAILED tests: stopped after 0 s" in capsys.readouterr().out


def test_unknown_parts_are_refused():
    done = report("no-such-part")
    assert done.returncode == 2
    assert "unknown part no-such-part" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_card_there_is_no_report(capsys):
    assert gpu_report.main(["roofs"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def comparison(**contenders) -> Comparison:
    """One whose truth is 1 ... 2; each contender gives the values named."""
    truth = torch.linspace(1, 2, 64, dtype=torch.float64)

    def gives(values):
        def run():
            if isinstance(values, Exception):
                raise values
            return values

        return lambda: harness.Contender(run, lambda tokens: {"tokens": tokens})

    def build(tokens):
        return harness.Group(
            name=f"op T{tokens}",
            cost=Cost(1, 1),
            dtype=torch.float32,
            device=torch.device("cpu"),
            contenders={n: gives(v) for n, v in {"reference": truth.float(), **contenders}.items()},
            truth=lambda: {"tokens": truth},
            peer_bound=1e-3,
        )

    return Comparison(build, 8, 4)


def test_wrong_kernels_fail_a_part_and_broken_peers_do_not():
    right = torch.linspace(1, 2, 64, dtype=torch.float64).float()
    broken = RuntimeError("no kernel image\nand more lines")
    found = compare(comparison(triton=right * 1.001, cuda=right, flex=broken), Place(dry=True))
    rows = found["contenders"]
    assert rows["cuda"]["ran"]
    assert "tokens: max error" in rows["triton"]["failed"]
    assert rows["flex"]["failed"] == "RuntimeError: no kernel image"
    code = (
        "import json, sys; from gpu.part import ours_failed\n"
        "print(json.dumps(ours_failed(json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(found)],
        capture_output=True, text=True, check=True, env=store.environment(dry=True),
    )  # fmt: skip
    (failure,) = json.loads(done.stdout)
    assert failure.startswith("triton: ToleranceError")


def test_a_measured_row_reads_as_one():
    row = {
        "kind": "ours", "rounds": 30, "median_ms": 0.5, "q1_ms": 0.49, "q3_ms": 0.52,
        "gflops": 250e3, "gbs": 900.0, "percent_of_roof": 41.0, "vs_baseline": 9.0, "vs_peer": 1.25,
        "peak_bytes": 3_000_000, "graph_ms": 0.4,
    }  # fmt: skip
    peer = row | {"kind": "peer", "median_ms": 0.625}
    group = {"strongest_peer": "flex", "tokens": 4096}
    cells = page._cells("attention", "triton", row, group)
    expected = ["0.5", "0.49 - 0.52", "250.0", "900", "41", "1.25", "3", "0.4", ""]
    assert cells == ["attention", "**triton**", *expected]
    assert page._cells("", "flex", peer, group)[7] == ""  # the best peer against itself


def test_the_source_decides_what_is_known(tmp_path, monkeypatch):
    made = store.Store(tmp_path, dry=True)
    found = {"findings": [], "failures": [], "complete": True}
    made.put("roofs", found, 1.0)
    assert store.Store(tmp_path, dry=True).known("roofs")
    monkeypatch.setattr(store, "source_digest", lambda: "another")
    assert not store.Store(tmp_path, dry=True).known("roofs")
    for wrong in ({"complete": False}, {"failures": ["x"]}):
        again = store.Store(tmp_path, dry=True)
        again.put("roofs", found | wrong, 1.0)
        assert not again.known("roofs")


@pytest.mark.slow
def test_dry_run_of_all_parts(tmp_path):
    done = report("--again", "--time-limit", "600", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    record = json.loads((tmp_path / "gpu-dry-run-on-the-cpu.json").read_text())
    assert record["dry_run"] is True
    assert list(record["parts"].keys() ^ gpu_report.PARTS) == []
    assert all(part["complete"] and part["findings"] for part in record["parts"].values())
    text = (tmp_path / "gpu-dry-run-on-the-cpu.md").read_text()
    assert page.DRY in text
    assert record["short"], "or the documentation would show it"
    assert "attention full fwd+bwd T40" in record["groups"]
    # no figure that could be taken for a measurement
    figures = r'"(median_ms|gflops|tokens_per_second|percent_of_roof|peak_gb)"'
    assert not re.search(figures, json.dumps(record))
    ours = [r for p in record["parts"].values() for f in p["findings"]
            for r in f.get("contenders", {}).values() if r["kind"] == "ours"]  # fmt: skip
    assert not [r for r in ours if "failed" in r]
    assert sum(r.get("ran", False) for r in ours) >= 15


@pytest.mark.slow
def test_dry_run_of_the_tuner(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), "--dry-run"]
    done = subprocess.run(
        [*command, "--kernels", "decode_split", "experts_down_token", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, env=store.environment(dry=True),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 entries looked at" in done.stdout
    # nothing is faster than anything without a clock
    committed = ROOT / "medgpt_kernels" / "configs" / "interpreter.json"
    assert (tmp_path / "interpreter.json").read_text() == committed.read_text()
