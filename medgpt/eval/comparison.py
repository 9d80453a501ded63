"""Two runs on the same questions: paired differences with their p values."""

import json
from pathlib import Path

from medgpt.eval.report import read_run, shown, table
from medgpt.eval.statistics import compare, holm


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
