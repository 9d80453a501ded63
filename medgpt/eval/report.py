"""Runs side by side, with the paper's figures beside them: JSON, Markdown, and HTML with SVG."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from medgpt.eval.published import MODELS, NOT_ACCURACY, SOURCE, published
from medgpt.eval.report_section import (
    absent_notes,
    drawn,
    measured_of,
    section,
    slice_table,
)
from medgpt.eval.report_section import plot as plot_metrics

NOTICE = (
    "Intervals are 95 %, BCa over clusters (image, patient, case). Unparsed answers are wrong. "
    "Cut ones reached the limit of tokens. Published figures were not measured here."
)


def read_run(folder: str | Path) -> dict:
    """{name, folder, tasks: {task: result}} of a run."""
    folder = Path(folder)
    found = {}
    for path in sorted((folder / "tasks").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if measured := measured_of(folder, result["task"]):
            result["measured"] = measured
        found[result["task"]] = result
    if not found:
        raise ValueError(f"report: expected a run, got {folder.name} without results")
    model = next(iter(found.values()))["model"]["model"]
    return {"name": f"{folder.name} ({model})", "folder": folder, "tasks": found}


def shown(found: Mapping | None) -> str:
    """An estimate as "71.5 [68.2, 74.9]", in percent."""
    if not found or found["value"] is None:
        return "-"
    bounds = ""
    if found["low"] is not None:
        bounds = f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    return f"{100 * found['value']:.1f}{bounds}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def collect(runs: Sequence[str | Path]) -> dict:
    """What a report shows, for machines."""
    read = [read_run(folder) for folder in runs]
    names = sorted({task for run in read for task in run["tasks"]})
    rows = []
    for name in names:
        first = next(run["tasks"][name] for run in read if name in run["tasks"])
        rows.append(
            {
                "task": name,
                "title": first["title"],
                "note": first["note"],
                "published": published(first["published"]),
                "published_as": first["published"],
                "comparable": first["published"] not in NOT_ACCURACY,
                "runs": {r["name"]: r["tasks"][name] for r in read if name in r["tasks"]},
            }
        )
    return {"source": SOURCE, "runs": [run["name"] for run in read], "tasks": rows}


def write_report(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """OUT/report.json, report.md and report.html."""
    found, out = collect(runs), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(found),
        "report.html": page(found),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Of Markdown; nothing in a cell can end it."""

    def line(cells) -> str:
        texts = (str(c).replace("|", "\\|").replace("\n", " ") for c in cells)
        return "| " + " | ".join(texts) + " |\n"

    return line(header) + "|" + "---|" * len(header) + "\n" + "".join(line(r) for r in rows)


def headline(found: dict) -> tuple[list[str], list[list[str]]]:
    header = ["task", *found["runs"], *(f"{m} (published)" for m in MODELS)]
    rows = []
    for row in found["tasks"]:
        if not row["comparable"] or not any(_accuracy(row, name) for name in found["runs"]):
            continue
        own = [shown(_accuracy(row, name)) for name in found["runs"]]
        theirs = [percent(row["published"].get(m)) for m in MODELS]
        rows.append([row["title"], *own, *theirs])
    return header, rows


def _accuracy(row: dict, run: str) -> Mapping | None:
    return row["runs"].get(run, {}).get("metrics", {}).get("accuracy")


DETAIL = (
    "run",
    "asked of published n",
    "clusters",
    "se",
    "unparsed",
    "cut",
    "chance",
    "majority",
    "position bias",
    "other metrics",
    "prompt",
    "data sha256",
)


def detail(row: dict) -> list[list[str]]:
    """What stands beside every accuracy, a line a run."""
    lines = []
    for name, result in row["runs"].items():
        metrics, base = result["metrics"], result.get("baselines", {})
        own = metrics.get("accuracy") or {}
        others = ", ".join(f"{k} {shown(v)}" for k, v in metrics.items() if k != "accuracy")
        reasons = ", ".join(f"{k} {v}" for k, v in result["unparsed_reasons"].items())
        prompt, loaded = result["prompt"], result["loaded"]
        dropped = ", images dropped" if loaded["images_dropped"] else ""
        lines.append(
            [
                name,
                f"{result['n']} of {loaded['expected'] or '?'}{dropped}",
                own.get("clusters", "-"),
                percent(own.get("se")),
                f"{result['unparsed']}{f' ({reasons})' if reasons else ''}",
                result["cut"],
                percent(base.get("chance")),
                f"{percent(base.get('majority'))} ({base.get('majority_answer')})",
                percent(base.get("position_bias")),
                others or "-",
                f"{prompt['name']} v{prompt['version']} {prompt['hash']}, {prompt['shots']}-shot",
                loaded["sha256"][:16],
            ]
        )
    return lines


