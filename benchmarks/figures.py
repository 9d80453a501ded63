"""What of the result files is drawn, and who is who in them.

A figure comes from one file: the newest full run of its machine that has the figure's cases.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import svg

OURS = {"cpu": "ours, C++", "triton": "ours, Triton", "cuda": "ours, CUDA C++"}
# name in the files: (name in the figures, what it is)
OTHERS = {
    "reference": ("reference, eager", "this package's reference in eager PyTorch"),
    "sdpa": ("SDPA, no sinks", "torch's attention without sinks or window: less work, a bound"),
    "lse": ("SDPA + lse", "torch's attention made exact by its logsumexp"),
    "lse_chunk": ("SDPA + lse, blocks", "the same in blocks of a window"),
    "lse_documents": ("SDPA + lse, each", "the same over packed documents one by one"),
    "flex": ("FlexAttention", "compiled FlexAttention with the sink as one more key"),
    "compile": ("torch.compile", "torch.compile of the reference"),
    "transformers": ("transformers", "transformers' own module or function"),
    "transformers_compile": ("compiled transformers", "the same under torch.compile"),
    "eager": ("transformers, eager", "transformers' experts, a loop, on dense weights"),
    "grouped_mm": ("transformers, grouped", "transformers' grouped_mm, on dense weights"),
    "linear_out_in": ("F.linear each", "one bf16 F.linear an expert on turned weights"),
    "hf": ("transformers", "transformers' SigLIP2 processor and embeddings"),
    "hf_embed": ("SigLIP2 embeddings", "the embeddings alone, from normalised patches: a bound"),
    "hf_conv": ("transformers", "transformers' CLIP embeddings after normalising"),
    "hf_conv_channels_last": ("channels-last CLIP", "the same in the channels-last format"),
    "packed_mm": ("packed eager", "one GEMM over all patches, positions by matrices"),
    "unfold_fold": ("unfold", "one GEMM with the normalisation folded into its weights"),
    "linear_only": ("GEMM alone", "the projection alone, on prepared rows: a bound"),
}  # fmt: skip
PEER_KINDS = {"flex": "peer2", "grouped_mm": "peer2", "transformers_compile": "peer2"}
CASE = re.compile(
    r"(?P<op>\w+) (?P<case>.+?)(?:_T(?P<rows>\d+))? (?P<dtype>float32|bfloat16|float16)"
    r"(?: .*?\b[TS](?P<size>\d+)\b| \S+)?.*?(?: x(?P<calls>\d+)| (?P<steps>\d+) steps)?"
)

# (op, case): title, unit of y, x. Decoding's cases of a whole cache are one.
SWEEPS = {
    ("attention", "full_fwd"): ("Attention, every key, forward", "rate", "tokens T"),
    ("attention", "full_fwdbwd"): ("Attention, every key, both passes", "rate", "tokens T"),
    ("attention", "window_fwd"): ("Attention, window 128, forward", "rate", "tokens T"),
    ("attention", "window_fwdbwd"): ("Attention, window 128, both passes", "rate", "tokens T"),
    ("decode_attention", "cache"): ("Decoding attention, one token", "ms", "keys in the cache"),
    ("experts", "mxfp4_fwd"): ("Experts on packed MXFP4 weights, forward", "ms", "tokens"),
    ("experts", "dense_fwd"): ("Experts on dense weights, forward", "ms", "tokens"),
    ("routing", "fwd"): ("Routing, forward", "ms", "tokens"),
}
SHAPES = {
    "attention": "gpt-oss's 64 / 8 heads, head_dim 64; one causal sequence",
    "decode_attention": "gpt-oss's 64 / 8 heads, head_dim 64; batch 1",
    "experts": "gpt-oss-20b's 32 experts, top 4, 2,880 wide; peers hold the same values dense",
    "routing": "gpt-oss-20b's router: 2,880 wide, 32 experts, top 4",
}
# The picture of a machine: op, case, the sizes of which the first that was timed is shown, words
LONG = (2048, 4096, 16384)
OVERVIEW = (
    ("attention", "full_fwd", LONG, "attention, {:,} tokens"),
    ("attention", "full_fwdbwd", LONG, "forward and backward"),
    ("attention", "window_fwd", LONG, "attention, window 128"),
    ("attention", "window_fwdbwd", LONG, "forward and backward"),
    ("attention", "reports_fwdbwd", (), "packed reports, both passes"),
    ("decode_attention", "cache", (32768,), "decoding, {:,} keys"),
    ("decode_attention", "window", (), "decoding, window 128"),
    ("routing", "fwd", LONG, "routing, {:,} tokens"),
    ("experts", "mxfp4_fwd", (1,), "MXFP4 experts, {:,} token"),
    ("experts", "mxfp4_fwd", (64,), "MXFP4 experts, {:,} tokens"),
    ("experts", "mxfp4_fwd", (512,), "MXFP4 experts, {:,} tokens"),
    ("experts", "mxfp4_fwdbwd", (512,), "forward and backward"),
    ("experts", "dense_fwdbwd", (512,), "dense experts, {:,}, both passes"),
    ("patch_embed", "naflex_fwd", (), "patch_embed, radiographs"),
    ("patch_embed", "naflex_fwdbwd", (), "forward and backward"),
    ("patch_embed", "clip_fwd", (), "patch_embed, CLIP tiles"),
    ("rotary", "fwd", (), "rotary, {:,} tokens"),
)


class Case(NamedTuple):
    """A group's name taken apart."""

    op: str
    case: str
    dtype: str
    size: int  # tokens, or keys; 0 where the name has none
    calls: int  # that one timing covers


