"""Compare two saved runs: python benchmarks/compare.py OLD.json NEW.json [--tolerance 0.15]

What is compared is each of our backends' time as a multiple of its own run's baseline, so the two
runs may come from different days and from machines of a kind. Exit status 1 on a regression: a
multiple grown by more than the tolerance, a contender refused, or one that is gone.
"""

import argparse
import json
import sys
from pathlib import Path


def multiples(run: dict) -> dict[tuple[str, str], float]:
    """{(group, backend): our median over the baseline's}; lower is better."""
    found = {}
    for name, group in run["groups"].items():
        baseline = group["contenders"].get(group["baseline"])
        for contender, row in group["contenders"].items():
            if row["kind"] == "ours" and baseline:
                found[name, contender] = row["median_ms"] / baseline["median_ms"]
    return found


def is_noisy(run: dict, name: str, contender: str, tolerance: float) -> bool:
    """Whether ours or the baseline spread by more than the tolerance between its quartiles."""
    group = run["groups"][name]
    rows = (group["contenders"][n] for n in (contender, group["baseline"]))
    return any(row["q3_ms"] - row["q1_ms"] > tolerance * row["median_ms"] for row in rows)


def compare(old: dict, new: dict, tolerance: float) -> tuple[list[str], list[str]]:
    """Returns (a line for every comparison, the regressions among them).

    Raises:
        ValueError: the runs are of different device types or lengths, or nothing is in both.
    """
    for key, what in (("device", "devices"), ("short", "short and full runs")):
        if old[key] != new[key]:
            raise ValueError(f"cannot compare {what}: {key} is {old[key]} and {new[key]}")
    before, after = multiples(old), multiples(new)
    if not before:
        raise ValueError("the old run times none of our backends against its baseline")
    lines, regressions = [], []
    for key in sorted(before):
        label = " / ".join(key)
        if key not in after:
            why = new["groups"].get(key[0], {}).get("refused", {}).get(key[1], "not timed")
            line = f"{label}: gone ({why})"
            regressions.append(line)
        else:
            change = after[key] / before[key] - 1
            line = f"{label}: {before[key]:.3f} -> {after[key]:.3f} of the baseline ({change:+.0%})"
            if is_noisy(old, *key, tolerance) or is_noisy(new, *key, tolerance):
                line += ", noisy: measure again on a quiet machine"
            if change > tolerance:
                regressions.append(line)
        lines.append(line)
    return lines, regressions


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15, help="0.15 = 15 %% slower")
    options = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    try:
        lines, regressions = compare(old, new, options.tolerance)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"old: {old['machine']}, {old['date']}; new: {new['machine']}, {new['date']}")
    print("\n".join(lines))
    if regressions:
        print(f"\n{len(regressions)} regressed by more than {options.tolerance:.0%}:")
        print("\n".join(f"  {line}" for line in regressions))
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
