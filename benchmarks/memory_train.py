"""Estimate against measurement of a training run on the CPU: python benchmarks/memory_train.py

Three steps of stage 1 or 2: how far the resident set, in the third, rises above what it is before
the model is made. malloc gives every large block back at once, so that pages are tensors. Prints
one JSON line. Linux only.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GptOssConfig, TrainerCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from memory_patch_embed import status_bytes  # noqa: E402
from train_packs import SyntheticPacks  # noqa: E402

from medgpt import MedGPTConfig, MedGPTForConditionalGeneration  # noqa: E402
from medgpt.train.arguments import training_arguments  # noqa: E402
from medgpt.train.estimate import estimate  # noqa: E402
from medgpt.train.stages import stage_of  # noqa: E402
from medgpt.train.trainer import MedGPTTrainer  # noqa: E402


def mid() -> MedGPTConfig:
    """Between tiny and real: 180 million values, half of them in layers."""
    text = GptOssConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=16,
        num_experts_per_tok=4,
        sliding_window=128,
        vocab_size=65536,
    )
    vision = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    ids = {f"image_{name}token_id": 60 + i for i, name in enumerate(("", "start_", "end_"))}
    return MedGPTConfig(text_config=text, vision_config=vision, **ids)


MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
PRESETS = {"tiny": MedGPTConfig.tiny, "mid": mid}


class Pack(SyntheticPacks):
    """Text, and one tile of 336 pixels."""

    def __init__(self, count, length, config):
        super().__init__(count, length)
        self.config = config

    def __getitem__(self, index):
        row = super().__getitem__(3 * (index // 3) if index < self.count else index)
        size, token = self.config.tile_size, self.config.image_token_id
        count = self.config.tokens_per_tile(size, size)
        for name, value in (("input_ids", token), ("labels", -100)):
            row[name][0, 1 : count + 1] = value
        row["loss_weights"][0, 1 : count + 1] = 0
        row["pixel_values"] = torch.zeros(3 * size * size, dtype=torch.uint8)
        row["image_sizes"] = torch.tensor([[size, size]], dtype=torch.int32)
        return row


class ThirdStep(TrainerCallback):
    """The largest resident set of the third step, when the optimizer has its state."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def on_step_end(self, args, state, control, **kwargs):
        self.bytes = status_bytes("VmHWM")


def measure(preset: str, number: int, length: int) -> dict:
    config = PRESETS[preset]()
    stage = stage_of(number, length=length, packs_per_step=1)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    model = MedGPTForConditionalGeneration(config)
    peak = ThirdStep()
    with tempfile.TemporaryDirectory() as out:
        arguments = training_arguments(
            stage, out, use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no"
        )
        packs = Pack(3, length, config)
        MedGPTTrainer(model, stage, packs, arguments, callbacks=[peak]).train()
    growth = peak.bytes - before
    found = estimate(config, stage, tiles=1)
    mega = 2**20
    return {
        "preset": preset,
        "stage": number,
        "length": length,
        "parameters": model.num_parameters(),
        "measured_mb": round(growth / mega, 1),
        "estimate_mb": round(found["peak"] / mega, 1),
        "ratio": round(found["peak"] / growth, 3),
        "parts_mb": {name: round(value / mega, 1) for name, value in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    # what the first run imports and builds is no part of it
    measure("tiny", options.stage, 256)
    print(json.dumps(measure(options.preset, options.stage, options.length)))


if __name__ == "__main__":
    main()
