"""Runs side by side, with the paper's figures beside them: JSON, Markdown, and HTML with SVG."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from medgpt.eval.published import MIMIC_FINDINGS, MODELS, NOT_ACCURACY, SOURCE, published
from medgpt.eval.statistics import compare, holm

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
    out = [f"# Evaluation\n\n{NOTICE} Published: {SOURCE}.\n\n", table(*headline(found))]
    for row in found["tasks"]:
        out.append(f"\n## {row['title']}\n\n")
        if row["note"]:
            out.append(f"Note: {row['note']}.\n\n")
        if row["published"] and not row["comparable"]:
            out.append(f"Published as {row['published_as']}: no accuracy.\n\n")
        if row["task"] == "mimic_cxr_findings":
            text = ", ".join(f"{k} {v}" for k, v in MIMIC_FINDINGS.items())
            out.append(f"Published: {text}.\n\n")
        out.append(table(DETAIL, detail(row)))
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
    body.append(_html_table(*headline(found)))
    for row in found["tasks"]:
        body.append(f"<h2>{esc(row['title'])}</h2>")
        if row["note"]:
            body.append(f"<p>Note: {esc(row['note'])}.</p>")
        body.append(plot(row))
        body.append(_html_table(DETAIL, detail(row)))
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
    left, width, step = 330, 520, 24
    height = step * len(lines) + 34

    def x(value: float) -> float:
        return round(left + width * value, 1)

    parts = []
    for tick in range(0, 101, 20):
        at = x(tick / 100)
        parts.append(f'<line x1="{at}" y1="4" x2="{at}" y2="{height - 26}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at}" y="{height - 8}" text-anchor="middle">{tick} %</text>')
    bases = {r["baselines"]["chance"] for r in row["runs"].values() if r.get("baselines")}
    for chance in bases - {None}:
        at = x(chance)
        parts.append(
            f'<line x1="{at}" y1="4" x2="{at}" y2="{height - 26}" stroke="#b33" '
            'stroke-dasharray="4 3"><title>chance</title></line>'
        )
    for index, (name, found, own) in enumerate(lines):
        y, colour = step * index + 18, "#1f5fa8" if own else "#777"
        label = html.escape(name if len(name) <= 46 else name[:45] + "…")
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{label}</text>')
        if found.get("low") is not None:
            parts.append(
                f'<line x1="{x(found["low"])}" y1="{y}" x2="{x(found["high"])}" y2="{y}" '
                f'stroke="{colour}" stroke-width="2"/>'
            )
        fill = colour if own else "#fff"
        title = html.escape(f"{name}: {shown({'low': None, **found})}")
        parts.append(
            f'<circle cx="{x(found["value"])}" cy="{y}" r="4.5" fill="{fill}" stroke="{colour}">'
            f"<title>{title}</title></circle>"
        )
    return (
        f'<svg viewBox="0 0 {left + width + 40} {height}" width="{left + width + 40}" role="img" '
        f'font-size="12" font-family="system-ui,sans-serif">{"".join(parts)}</svg>'
    )


def compare_runs(a: str | Path, b: str | Path, *, seed: int = 0) -> dict:
    """A less B on the questions of the tasks that both ran, with p values adjusted over tasks.

    Raises:
        ValueError: no common task, or one whose rows differ.
    """
    first, second = read_run(a), read_run(b)
    names = sorted(set(first["tasks"]) & set(second["tasks"]))
    names = [n for n in names if first["tasks"][n]["metrics"].get("accuracy")]
    if not names:
        raise ValueError("compare: expected a task that both runs have, got none")
    rows = []
    for name in names:
        one, two = first["tasks"][name], second["tasks"][name]
        if one["loaded"]["sha256"] != two["loaded"]["sha256"]:
            raise ValueError(f"compare: expected the same rows of {name}, got others")
        left, right = (_records(run["folder"], name) for run in (first, second))
        shared = [key for key in left if key in right]
        found = compare(
            [left[k]["score"] for k in shared],
            [right[k]["score"] for k in shared],
            [left[k]["cluster"] for k in shared],
            seed=seed,
        )
        rows.append(
            {
                "task": name,
                "questions": len(shared),
                "same_prompt": one["prompt"] == two["prompt"],
                **found._asdict(),
                "difference": found.difference._asdict(),
            }
        )
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return {"a": first["name"], "b": second["name"], "tasks": rows}


def _records(folder: Path, task: str) -> dict[str, dict]:
    lines = (folder / "records" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {r["id"]: r for r in records if r["score"] is not None}


def compared_markdown(found: dict) -> str:
    header = ["task", "n", "A - B", "p", "p, Holm", "McNemar exact", "only A", "only B", "prompt"]
    rows = [
        [
            row["task"],
            row["questions"],
            shown(row["difference"]),
            f"{row['p']:.4f}",
            f"{row['p_holm']:.4f}",
            "-" if row["p_mcnemar"] is None else f"{row['p_mcnemar']:.4f}",
            row["a_only"],
            row["b_only"],
            "same" if row["same_prompt"] else "differs",
        ]
        for row in found["tasks"]
    ]
    return f"A: {found['a']}\nB: {found['b']}\n\n{table(header, rows)}"
