"""The command `medgpt`: make a checkpoint, look into it, ask it, evaluate it.

It uses a network only where `eval` is given a hub or a remote model.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from medgpt import NOTICE
from medgpt.data import cli as data_cli
from medgpt.eval import cli as evaluation
from medgpt.terminal import escaped, printable
from medgpt.train import cli as train_cli

EXAMPLES = """
  medgpt init --language gpt-oss-20b --vision clip-vit-large-patch14-336 --out medgpt
  medgpt init --preset tiny --out tiny
  medgpt generate medgpt --image chest.dcm --prompt "Is there a pneumothorax?" --json
  medgpt chat medgpt
  medgpt curate curation.yaml --workers 8
  medgpt train run.yaml --all
"""
DTYPES = ("bfloat16", "float16", "float32")
EFFORTS = ("low", "medium", "high")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0, 2 for what the user can put right, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(evaluation.spelled(arguments))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ[name] = "1"
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nmedgpt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, FloatingPointError) as error:
        print(printable(f"medgpt: {error}"), file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="medgpt",
        description=f"{__doc__}\n{NOTICE}",
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _init_parser(commands.add_parser("init", help="compose a checkpoint, or make a tiny one"))
    _convert_parser(commands.add_parser("convert", help="from InternVL's names, or to them"))
    _generate_parser(commands.add_parser("generate", help="answer one prompt"))
    _chat_parser(commands.add_parser("chat", help="talk in the terminal"))
    data_cli.add_parsers(commands)
    evaluation.add_parsers(commands)
    train_cli.add_parsers(commands)
    info = commands.add_parser("info", help="what a checkpoint is")
    info.add_argument("directory")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=_info)
    return top


def _writing(add) -> None:
    add("--out", required=True, metavar="DIR")
    add("--experts", choices=("packed", "dense"), help="default: as they come")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of all but packed experts")
    add("--max-shard-size", default="4GB", metavar="SIZE")
    add("--overwrite", action="store_true", help="replace a MedGPT checkpoint")


def _answering(add) -> None:
    add("directory", help="of a MedGPT checkpoint")
    add("--system", metavar="TEXT", help="in place of the checkpoint's system prompt")
    add("--max-new-tokens", type=int, default=1024, metavar="N")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, help="of sampling; default: a new one")
    add("--reasoning", choices=EFFORTS, default="medium")
    add("--window", help="CT window of DICOM images, as lung, bone, brain")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--projections", choices=("int8",), help="faster on a CPU: all but experts in 8 bits")
    add("--device", help="default: the GPU where there is one")


def _init_parser(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("--language", metavar="DIR", help="openai/gpt-oss-20b, downloaded")
    add("--vision", metavar="DIR", help="CLIP ViT-L/14-336 or SigLIP2 NaFlex, downloaded")
    add("--preset", choices=("tiny",), help="random weights, the real vocabulary")
    add("--seed", type=int, default=0, help="of new weights")
    _writing(add)
    sub.set_defaults(run=_init)


def _convert_parser(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("directory")
    sub.add_argument("--to", choices=("medgpt", "internvl"), default="medgpt")
    _writing(sub.add_argument)
    sub.set_defaults(run=_convert)


def _generate_parser(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    _answering(add)
    add("--prompt", required=True, help="text, or - for standard input")
    add("--image", action="append", default=[], metavar="PATH", help="DICOM, PNG, JPEG; repeatable")
    add("--frame", type=int, default=0, help="of multi-frame DICOM images")
    add("--json", action="store_true", help="the whole result as one JSON object")
    sub.set_defaults(run=_generate)


def _chat_parser(sub: argparse.ArgumentParser) -> None:
    _answering(sub.add_argument)
    sub.add_argument("--show-analysis", action="store_true", help="the reasoning, on stderr")
    sub.set_defaults(run=_chat)


def beside_the_result():
    """Standard output is the result's alone: what libraries print goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


