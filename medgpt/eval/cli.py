"""medgpt eval: benchmarks on a model, reports of runs, two runs compared, contamination."""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from medgpt.eval.report_metrics import cli as report_metrics

EXAMPLES = """examples:
  medgpt eval tasks
  medgpt eval medqa pubmedqa --model medgpt:DIR --data medqa=medqa.jsonl --data pubmedqa=DIR --out A
  medgpt eval medqa --model openai/gpt-4o-mini --data hub --out B
  medgpt eval report A B --out report
  medgpt eval compare A B
  medgpt eval contamination medqa --data medqa.jsonl --train train.jsonl --run A
"""


SHORT = ("bleu_4", "rouge_l", "meteor_exact_stem", "cider_d")
COMMANDS = ("run", "tasks", "report", "compare", "contamination", "metrics", "annotate")


def spelled(arguments: list[str]) -> list[str]:
    """`eval TASK ...` as `eval run TASK ...`."""
    head, rest = arguments[:1], arguments[1:]
    if head == ["eval"] and rest and rest[0] not in (*COMMANDS, "-h", "--help"):
        return ["eval", "run", *rest]
    return arguments


def add_parsers(subparsers) -> None:
    """The subcommand `eval` and its own."""
    top = subparsers.add_parser(
        "eval",
        help="benchmarks with honest statistics",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND | TASK...")
    _run_parser(commands.add_parser("run", help="ask the questions of tasks; the word may go"))
    tasks = commands.add_parser("tasks", help="what can be asked")
    tasks.add_argument("--json", action="store_true")
    tasks.set_defaults(run=_tasks)
    report = commands.add_parser("report", help="runs side by side, with the paper's figures")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument("--out", required=True, metavar="DIR")
    report.set_defaults(run=_report)
    compare = commands.add_parser("compare", help="two runs on the same questions")
    compare.add_argument("runs", nargs=2, metavar="RUN")
    compare.add_argument("--seed", type=int, default=0)
    compare.add_argument("--json", action="store_true")
    compare.set_defaults(run=_compare)
    found = commands.add_parser("contamination", help="questions that a training set holds")
    add = found.add_argument
    _data_arguments(add)
    add(
        "--train",
        required=True,
        metavar="PATH",
        help="rows that were trained on: a folder of parquet, or .jsonl",
    )
    add("--run", metavar="DIR", dest="folder", help="a run, for clean and dirty accuracy")
    add("--examples", action="store_true", help="list ids of contaminated questions")
    add("--seed", type=int, default=0)
    found.set_defaults(run=_contamination)
    report_metrics.add_parsers(commands)


def _data_arguments(add) -> None:
    add("tasks", nargs="+", metavar="TASK")
    add("--data", action="append", default=[], metavar="[TASK=]PATH", help="file, folder or hub")
    add("--images", metavar="DIR", help="that image paths are relative to; default the data's")
    add("--drop-images", action="store_true", help="ask without them; the report says so")


def _run_parser(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    _data_arguments(add)
    add(
        "--model",
        required=True,
        help="medgpt:DIR, transformers:DIR or any name that inspect_ai knows",
    )
    add("--out", required=True, metavar="DIR", help="of the run; one that is there is gone on with")
    add("--limit", type=int, metavar="N", help="the first N questions")
    add("--shots", type=int, metavar="N", help="examples; default the task's own number")
    add("--shots-data", metavar="PATH", help="where they come from; default the task's own rows")
    add("--seed", type=int, default=0, help="of examples, intervals and decoding")
    add("--max-tokens", type=int, metavar="N", help="default 4096; transformers: the prompt's own")
    add("--reasoning", choices=("low", "medium", "high"))
    add("--batch-size", type=int, default=16, metavar="N", help="of models in this process")
    add("--connections", type=int, default=16, metavar="N", help="requests at a time elsewhere")
    add("--cache", metavar="DIR", help="of completions, shared by runs; default in --out")
    add("--model-arg", action="append", default=[], metavar="NAME=VALUE", help="as dtype=float32")
    add("--log-samples", action="store_true", help="texts into inspect's log, for its viewer")
    sub.set_defaults(run=_with_extra)


def _tasks(args) -> None:
    from medgpt.eval.tasks import tasks

    rows = [
        {"task": t.name, "title": t.title, "hub": t.hub, "split": t.split, "n": t.expected or None}
        for t in tasks().values()
    ]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['task']:28} {row['n'] or '':>6}  {row['title']:38} {row['hub']}")


def _sources(args, names: list[str]) -> dict[str, str]:
    """{task: path} of --data; a bare path is for the only task, and "hub" for all."""
    given = {}
    for value in args.data:
        name, sign, path = value.partition("=")
        if sign and name in names:
            given[name] = path
        elif value == "hub" or len(names) == 1:
            given |= dict.fromkeys(names, value)
        else:
            raise ValueError(f"--data: expected TASK=PATH with a task of the command, got {value}")
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"--data: expected a path or hub for {', '.join(missing)}, got none")
    if "hub" in given.values():
        os.environ.pop("HF_HUB_OFFLINE", None)
    return given


