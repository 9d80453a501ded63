"""`medgpt curate CONFIG`."""

import argparse

ABOUT = "Reads a YAML or TOML file (docs/medgpt_data.md), writes rows as parquet and a report."


def add_parsers(subparsers) -> None:
    """Adds `curate`."""
    parser = subparsers.add_parser("curate", help="rows to train on, cleaned", description=ABOUT)
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


def run(args: argparse.Namespace) -> None:
    """Curates, and prints what became of the rows; ValueError for what the user can put right."""
    from .config import read_config
    from .curate import curate, remove_work

    config = read_config(args.config)
    if args.examples is not None:
        config.examples = args.examples
    report = curate(config, workers=args.workers, progress=not args.no_progress)
    if args.remove_work:
        remove_work(config.output)
    print(f"{report['in']} rows in, {report['kept']} kept, {config.output}/report.html")
    for reason, count in report["dropped"].items():
        print(f"{count:>10} {reason}")
