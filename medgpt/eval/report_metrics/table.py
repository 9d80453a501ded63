"""What scores become: a JSON document, Markdown, and a table of one line a report."""

import csv
import math

import numpy as np

from medgpt.eval.report_metrics.radcliq import inverse, inverse_interval
from medgpt.eval.report_metrics.reports import Reports
from medgpt.eval.statistics import Estimate

INVERSE_VARIANT = "1 / mean(y) of radcliq_v1; no interval where that of y holds 0"


def entry(name, variant, better, bounds, found: Estimate) -> dict:
    """One line of the document; null where a number is not finite."""
    return {
        "metric": name,
        "value": _finite(found.value),
        "se": _finite(found.se),
        "low": _finite(found.low),
        "high": _finite(found.high),
        "reports": found.n,
        "clusters": found.clusters,
        "better": better,
        "range": [_finite(bound) for bound in bounds],
        "variant": variant,
    }


def _finite(number):
    return float(number) if math.isfinite(number) else None


def score_entries(scores, estimates) -> list[dict]:
    """Of each score, with 1/RadCliQ-v1 behind RadCliQ-v1."""
    lines = []
    for score, found in zip(scores, estimates, strict=True):
        lines.append(entry(score.name, score.variant, score.better, score.range, found))
        if score.name == "radcliq_v1":
            low, high = inverse_interval(found.low, found.high)
            value = inverse(found.value)
            turned = found._replace(value=value, se=math.nan, low=low, high=high)
            better = "higher" if found.value > 0 else "not ordered"
            bounds = (-math.inf, math.inf)
            lines.append(entry("1/radcliq_v1", INVERSE_VARIANT, better, bounds, turned))
    return lines


def counts(reports: Reports, clusters) -> dict:
    return {
        "reports": len(reports.ids),
        "clusters": len(np.unique(clusters)),
        "missing": int(reports.missing.sum()),
        "blank": int(reports.blank.sum()),
    }


def markdown(document: dict) -> str:
    """The document for people. It holds counts and names, no text of a report."""
    count = document["counts"]
    lines = [
        f"{count['reports']} reports of {count['clusters']} clusters; {count['missing']} missing "
        f"and {count['blank']} blank generations scored as empty reports",
        "",
        f"| metric | value | {document['level']:.0%} interval | better | range | variant |",
        "|---|---|---|---|---|---|",
    ]
    for line in document["scores"] + document.get("probes", []):
        bounds = " to ".join(_show(bound, "unbounded") for bound in line["range"])
        lines.append(
            f"| {line['metric']} | {_show(line['value'])} | {_span(line)} | {line['better']} "
            f"| {bounds} | {line['variant']} |"
        )
    for family, why in document["absent"].items():
        lines += ["", f"Not computed: {family}: {why}"]
    for part in document.get("slices", []):
        lines += ["", *_slice_table(part)]
    return "\n".join(lines)


def _slice_table(part: dict) -> list[str]:
    lines = [
        f"| {part['fact']} | metric | value | interval | against the rest | interval | reports "
        "| clusters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        mark = " (few)" if row["few"] else ""
        lines.append(
            f"| {row['group']} | {row['metric']} | {_show(row['value'])} | {_span(row)} "
            f"| {_show(row['gap'])} | {_span({'low': row['gap_low'], 'high': row['gap_high']})} "
            f"| {row['reports']} | {row['clusters']}{mark} |"
        )
    return lines


def _show(number, absent="none") -> str:
    return absent if number is None else f"{number:.4g}"


def _span(line) -> str:
    if line["low"] is None:
        return "none"
    return f"{_show(line['low'])} to {_show(line['high'])}"


def slice_rows(slices) -> list[dict]:
    return [
        {
            "group": part.group,
            "metric": part.score,
            **{name: _finite(getattr(part.estimate, name)) for name in ("value", "low", "high")},
            "gap": _finite(part.gap.value),
            "gap_low": _finite(part.gap.low),
            "gap_high": _finite(part.gap.high),
            "reports": part.estimate.n,
            "clusters": part.estimate.clusters,
            "few": part.few,
        }
        for part in slices
    ]


def report_columns(reports: Reports, scores) -> dict:
    """{column: [N]}: ids, whether there was text, and the parts of every score, each once."""
    status = np.where(reports.missing, "missing", np.where(reports.blank, "blank", "text"))
    columns = {"id": reports.ids, "generation": status.tolist()}
    for score in scores:
        for at, name in enumerate(score.columns):
            columns.setdefault(name, score.parts[:, at].tolist())
    return columns


def write_per_report(path, reports: Reports, scores) -> None:
    """CSV of report_columns, with ids and numbers alone."""
    columns = report_columns(reports, scores)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
