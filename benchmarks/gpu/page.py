"""The report as one Markdown page: tables of the parts, of the whole model, of each op."""

COLUMNS = (
    "case", "contender", "ms", "q1 - q3", "TFLOP/s", "GB/s", "% of roof", "x best peer",
    "peak MB", "graph ms", "host ms",
)  # fmt: skip
DRY = "**Dry run on the CPU. Nothing here was measured, and there are no times.**"


def _number(row: dict, key: str, scale: float = 1.0, form: str = "{:.1f}") -> str:
    return form.format(row[key] * scale) if row.get(key) is not None else ""


def _cells(case: str, name: str, row: dict, group: dict) -> list[str]:
    label = f"**{name}**" if row["kind"] == "ours" else name
    if row["kind"] == "bound":
        label += " (does less)"
    if "median_ms" not in row:
        text = row.get("skipped") or row.get("failed") or "ran"
        prefix = "failed: " if "failed" in row else "not here: " if "skipped" in row else ""
        return [case, label, prefix + text.replace("|", "/"), *[""] * (len(COLUMNS) - 3)]
    ratio = "" if name == group.get("strongest_peer") else _number(row, "vs_peer", form="{:.2f}")
    return [
        case,
        label,
        _number(row, "median_ms", form="{:.4g}"),
        f"{row['q1_ms']:.4g} - {row['q3_ms']:.4g}",
        _number(row, "gflops", 1e-3),
        _number(row, "gbs", form="{:.0f}"),
        _number(row, "percent_of_roof", form="{:.0f}"),
        ratio,
        _number(row, "peak_bytes", 1e-6, "{:.0f}"),
        _number(row, "graph_ms", form="{:.4g}"),
        _number(row, "host_ms", form="{:.4g}"),
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|--:" * (len(head) - 2) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _comparisons(parts: dict) -> list[str]:
    lines = []
    for name, part in parts.items():
        groups = [f for f in part["findings"] if "tokens" in f]
        rows = []
        for group in groups:
            timed = sorted(
                group["contenders"].items(), key=lambda item: item[1].get("median_ms", 1e30)
            )
            for n, (contender, row) in enumerate(timed):
                rows.append(_cells("" if n else group["name"], contender, row, group))
        if rows:
            lines += [f"## {name}", "", *_table(COLUMNS, rows)]
    return lines


MODEL = (
    ("median_ms", "ms", 1.0, "{:.1f}"),
    ("tokens_per_second", "tokens/s", 1.0, "{:.0f}"),
    ("prefill_tokens_per_second", "prefill tokens/s", 1.0, "{:.0f}"),
    ("decode_tokens_per_second", "decode tokens/s", 1.0, "{:.1f}"),
    ("peak_gb", "peak GB", 1.0, "{:.1f}"),
)


def _model(parts: dict) -> list[str]:
    rows = []
    for name in ("train", "generate"):
        for finding in parts.get(name, {}).get("findings", []):
            for row in finding["contenders"].values():
                note = row.get("failed", "ran" if "median_ms" not in row else "")
                cells = [_number(row, key, scale, form) for key, _, scale, form in MODEL]
                rows.append([finding["name"], note.replace("|", "/"), *cells])
    head = ("case", "note", *(title for _, title, *_ in MODEL))
    return ["## The whole model, gpt-oss-20b's shape", "", *_table(head, rows)] if rows else []


def _checks(parts: dict, missing: dict[str, str]) -> list[str]:
    rows = []
    for name, part in parts.items():
        state = "failed" if part["failures"] else "done" if part["complete"] else "stopped early"
        texts = [f["text"] for f in part["findings"] if f.get("text")]
        text = "; ".join(part["failures"] + texts).replace("\n", " ").replace("|", "/")
        rows.append([name, state, f"{part['seconds']:.0f}", part["commit"], text[:400]])
    rows += [[name, "not run", "", "", why] for name, why in missing.items()]
    return _table(("part", "state", "s", "commit", "what it says"), rows)


def page(record: dict, missing: dict[str, str]) -> str:
    """Markdown of a card's JSON; `missing` are parts that were left out, and why."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"# {record['card']}", ""]
    if record["dry_run"]:
        lines += [DRY, ""]
    else:
        lines += [
            f"Compute capability {record['capability']}, {record['memory_gb']} GB, L2 "
            f"{record['l2_mb']:.0f} MB, driver {record['driver']}, CUDA {record['cuda']}; "
            f"{versions}.",
            "",
        ]
    lines += [
        "Medians with quartiles of calls with a cold L2, in turn; the time is the card's own.",
        "`host ms` is what Python keeps up with, `graph ms` the same call in a CUDA graph.",
        "`% of roof` is of the measured copy or bf16 product rate, whichever bounds the op's least",
        "work; `x best peer` above 1 is faster than the fastest contender that does the whole work",
        "and is not ours.",
        "",
        *_checks(record["parts"], missing),
        *_model(record["parts"]),
        *_comparisons(record["parts"]),
    ]
    return "\n".join(lines).rstrip() + "\n"