def parse(group: str, facts: dict | None = None) -> Case:
    """A group's name, or what the group itself says of its tokens and dtype (on a card)."""
    facts = facts or {}
    found = CASE.fullmatch(group)
    if not found and "dtype" not in facts:
        raise ValueError(f"figures: expected '<op> <case> <dtype> ...', got {group!r}")
    if "dtype" in facts:
        op, *words = group.split()
        case = " ".join(w for w in words if w != "B1" and not re.fullmatch(r"[TS]\d+", w))
        dtype, size, calls = facts["dtype"], facts["tokens"], 1
    else:
        op, case, dtype = found["op"], found["case"], found["dtype"]
        size = int(found["rows"] or found["size"] or 0)
        calls = int(found["calls"] or found["steps"] or 1)
    case = case.replace(" ", "_").replace("fwd+bwd", "fwdbwd")
    if op == "decode_attention" and case in ("long", "short", "full"):
        case = "cache"
    return Case(op, case, dtype, size, calls)


def shown(run: dict, op: str, case: str, sizes: tuple[int, ...]) -> tuple[Case, dict] | None:
    """The group for a bar: of the first size that was timed, in fp32 where it was."""
    parsed = [(parse(n, g), g) for n, g in run["groups"].items()]
    fitting = [item for item in parsed if item[0][:2] == (op, case)]
    fitting.sort(key=lambda item: item[0].dtype != "float32")
    for size in sizes or {item[0].size for item in fitting}:
        for item in fitting:
            if item[0].size == size and fastest(item[1]) and item[1]["strongest_peer"]:
                return item
    return None


def label(contender: str) -> str:
    return OURS.get(contender) or OTHERS.get(contender, (contender,))[0]


def kind(contender: str, row: dict) -> str:
    if row["kind"] == "ours":
        return "ours" if contender in ("cpu", "triton") else "ours2"
    return PEER_KINDS.get(contender, "peer") if row["kind"] == "peer" else row["kind"]


def fastest(group: dict) -> tuple[str, dict] | None:
    """Our fastest backend of a group."""
    ours = [item for item in group["contenders"].items() if item[1]["kind"] == "ours"]
    return min(ours, key=lambda item: item[1]["median_ms"], default=None)


def source(path: str, run: dict) -> list[str]:
    """Two lines at the foot of each figure."""
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
    return [f"{run['machine']}; {run['date']}; medians, quartiles as lines; {path}", versions]