def subgroup_rows(row: dict, runs: Sequence[str]) -> list[list[str]]:
    keys = sorted(
        {
            (field, value)
            for result in row["runs"].values()
            for field, values in result.get("subgroups", {}).items()
            for value in values
        }
    )
    rows = []
    for field, value in keys:
        cells = [
            row["runs"].get(r, {}).get("subgroups", {}).get(field, {}).get(value) for r in runs
        ]
        n = next((cell["n"] for cell in cells if cell), 0)
        rows.append([field, value, n, *(shown(cell) for cell in cells)])
    return rows


def markdown(found: dict) -> str:
    out = [f"# Evaluation\n\n{NOTICE} Published: {SOURCE}.\n\n"]
    if headline(found)[1]:
        out.append(table(*headline(found)))
    for row in found["tasks"]:
        out.append(f"\n## {row['title']}\n\n")
        if row["note"]:
            out.append(f"Note: {row['note']}.\n\n")
        if row["published"] and not row["comparable"]:
            out.append(f"Published as {row['published_as']}: no accuracy.\n\n")
        out.append(table(DETAIL, detail(row)))
        for part in (section(row, found["runs"]), slice_table(row)):
            if part:
                out.append("\n" + table(*part))
        out += [f"\n{note}\n" for note in absent_notes(row)]
        if groups := subgroup_rows(row, found["runs"]):
            out.append("\n" + table(["field", "value", "n", *found["runs"]], groups))
    return "".join(out)


CSS = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;"
    "color:#1a1a1a;background:#fff}table{border-collapse:collapse;margin:.7rem 0;display:block;"
    "overflow-x:auto}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left;"
    "font-variant-numeric:tabular-nums;vertical-align:top}th{font-weight:600}"
    ".published{color:#777}svg{max-width:100%;height:auto}"
)


def page(found: dict) -> str:
    """One file with nothing to fetch."""
    esc = html.escape
    body = [f"<h1>Evaluation</h1><p>{esc(NOTICE)} Published: {esc(SOURCE)}.</p>"]
    if headline(found)[1]:
        body.append(_html_table(*headline(found)))
    for row in found["tasks"]:
        body.append(f"<h2>{esc(row['title'])}</h2>")
        if row["note"]:
            body.append(f"<p>Note: {esc(row['note'])}.</p>")
        body.append(plot(row))
        body.append(_html_table(DETAIL, detail(row)))
        body.append(plot_metrics(row))
        if part := section(row, found["runs"]):
            body.append(_html_table(*part))
        if part := slice_table(row):
            body.append(f"<details><summary>by age, sex, site</summary>{_html_table(*part)}")
            body.append("</details>")
        body += [f"<p>{esc(note)}</p>" for note in absent_notes(row)]
        if groups := subgroup_rows(row, found["runs"]):
            header = ["field", "value", "n", *found["runs"]]
            body.append(f"<details><summary>by subgroup</summary>{_html_table(header, groups)}")
            body.append("</details>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>'
        f"<style>{CSS}</style>{''.join(body)}</html>\n"
    )


def _html_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    def cell(kind: str, name: str, value) -> str:
        mark = ' class="published"' if "(published)" in name else ""
        return f"<{kind}{mark}>{html.escape(str(value))}</{kind}>"

    top = "".join(cell("th", name, name) for name in header)
    lines = (
        "".join(cell("td", name, v) for name, v in zip(header, row, strict=True)) for row in rows
    )
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def plot(row: dict) -> str:
    """Each run's accuracy and interval, chance as a dashed line, published figures hollow."""
    lines = [
        (name, result["metrics"]["accuracy"], True)
        for name, result in row["runs"].items()
        if result["metrics"].get("accuracy")
    ]
    if row["comparable"]:
        lines += [(f"{m}, published", {"value": v}, False) for m, v in row["published"].items()]
    if not lines:
        return ""
    bases = {r["baselines"]["chance"] for r in row["runs"].values() if r.get("baselines")}
    ticks = [f"{tick} %" for tick in range(0, 101, 20)]
    return drawn(lines, ticks, shown, [(chance, "chance") for chance in bases - {None}])
