"""One process of a tiny training run: python train_worker.py MODEL OUT [--processes 2 --rank 0] ...

Prints one JSON line: the loss of each step, which parameters moved, and a hash of all weights.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from train_packs import SyntheticPacks  # noqa: E402

from medgpt import MedGPTForConditionalGeneration  # noqa: E402
from medgpt.train.arguments import training_arguments  # noqa: E402
from medgpt.train.run import CONFIGS  # noqa: E402
from medgpt.train.stages import PARTS, stage_of  # noqa: E402
from medgpt.train.trainer import MedGPTTrainer  # noqa: E402


class Recorded(MedGPTTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.recorded[self.state.global_step] = (
            self.recorded.get(self.state.global_step, 0.0) + loss.item()
        )
        return loss


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--packs-per-step", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if options.deepspeed:
        os.environ |= {
            "RANK": str(options.rank),
            "LOCAL_RANK": str(options.rank),
            "WORLD_SIZE": str(options.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(options.port),
        }
    stage = stage_of(
        options.stage,
        packs_per_step=options.packs_per_step,
        learning_rates=dict.fromkeys(stage_of(options.stage).learning_rates, 1e-3),
    )
    arguments = training_arguments(
        stage,
        options.out,
        processes=options.processes,
        use_cpu=True,
        full_determinism=False,
        disable_tqdm=True,
        report_to=[],
        logging_steps=5,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        deepspeed=str(CONFIGS / "zero3_cpu.json") if options.deepspeed else None,
    )
    model = MedGPTForConditionalGeneration.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    )
    before = load_file(Path(options.model) / "model.safetensors")
    packs = SyntheticPacks(options.steps * options.packs_per_step)
    trainer = Recorded(model, stage, packs, arguments)
    trainer.recorded = {}
    trainer.train()
    if options.deepspeed:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            after = {name: p.detach().clone() for name, p in model.named_parameters()}
    else:
        after = dict(model.named_parameters())
    digest = hashlib.sha256()
    moved = {part: [0, 0] for part in PARTS}
    for name, parameter in after.items():
        digest.update(parameter.detach().numpy().tobytes())
        part = next(p for p in PARTS if name.startswith(p + "."))
        moved[part][not torch.equal(parameter, before[name].to(parameter))] += 1
    return {
        "losses": [trainer.recorded[i] for i in sorted(trainer.recorded)],
        "stayed_moved": moved,
        "sha256": digest.hexdigest(),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


if __name__ == "__main__":
    print(json.dumps(run(parse())))
