"""`medgpt eval metrics` and `medgpt eval annotate`."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

FAMILIES = ("text", "radgraph", "chexbert", "bertscore", "radcliq", "ratescore")
KINDS = ("radgraph", "chexbert", "bertscore", "ratescore_entities")


class Options(NamedTuple):
    """Arguments of `medgpt eval metrics` for who calls it from Python."""

    cache: str | None = None
    metrics: tuple[str, ...] | None = None
    annotator: tuple[str, ...] = ()
    casing: str = "lower"
    uncertain: str = "positive"
    cluster: str = "patient"
    slices: tuple[str, ...] = ()
    probes: str | None = None
    replicates: int = 1000
    level: float = 0.95
    seed: int = 0


def add_parsers(subparsers) -> None:
    """Adds both commands to the subparsers of `medgpt eval`."""
    metrics = subparsers.add_parser("metrics", help="metrics of generated radiology reports")
    metrics.set_defaults(run=run, report_command="metrics")
    _reports_argument(metrics)
    metrics.add_argument("--cache", help="annotation cache; without it, metrics of text alone")
    metrics.add_argument("--metrics", nargs="+", choices=FAMILIES, metavar="FAMILY")
    metrics.add_argument(
        "--annotator",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="where the cache has several; radcliq.KIND=NAME for RadCliQ's alone",
    )
    metrics.add_argument("--casing", default="lower", choices=("lower", "package"))
    metrics.add_argument("--uncertain", default="positive", choices=("positive", "negative"))
    metrics.add_argument("--cluster", default="patient", choices=("patient", "id"))
    metrics.add_argument("--slices", nargs="+", default=[], choices=("age", "sex", "site"))
    metrics.add_argument("--probes", choices=("image", "reference", "off"))
    metrics.add_argument("--replicates", type=int, default=1000)
    metrics.add_argument("--level", type=float, default=0.95)
    metrics.add_argument("--seed", type=int, default=0)
    metrics.add_argument("--json", help="file for the whole result")
    metrics.add_argument("--per-report", help="CSV file: ids and numbers, no text")

    fill = subparsers.add_parser("annotate", help="fill the annotation cache of reports")
    fill.set_defaults(run=run, report_command="annotate")
    _reports_argument(fill)
    fill.add_argument("--cache", required=True)
    fill.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    fill.add_argument("--model", help="of the one kind given, default its usual one")
    fill.add_argument("--name", help="annotator's name in the cache, default the model's")
    fill.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    fill.add_argument("--download", action="store_true", help="let packages fetch their weights")


def _reports_argument(parser) -> None:
    text = "a run's folder, or JSONL of {id, reference, generated, patient, age, sex, site, labels}"
    parser.add_argument("reports", help=text)


def run(args) -> None:
    """Runs one of the two; ends with status 1 where annotations could not be made."""
    {"metrics": run_metrics, "annotate": run_annotate}[args.report_command](args)


def run_annotate(args) -> None:
    from medgpt.eval.report_metrics.annotate import NotAvailable, annotate
    from medgpt.eval.report_metrics.reports import read_reports

    if (args.model or args.name) and len(args.kinds) != 1:
        raise ValueError(f"--model, --name: expected one of --kinds, got {len(args.kinds)}")
    files = report_files(args.reports)
    status = 0
    for path, kind in ((path, kind) for path in files for kind in args.kinds):
        reports = read_reports(path)
        options = {"model": args.model, "name": args.name, "device": args.device}
        try:
            done = annotate(reports, args.cache, kind, download=args.download, **options)
        except (NotAvailable, ImportError) as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        print(
            f"{kind}.{done['annotator']}: {done['had']} were there, {done['added']} added, "
            f"{done['failed']} failed"
        )
        status = max(status, int(done["failed"] > 0))
    if status:
        raise SystemExit(status)


def run_metrics(args) -> None:
    from medgpt.eval.files import write_json
    from medgpt.eval.report_metrics import table

    files = report_files(args.reports)
    if len(files) > 1 and (args.json or args.per_report):
        raise ValueError(f"--json, --per-report: expected one file of reports, got {len(files)}")
    for path in files:
        document, everything, reports = measure(path, args)
        if Path(args.reports).is_dir():
            print(f"## {path.stem}\n")
            write_json(Path(args.reports) / "metrics" / f"{path.stem}.json", document)
        print(table.markdown(document))
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1, allow_nan=False)
        if args.per_report:
            table.write_per_report(args.per_report, reports, everything)


def report_files(given) -> list[Path]:
    """The file itself, or those that a run wrote under its folder."""
    path = Path(given)
    if not path.is_dir():
        return [path]
    if not (files := sorted((path / "reports").glob("*.jsonl"))):
        raise ValueError(f"reports: expected a run with reports/*.jsonl, got none in {path.name}")
    return files


def measure(path, options) -> tuple:
    """(document, scores, reports) of a file of reports.

    Args:
        options: Options, or the command's arguments of the same names.
    """
    from medgpt.eval.report_metrics.evaluate import score_reports
    from medgpt.eval.report_metrics.reports import read_reports

    reports = read_reports(path)
    annotators = dict(_pair(text) for text in options.annotator)
    scores, absent = score_reports(
        reports, options.cache, options.metrics, annotators, options.casing, options.uncertain
    )
    document, everything = build(reports, scores, absent, options, annotators)
    return document, everything, reports


def build(reports, scores, absent, args, annotators) -> tuple[dict, list]:
    """The document of a run, and all of its scores."""
    from medgpt.eval.report_metrics import table
    from medgpt.eval.report_metrics.intervals import cluster_names, score_estimate
    from medgpt.eval.report_metrics.slices import slice_scores

    patients = reports.facts["patient"] if args.cluster == "patient" else reports.ids
    clusters = cluster_names(patients)
    options = {"replicates": args.replicates, "level": args.level, "seed": args.seed}
    probes, findings = _probes(reports, args, annotators)
    everything = [*scores, *probes]
    found = [score_estimate(score, clusters, **options) for score in everything]
    document = {
        "counts": table.counts(reports, clusters),
        **options,
        "cluster": args.cluster,
        "scores": table.score_entries(scores, found[: len(scores)]),
        "probes": table.score_entries(probes, found[len(scores) :]),
        "findings": findings,
        "absent": absent,
        "slices": [
            {
                "fact": fact,
                "rows": table.slice_rows(
                    slice_scores(reports, everything, clusters, fact, **options)
                ),
            }
            for fact in args.slices
        ],
    }
    return document, everything


def _probes(reports, args, annotators) -> tuple[list, dict]:
    """Hallucination and omission, where the cache has CheXbert labels and none said "off"."""
    from medgpt.eval.report_metrics.cache import annotators as names
    from medgpt.eval.report_metrics.evaluate import (
        MissingAnnotations,
        chexbert_labels,
        open_annotations,
    )
    from medgpt.eval.report_metrics.probes import by_finding, probe_scores

    wanted = args.probes
    if wanted == "off" or (wanted is None and not (args.cache and names(args.cache, "chexbert"))):
        return [], {}
    if args.cache is None:
        raise ValueError("--probes: expected --cache with CheXbert labels, got none")
    try:
        annotations = open_annotations(args.cache, "chexbert", annotators.get("chexbert"))
        reference, generated = chexbert_labels(reports, annotations)
    except MissingAnnotations:
        if wanted is None:
            return [], {}
        raise
    wanted = wanted or ("image" if reports.labelled.all() else "reference")
    if wanted == "image" and not reports.labelled.all():
        absent = int((~reports.labelled).sum())
        raise ValueError(f"--probes image: expected labels in every row, got none in {absent}")
    image = reports.labels if wanted == "image" else reference
    source = "the image's labels" if wanted == "image" else "CheXbert labels of the reference"
    return probe_scores(image, generated, source), by_finding(image, generated)


def _pair(text: str) -> tuple[str, str]:
    kind, equals, name = text.partition("=")
    if not equals or not kind or not name:
        raise ValueError(f"--annotator: expected KIND=NAME, got {text!r}")
    return kind, name
