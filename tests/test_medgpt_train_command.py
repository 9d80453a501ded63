"""The commands as a user types them: all stages under DeepSpeed's launcher, LoRA, the demo."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from medgpt_parts import IMAGE_IDS, clip, gpt_oss, publish
from safetensors.torch import load_file
from test_medgpt_train_data import a_row, jpeg, write
from train_packs import checkpoint_of

from medgpt import checkpoint
from medgpt.cli import main
from medgpt.train.stages import LANGUAGE

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def a_run(folder: Path, image: bytes | None = None, **entries) -> Path:
    """A run's file over a small model and 24 rows."""
    write(folder / "rows.parquet", [a_row(f"row-{n}", image) for n in range(24)])
    stage = {"mix": {str(folder / "rows.parquet"): 1}, "length": 512, "packs_per_step": 2}
    stages = {f"stage{n}": {**stage, "max_steps": 2} for n in (1, 2, 3)}
    given = {"output": str(folder / "out"), "dtype": "float32", "device": "cpu", "workers": 0}
    given |= {"logging_steps": 1, "peak_tflops": 0.1, "tensorboard": False}
    (folder / "run.yaml").write_text(json.dumps({**given, **stages, **entries}))
    return folder / "run.yaml"


def weights(folder: Path, stage: int | None = None) -> dict[str, torch.Tensor]:
    path = folder / "model" if stage is None else folder / "out" / f"stage{stage}" / "model"
    return load_file(path / "model.safetensors")


def test_all_stages_under_deepspeeds_launcher(tmp_path):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    model = checkpoint_of(tmp_path)
    file = a_run(tmp_path, jpeg(), model=str(model), deepspeed="zero3_cpu")
    port = str(29000 + random.randrange(2000))
    launch = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, *launch, "--module", "medgpt", "train", str(file), "--all"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    start, one, two, three = (weights(tmp_path, n) for n in (None, 1, 2, 3))
    assert start.keys() == one.keys() == three.keys()
    for name in start:
        frozen = name.startswith((LANGUAGE, "lm_head"))
        assert torch.equal(start[name], one[name]) == frozen, name
    moved = [name for name in one if not torch.equal(one[name], two[name])]
    assert len(moved) > 0.9 * len(one)  # an expert that no token chose stays
    assert any(not torch.equal(two[name], three[name]) for name in two)


def test_lora_on_packed_experts_from_training_to_an_answer(tmp_path, capsys):
    pytest.importorskip("peft", reason="pip install peft")
    publish(tmp_path / "gpt-oss", gpt_oss())
    clip().save_pretrained(tmp_path / "clip")
    parts = (tmp_path / "gpt-oss", tmp_path / "clip", tmp_path / "model")
    model = checkpoint.compose(*parts, progress=False, **IMAGE_IDS)
    assert checkpoint.is_packed(checkpoint.read_config(model))
    file = a_run(tmp_path, model=str(model), lora={"rank": 4})
    assert main(["train", str(file), "--stage", "3"]) == 0
    adapters = tmp_path / "out" / "stage3" / "model"
    assert (adapters / "adapters.safetensors").is_file()
    for experts in ("dense", "packed"):
        out = tmp_path / experts
        command = ["merge", str(model), str(adapters), "--out", str(out), "--experts", experts]
        assert main(command) == 0
        ask = ["generate", str(out), "--prompt", "What?", "--max-new-tokens", "2"]
        capsys.readouterr()
        assert main([*ask, "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_the_demo_ends_with_less_loss_and_a_picture(tmp_path):
    demo = [sys.executable, str(ROOT / "examples" / "demo_curriculum.py"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*demo, "--rows", "28", "--epochs", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = dict(re.findall(r"^(before|stage 3) +([\d. ]+)$", done.stdout, re.MULTILINE))
    before, after = ([float(x) for x in rows[name].split()] for name in ("before", "stage 3"))
    assert after[-2] < before[-2] - 2  # the questions' loss
    svg = (tmp_path / "curves.svg").read_text()
    assert svg.count("<polyline") >= 3
    assert "stage 3: questions" in svg
