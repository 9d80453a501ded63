"""The estimate against the resident set of real runs, and its arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_packs import config, tiny

from medgpt import MedGPTConfig
from medgpt.train.estimate import count_parameters, estimate, lora_values, table
from medgpt.train.flops import forward_flops, step_flops
from medgpt.train.stages import HEAD, LANGUAGE, PARTS, PROJECTOR, VISION, stage_of

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory_train.py"


def measured(*options: str) -> dict:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("number", ["1", "2"])
@pytest.mark.parametrize(("preset", "length"), [("tiny", "2048"), ("mid", "2048"), ("mid", "6144")])
def test_within_a_tenth_of_what_is_measured(preset, length, number):
    found = measured("--preset", preset, "--stage", number, "--length", length)
    assert 0.9 < found["ratio"] < 1.1, found
    without = {k: v for k, v in found["parts_mb"].items() if k != "peak"}
    largest = max(without.values())
    assert not 0.9 < (found["estimate_mb"] - largest) / found["measured_mb"] < 1.1


def test_parameters_are_counted_without_memory():
    shapes = count_parameters(config())
    assert shapes == {n: p.shape for n, p in tiny().named_parameters()}
    real = count_parameters(MedGPTConfig(text_config={"vocab_size": 201088}))
    language = sum(s.numel() for n, s in real.items() if n.startswith((LANGUAGE, HEAD)))
    assert 20.8e9 < language < 117e9


def test_what_the_three_machines_hold():
    real = MedGPTConfig(
        text_config={
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "hidden_size": 2880,
            "intermediate_size": 2880,
        }
    )
    stage, half = stage_of(2), torch.bfloat16
    options = {"dtype": half, "device": "cuda", "zero3": True}
    found = estimate(real, stage, processes=8, **options)
    assert 8 * found["optimizer"] > 12 * 20.9e9
    assert found["peak"] == sum(v for k, v in found.items() if k != "peak")
    sixteen = estimate(real, stage, processes=16, **options)
    assert found["peak"] / 2 < sixteen["peak"] < found["peak"]
    assert "does not fit" in table(found, 40)
    lora = estimate(
        real, stage_of(3, length=4096), dtype=half, device="cuda", lora_rank=16, tiles=4
    )
    assert "GiB: fits" in table(lora, 24)
    assert lora_values(real, 16) == 16 * lora_values(real, 1)


def test_flops_are_six_for_each_weight_and_token():
    made = config()
    one = forward_flops(made, [64], [(56, 56)])
    two = forward_flops(made, [64, 64], [(56, 56)] * 2)
    assert all(two[part] == 2 * one[part] for part in PARTS)
    assert forward_flops(made, [128])[LANGUAGE] > forward_flops(made, [64, 64])[LANGUAGE]
    assert step_flops(one, PARTS) == 3 * sum(one.values())
    frozen = 2 * (one[LANGUAGE] + one[HEAD]) + 3 * (one[VISION] + one[PROJECTOR])
    assert step_flops(one, {VISION, PROJECTOR}) == frozen
    assert step_flops(one, {HEAD}) == sum(one.values()) + 2 * one[HEAD]
