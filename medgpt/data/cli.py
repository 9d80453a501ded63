"""`medgpt curate CONFIG`."""

import argparse
import sys

FLAGS = "Reads a YAML or TOML file (docs/data.md) and writes rows as parquet, and a report."


def add_parsers(subparsers) -> None:
    """Adds `curate`."""
    parser = subparsers.add_parser("curate", help="rows to train on, cleaned", description=FLAGS)
    parser.add_argument("config", help="a .yaml or .toml file")
    parser.add_argument("--workers", type=int, default=1, help="processes; the output is the same")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    parser.add_argument(
        "--examples", type=int, help="show so many dropped texts a reason: texts of patients"
    )
    parser.add_argument(
        "--remove-work", action="store_true", help="remove the chunks once all is written"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .config import read_config
    from .curate import curate, remove_work

    try:
        config = read_config(args.config)
        if args.examples is not None:
            config.examples = args.examples
        report = curate(config, workers=args.workers, progress=not args.no_progress)
    except ValueError as error:
        print(f"medgpt: {error}", file=sys.stderr)
        return 2
    if args.remove_work:
        remove_work(config.output)
    print(f"{report['in']} rows in, {report['kept']} kept, {config.output}/report.html")
    for reason, count in report["dropped"].items():
        print(f"  {count:>8} {reason}")
    return 0