def milliseconds(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def overview(path: str, run: dict) -> str | None:
    """How many times as fast as its strongest exact peer each chosen case is; fp32, else bf16."""
    bars = []
    for op, case, sizes, words in OVERVIEW:
        found = shown(run, op, case, sizes)
        if not found:
            continue
        parsed, group = found
        peer = group["strongest_peer"]
        row, other = fastest(group)[1], group["contenders"][peer]
        times = [milliseconds(r["median_ms"] / parsed.calls) for r in (row, other)]
        bars.append(
            svg.Bar(
                words.format(parsed.size),
                other["median_ms"] / row["median_ms"],
                other["q1_ms"] / row["q3_ms"],
                other["q3_ms"] / row["q1_ms"],
                f"{times[0]} ms, {label(peer)} {times[1]}",
            )
        )
    if len(bars) < 2:
        return None
    return svg.bar_chart(
        "Times as fast as the strongest exact peer",
        "gpt-oss-20b's sizes, real radiographs; beside each bar its ratio and both times",
        "peer's time over ours; 1 is the peer's speed",
        bars,
        source(path, run),
    )


def _values(row: dict, unit: str, calls: int) -> tuple[float, float, float]:
    """Median and quartiles in the figure's unit; a rate falls as times rise."""
    times = [row[k] / calls for k in ("median_ms", "q1_ms", "q3_ms")]
    if unit == "ms":
        return times[0], times[1], times[2]
    work = row["gflops"] * times[0]
    return row["gflops"], work / times[2], work / times[1]


def sweep(path: str, run: dict, op: str, case: str, dtype: str) -> str | None:
    """Lines over sizes, or None where the run has fewer than two sizes of ours."""
    title, unit, x_label = SWEEPS[op, case]
    lines: dict[str, list] = {}
    kinds = {}
    for name, group in run["groups"].items():
        parsed = parse(name, group)
        if parsed[:3] != (op, case, dtype) or not parsed.size:
            continue
        for contender, row in group["contenders"].items():
            kinds[contender] = kind(contender, row)
            point = (parsed.size, *_values(row, unit, parsed.calls))
            lines.setdefault(contender, []).append(point)
    ours = [n for n in lines if kinds[n].startswith("ours")]
    if not ours or max(len(lines[n]) for n in ours) < 2:
        return None
    series = [svg.Series(label(n), kinds[n], sorted(points)) for n, points in lines.items()]
    roof = run.get("roofs", {}).get("gemm_gflops", {}).get(dtype) if unit == "rate" else None
    return svg.line_chart(
        f"{title}, {dtype}",
        SHAPES[op],
        x_label,
        "GFLOP/s of the op's least work" if unit == "rate" else "ms a call",
        series,
        source(path, run),
        log_y=unit == "ms",
        roof=("GEMM, measured", roof) if roof else None,
    )


def memory(path: str, run: dict, op: str, case: str, dtype: str) -> str | None:
    """Peak memory over sizes, beside the least that any implementation holds."""
    rows = [
        r for r in run.get("memory", ()) if (r["op"], r["case"], r["dtype"]) == (op, case, dtype)
    ]
    lines: dict[str, list] = {}
    for row in rows:
        for name, value in ((row["contender"], row["peak_mb"]), ("least", row["least_mb"])):
            lines.setdefault(name, []).append((row["tokens"], value, value, value))
    if max((len(set(points)) for points in lines.values()), default=0) < 2:
        return None
    kinds = {r["contender"]: kind(r["contender"], r) for r in rows} | {"least": "bound"}
    series = [
        svg.Series(
            "inputs and outputs" if n == "least" else label(n), kinds[n], sorted(set(points))
        )
        for n, points in lines.items()
    ]
    window = "window 128" if case == "window" else "every key"
    return svg.line_chart(
        f"Memory of attention, {window}, forward and backward, {dtype}",
        "peak with inputs, outputs and gradients; gpt-oss's 64 / 8 heads, head_dim 64",
        "tokens T",
        "MB",
        series,
        [source(path, run)[0].replace("medians, quartiles as lines; ", ""), source(path, run)[1]],
        log_y=True,
    )


def figures(path: str, run: dict) -> Iterator[tuple[str, str]]:
    """(name, SVG) of everything that this run can show."""
    drawn = [("speedup", overview(path, run))]
    for dtype in ("float32", "bfloat16"):
        for op, case in SWEEPS:
            drawn.append((f"{op}-{case}-{dtype}", sweep(path, run, op, case, dtype)))
        for case in ("full", "window"):
            drawn.append(
                (f"memory-attention-{case}-{dtype}", memory(path, run, "attention", case, dtype))
            )
    yield from ((name, text) for name, text in drawn if text)