def _init(args) -> None:
    with beside_the_result():
        _make(args)
    print(args.out)


def _make(args) -> None:
    import torch

    from medgpt import checkpoint
    from medgpt.config import MedGPTConfig

    shared = {
        "dtype": getattr(torch, args.dtype),
        "max_shard_size": args.max_shard_size,
        "overwrite": args.overwrite,
        "seed": args.seed,
    }
    if args.preset:
        if args.language or args.vision or args.experts:
            raise ValueError("--preset has no --language, --vision or --experts")
        checkpoint.create(MedGPTConfig.tiny(), args.out, **shared)
    elif args.language and args.vision:
        checkpoint.compose(args.language, args.vision, args.out, experts=args.experts, **shared)
    else:
        raise ValueError("init needs --language and --vision, or --preset")


def _convert(args) -> None:
    with beside_the_result():
        _renamed(args)
    print(args.out)


def _renamed(args) -> None:
    import torch

    from medgpt import checkpoint

    shared = {"max_shard_size": args.max_shard_size, "overwrite": args.overwrite}
    if args.to == "internvl":
        if args.experts:
            raise ValueError("--to internvl leaves experts as they are")
        checkpoint.export_internvl(args.directory, args.out, **shared)
    else:
        dtype = getattr(torch, args.dtype)
        checkpoint.convert_internvl(
            args.directory, args.out, experts=args.experts, dtype=dtype, **shared
        )


def load(args):
    """(model, processor) of the directory that a command names."""
    with beside_the_result():
        import torch
        from transformers.utils import logging

        from medgpt import checkpoint

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch built without it: an assertion
            raise ValueError(f"expected a device of this machine, got {device!r}") from error
        dtype, projections = getattr(torch, args.dtype), args.projections
        return checkpoint.load(args.directory, dtype=dtype, device=device, projections=projections)


def options(args) -> dict:
    """generate()'s options from those of a command."""
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "reasoning_effort": args.reasoning,
        "window": args.window,
    }


def _generate(args) -> None:
    from medgpt import generate as engine

    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    for path in args.image:
        if not Path(path).is_file():
            raise ValueError(f"expected an image file, got {path!r}")
    images = [{"type": "image", "path": path, "frame": args.frame} for path in args.image]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    model, processor = load(args)

    def stream(text: str, channel: str) -> None:
        if channel == "final":
            print(printable(text), end="", flush=True)

    if args.json:
        result = engine.generate(model, processor, messages, **options(args))
        print(escaped(json.dumps(result, indent=2, ensure_ascii=False)))
        return
    print(NOTICE, file=sys.stderr)
    result = engine.generate(model, processor, messages, stream=stream, **options(args))
    print()
    print(summary(result), file=sys.stderr)


def summary(result: dict) -> str:
    """One line of an answer's metadata."""
    usage, rate = result["usage"], result["timing"]["tokens_per_second"]
    known = f", {usage['cached_tokens']} known" if usage["cached_tokens"] else ""
    parts = [
        "research use only",
        result["finish_reason"],
        f"{usage['prompt_tokens']} tokens in ({usage['image_tokens']} of images{known})",
        f"{usage['completion_tokens']} out",
    ]
    parts += [] if rate is None else [f"{rate} a second"]
    parts += [] if result["seed"] is None else [f"seed {result['seed']}"]
    parts += [] if result["final"] is not None else ["no final answer"]
    return f"[{', '.join(parts)}]"


def _chat(args) -> None:
    from medgpt.chat_loop import chat

    chat(*load(args), options(args), system=args.system, show_analysis=args.show_analysis)


def _info(args) -> None:
    with beside_the_result():
        from medgpt.info import describe

        found = describe(args.directory)
    if args.json:
        print(json.dumps({"research_use_only": NOTICE, **found}, indent=2))
        return
    for name, value in found.items():
        print(printable(f"{name:<26}{value}"))


if __name__ == "__main__":
    sys.exit(main())
