"""`medgpt train CONFIG` and `medgpt merge`."""

import argparse
import os

ABOUT = """Trains a stage, or all three, of a YAML or TOML file (docs/medgpt_train.md). Stopped, the
same command goes on where it was. On several GPUs: deepspeed --module medgpt train ..."""


def add_parsers(subparsers) -> None:
    """Adds `train` and `merge`."""
    train = subparsers.add_parser("train", help="one stage or all three", description=ABOUT)
    train.add_argument("config", help="a .yaml or .toml file")
    which = train.add_mutually_exclusive_group(required=True)
    which.add_argument("--stage", type=int, choices=(1, 2, 3))
    which.add_argument("--all", action="store_true", help="1, 2 and 3, each from the one before")
    train.add_argument(
        "--estimate", action="store_true", help="only print the memory of one GPU; nothing is read"
    )
    train.add_argument("--processes", type=int, default=1, help="of --estimate")
    train.set_defaults(run=run)
    merge = subparsers.add_parser("merge", help="adapters of LoRA into a checkpoint")
    merge.add_argument("model", help="the checkpoint that was trained on")
    merge.add_argument("adapters", help="output/stageN/model")
    merge.add_argument("--out", required=True)
    merge.add_argument(
        "--experts",
        choices=("dense", "packed"),
        default="dense",
        help="dense bf16, or MXFP4 again, with what that rounds away",
    )
    merge.set_defaults(run=run_merge)


def run(args: argparse.Namespace) -> None:
    """Trains; ValueError for what the user can put right."""
    from .run import read_run, start_of, train_all, train_stage

    config = read_run(args.config)
    numbers = (1, 2, 3) if args.all else (args.stage,)
    if args.processes < 1:
        raise ValueError(f"train: expected --processes >= 1, got {args.processes}")
    if args.estimate:
        for number in numbers:
            print(f"stage {number}, one of {args.processes} processes")
            print(_estimate(config, number, args))
        return
    if args.all:
        made = train_all(config)
    else:
        made = train_stage(config, args.stage, *start_of(config, args.stage))
    if int(os.environ.get("RANK", 0)) == 0:
        print(made)


def _estimate(config, number: int, args: argparse.Namespace) -> str:
    import json
    from pathlib import Path

    import torch

    from medgpt.checkpoint import read_config

    from .estimate import estimate, table

    path = config.deepspeed_file
    settings = json.loads(Path(path).read_text()) if path else {}
    zero3 = settings.get("zero_optimization", {}).get("stage") == 3
    half = config.dtype == "bfloat16" and (zero3 or config.lora is not None)
    found = estimate(
        read_config(config.model),
        config.stage(number),
        processes=args.processes,
        zero3=zero3,
        dtype=torch.bfloat16 if half else torch.float32,
        lora_rank=config.lora.rank if config.lora else 0,
        device="cpu" if config.device == "cpu" else "cuda",
    )
    return table(found, config.card_gb)


def run_merge(args: argparse.Namespace) -> None:
    """Merges, and prints what packing again rounds away."""
    from .lora import export

    for row in export(args.model, args.adapters, args.out, experts=args.experts):
        if args.experts == "packed":
            print(
                f"{row['layer']}.{row['weight']}: rounds {row['error']:.1%} of the weight, "
                f"{row['error_of_update']:.1f} times what was learned"
            )
    print(args.out)