def _with_extra(args) -> None:
    """_ask, where a package that is not there is a line that says how to get it."""
    try:
        _ask(args)
    except ImportError as error:
        extra = ""
        if getattr(error, "name", None) in ("inspect_ai", "anyio", "scipy", "tqdm"):
            extra = "; pip install 'medgpt-kernels[eval]'"
        raise ValueError(f"{error}{extra}") from error


def _ask(args) -> None:
    from medgpt.eval import models, runner
    from medgpt.eval.plan import plan
    from medgpt.eval.tasks import get

    chosen = [get(name) for name in args.tasks]
    sources = _sources(args, args.tasks)
    plans = [
        plan(
            task,
            sources[task.name],
            limit=args.limit,
            shots=args.shots,
            shots_data=args.shots_data,
            seed=args.seed,
            images=args.images,
            drop_images=args.drop_images,
        )
        for task in chosen
    ]
    for made in plans:
        print(_loaded(made), file=sys.stderr)
    if wrong := [value for value in args.model_arg if "=" not in value]:
        raise ValueError(f"--model-arg: expected NAME=VALUE, got {wrong[0]}")
    options = dict(value.split("=", 1) for value in args.model_arg)
    if args.model.partition("/")[0] in ("hf", "vllm", "sglang"):  # named on the hub: asked for
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ.pop(name, None)
    from inspect_ai._util.error import PrerequisiteError

    try:
        model, identity = models.open_model(args.model, **options)
    except PrerequisiteError as error:  # a provider's package, or the key of its API
        plain = re.sub(r"\[/?\w+\]", "", str(error.message))
        raise ValueError(f"--model: {' '.join(plain.split())}") from None
    decoding = runner.Decoding(
        max_tokens=args.max_tokens, reasoning_effort=args.reasoning, seed=args.seed
    )
    for made in plans:
        try:
            result = runner.run_task(
                made,
                model,
                identity,
                args.out,
                decoding=decoding,
                batch_size=args.batch_size,
                connections=args.connections,
                cache=args.cache,
                log_samples=args.log_samples,
                seed=args.seed,
            )
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        print(_line(result))


def _loaded(made) -> str:
    found = made.loaded
    rejected = f", rejected {found['rejected']}" if found["rejected"] else ""
    expected = f" of {found['expected']} published" if found["expected"] else ""
    return (
        f"{made.task.name}: {found['questions']} questions{expected} from {found['rows']} rows of "
        f"{found['source']}{rejected}, asking {found['asked']}, sha256 {found['sha256'][:16]}"
    )


def _line(result: dict) -> str:
    from medgpt.eval.report import percent, shown
    from medgpt.eval.report_section import number

    timing, base = result["timing"], result.get("baselines", {})
    score = shown(result["metrics"].get("accuracy"))
    if base:
        score += f" (chance {percent(base['chance'])}, majority {percent(base['majority'])})"
    if measured := result.get("measured"):
        shorts = [f"{s['metric']} {number(s)}" for s in measured["scores"] if s["metric"] in SHORT]
        score = ", ".join(shorts)
    return (
        f"{result['task']}: {score}, unparsed {result['unparsed']} of {result['n']}, cut "
        f"{result['cut']}; asked {timing['asked']}, known {timing['known']}, "
        f"{timing['seconds']:.0f} s, {timing['questions_per_second']:.2f} questions/s"
    )


def _report(args) -> None:
    from medgpt.eval.report import write_report

    for path in write_report(args.runs, args.out):
        print(path)


def _compare(args) -> None:
    from medgpt.eval.comparison import compare_runs, compared_markdown

    found = compare_runs(*args.runs, seed=args.seed)
    print(json.dumps(found, indent=1) if args.json else compared_markdown(found))


def _contamination(args) -> None:
    from medgpt.eval.contamination import check
    from medgpt.eval.tasks import get, load

    sources = _sources(args, args.tasks)
    found = {}
    for name in args.tasks:
        loaded = load(get(name), sources[name], images=args.images, drop_images=args.drop_images)
        run = Path(args.folder) / "records" / f"{name}.jsonl" if args.folder else None
        found[name] = check(loaded.questions, args.train, records=run, seed=args.seed)
        if not args.examples:
            found[name].pop("ids")
    print(json.dumps(found, indent=1))
