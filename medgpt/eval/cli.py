"""medgpt eval: benchmarks on a model, reports of runs, two runs compared, contamination."""

import argparse
import json
import os
import sys
from pathlib import Path

EXAMPLES = """examples:
  medgpt eval tasks
  medgpt eval medqa pubmedqa --model medgpt:DIR --data medqa=medqa.jsonl --data pubmedqa=DIR --out A
  medgpt eval medqa --model openai/gpt-4o-mini --data hub --out B
  medgpt eval report A B --out report
  medgpt eval compare A B
  medgpt eval contamination medqa --data medqa.jsonl --train train.jsonl --run A
"""


def add_parsers(subparsers) -> None:
    """The subcommand `eval`."""
    sub = subparsers.add_parser(
        "eval",
        help="benchmarks with honest statistics",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = sub.add_argument
    add(
        "what", nargs="+", help="tasks; or tasks | report RUN... | compare A B | contamination TASK"
    )
    add("--out", metavar="DIR", help="of the run, or of the report; a run there is gone on with")
    asked = sub.add_argument_group("asking")
    add = asked.add_argument
    add("--model", help="medgpt:DIR, transformers:DIR or any name that inspect_ai knows")
    add("--data", action="append", default=[], metavar="[TASK=]PATH", help="file, folder or hub")
    add("--images", metavar="DIR", help="that image paths are relative to; default the data's")
    add("--drop-images", action="store_true", help="ask without them; the report says so")
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
    other = sub.add_argument_group("contamination")
    other.add_argument("--train", metavar="PATH", help="rows that were trained on, .jsonl")
    other.add_argument(
        "--run", metavar="DIR", dest="folder", help="a run, for clean and dirty accuracy"
    )
    other.add_argument("--examples", action="store_true", help="list ids of contaminated rows")
    sub.add_argument("--json", action="store_true", help="compare, tasks, contamination: as JSON")
    sub.set_defaults(run=run)


def run(args) -> None:
    commands = {"report": _report, "compare": _compare, "contamination": _contamination}
    if args.what == ["tasks"]:
        _tasks(args)
    else:
        commands.get(args.what[0], _ask)(args)


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


def _ask(args) -> None:
    from medgpt.eval import runner
    from medgpt.eval.plan import plan
    from medgpt.eval.tasks import get

    chosen = [get(name) for name in args.what]
    if not args.model or not args.out:
        raise ValueError("eval: expected --model and --out, got none")
    sources = _sources(args, args.what)
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
    options = dict(value.split("=", 1) for value in args.model_arg)
    model, identity = runner.open_model(args.model, **options)
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
    from medgpt.eval.report import shown

    score = shown(result["metrics"].get("accuracy"))
    timing = result["timing"]
    return (
        f"{result['task']}: {score}, unparsed {result['unparsed']} of {result['n']}, cut "
        f"{result['cut']}; asked {timing['asked']}, known {timing['known']}, "
        f"{timing['seconds']:.0f} s, {timing['questions_per_second']:.2f} questions/s"
    )


def _report(args) -> None:
    from medgpt.eval.report import write_report

    if not args.out or len(args.what) < 2:
        raise ValueError("eval report: expected runs and --out, got none")
    for path in write_report(args.what[1:], args.out):
        print(path)


def _compare(args) -> None:
    from medgpt.eval.report import compare_runs, compared_markdown

    if len(args.what) != 3:
        raise ValueError(f"eval compare: expected two runs, got {len(args.what) - 1}")
    found = compare_runs(args.what[1], args.what[2], seed=args.seed)
    print(json.dumps(found, indent=1) if args.json else compared_markdown(found))


def _contamination(args) -> None:
    from medgpt.eval.contamination import check
    from medgpt.eval.tasks import get, load

    names = args.what[1:]
    if not names or not args.train:
        raise ValueError("eval contamination: expected tasks and --train, got none")
    sources = _sources(args, names)
    found = {}
    for name in names:
        loaded = load(get(name), sources[name], images=args.images, drop_images=args.drop_images)
        run = Path(args.folder) / "records" / f"{name}.jsonl" if args.folder else None
        found[name] = check(loaded.questions, args.train, records=run, seed=args.seed)
        if not args.examples:
            found[name].pop("ids")
    print(json.dumps(found, indent=1))
