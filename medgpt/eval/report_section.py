"""Report metrics in a report of runs: what `medgpt eval metrics` measured, beside the paper's."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from medgpt.eval.published import MIMIC_FINDINGS, MODELS

UNSTATED = "RadGraph-F1, variant unstated"
OWN_NAMES = {"RadGraph-F1": UNSTATED, "RaTEScore": "ratescore", "1/RadCliQ-v1": "1/radcliq_v1"}


def measured_of(folder: Path, task: str) -> dict | None:
    """RUN/metrics/TASK.json, as a run and `medgpt eval metrics RUN` write it."""
    path = folder / "metrics" / f"{task}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def published_metrics(row: Mapping) -> dict[str, dict[str, float]]:
    """{metric: {model: value}} of the paper for a task of reports."""
    if row["task"] == "mimic_cxr_findings":
        return {OWN_NAMES[name]: {MODELS[0]: value} for name, value in MIMIC_FINDINGS.items()}
    if row["published"] and not row["comparable"]:
        return {"ratescore": row["published"]}
    return {}


def number(found: Mapping | None) -> str:
    """An estimate of any scale as "0.412 [0.388, 0.437]"."""
    if not found or found["value"] is None:
        return "-"
    bounds = "" if found["low"] is None else f" [{found['low']:.3g}, {found['high']:.3g}]"
    return f"{found['value']:.3g}{bounds}"


def lines_of(row: Mapping) -> dict[str, dict[str, Mapping]]:
    """{metric: {run: line of its document}}, metrics and then probes, in their order."""
    found: dict[str, dict[str, Mapping]] = {}
    for run, result in row["runs"].items():
        document = result.get("measured") or {}
        for line in (*document.get("scores", ()), *document.get("probes", ())):
            found.setdefault(line["metric"], {})[run] = line
    return found


def section(row: Mapping, runs: Sequence[str]) -> tuple[list[str], list[list]] | None:
    """Header and rows: each metric, its better direction, runs, published figures."""
    theirs, own = published_metrics(row), lines_of(row)
    models = [m for m in MODELS if any(m in values for values in theirs.values())]
    if not own and not theirs:
        return None
    header = ["metric", "better", *runs, *(f"{m} (published)" for m in models)]
    rows = []
    for metric in [*own, *(m for m in theirs if m not in own)]:
        lines = own.get(metric, {})
        better = next((line["better"] for line in lines.values()), "higher")
        cells = [number(lines.get(run)) for run in runs]
        figures = (theirs.get(metric, {}).get(m) for m in models)
        cells += ["-" if value is None else f"{value:.3g}" for value in figures]
        rows.append([metric, better, *cells])
    return header, rows


def slice_table(row: Mapping) -> tuple[list[str], list[list]] | None:
    """Metrics by age, sex and site, where a run's document has slices."""
    header = ["run", "fact", "group", "metric", "value", "against the rest", "reports", "patients"]
    rows = []
    for run, result in row["runs"].items():
        for part in (result.get("measured") or {}).get("slices", ()):
            for line in part["rows"]:
                gap = {"value": line["gap"], "low": line["gap_low"], "high": line["gap_high"]}
                few = " (few)" if line["few"] else ""
                rows.append([run, part["fact"], line["group"], line["metric"], number(line)])
                rows[-1] += [number(gap), line["reports"], f"{line['clusters']}{few}"]
    return (header, rows) if rows else None


def absent_notes(row: Mapping) -> list[str]:
    """What a run lacks and how to get it, said once a run."""
    notes = []
    for run, result in row["runs"].items():
        absent = (result.get("measured") or {}).get("absent", {})
        if absent:
            notes.append(
                f"{run}: without {', '.join(absent)}, which need annotations: "
                "medgpt eval annotate RUN --cache CACHE, medgpt eval metrics RUN --cache CACHE"
            )
    return notes


def plot(row: Mapping) -> str:
    """Metrics from 0 to 1 with their intervals as SVG; published figures hollow."""
    lines, theirs = [], published_metrics(row)
    for metric, by_run in lines_of(row).items():
        if next(iter(by_run.values()))["range"] != [0.0, 1.0]:
            continue
        lines += [(f"{metric}, {run}", line, True) for run, line in by_run.items()]
        for model, value in theirs.get(metric, {}).items():
            lines.append((f"{metric}, {model}, published", {"value": value, "low": None}, False))
    lines = [line for line in lines if line[1]["value"] is not None]
    return drawn(lines, [f"{t / 5:.1f}" for t in range(6)], number) if lines else ""


def drawn(lines: Sequence, ticks: Sequence[str], words, marks: Sequence[tuple] = ()) -> str:
    """SVG of (label, estimate, measured here) lines over 0 to 1.

    Args:
        ticks: texts at equal distances from 0 to 1.
        words: estimate -> text of its tooltip.
        marks: (value, text) of dashed vertical lines.
    """
    left, width, step = 330, 520, 24
    height = step * len(lines) + 34

    def x(value: float) -> float:
        return round(left + width * min(max(value, 0.0), 1.0), 1)

    def upright(value: float, style: str, inside: str = "") -> str:
        at = x(value)
        return f'<line x1="{at}" y1="4" x2="{at}" y2="{height - 26}" {style}>{inside}</line>'

    parts = []
    for index, text in enumerate(ticks):
        value = index / (len(ticks) - 1)
        parts.append(upright(value, 'stroke="#e4e4e4"'))
        parts.append(f'<text x="{x(value)}" y="{height - 8}" text-anchor="middle">{text}</text>')
    for value, text in marks:
        style = 'stroke="#b33" stroke-dasharray="4 3"'
        parts.append(upright(value, style, f"<title>{html.escape(text)}</title>"))
    for index, (name, found, own) in enumerate(lines):
        y, colour = step * index + 18, "#1f5fa8" if own else "#777"
        label = html.escape(name if len(name) <= 46 else name[:45] + "…")
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{label}</text>')
        if found.get("low") is not None:
            parts.append(
                f'<line x1="{x(found["low"])}" y1="{y}" x2="{x(found["high"])}" y2="{y}" '
                f'stroke="{colour}" stroke-width="2"/>'
            )
        title = html.escape(f"{name}: {words({'low': None, **found})}")
        parts.append(
            f'<circle cx="{x(found["value"])}" cy="{y}" r="4.5" fill="{colour if own else "#fff"}" '
            f'stroke="{colour}"><title>{title}</title></circle>'
        )
    return (
        f'<svg viewBox="0 0 {left + width + 40} {height}" width="{left + width + 40}" role="img" '
        f'font-size="12" font-family="system-ui,sans-serif">{"".join(parts)}</svg>'
    )
