"""A curation's report: counts, histograms and, where asked for, examples; one HTML file."""

from collections import Counter
from html import escape

from .rows import texts

TOKEN_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SIDE_EDGES = (0, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # pixels of the longer side
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd}
td{text-align:right}td:first-child,th:first-child{text-align:left}rect{fill:#4878a8}
text{font:12px system-ui,sans-serif;fill:#444}
pre{white-space:pre-wrap;background:#f5f5f5;padding:.5rem}
"""


def _bin(value: int, edges: tuple[int, ...]) -> str:
    low = max(edge for edge in edges if edge <= value)
    place = edges.index(low)
    return f"{low}-{edges[place + 1] - 1}" if place + 1 < len(edges) else f">= {low}"


def _bins(edges: tuple[int, ...]) -> Counter:
    return Counter({_bin(edge, edges): 0 for edge in edges})


class Statistics:
    """Of the kept rows, and up to `examples` texts of the dropped by reason."""

    def __init__(self, examples: int = 0):
        self.tokens, self.sides = _bins(TOKEN_EDGES), _bins(SIDE_EDGES)
        self.images: Counter = Counter()  # rows by their number of images
        self.total_tokens = 0
        self.replaced: Counter = Counter()
        self.flags: Counter = Counter()
        self.most, self.examples = examples, {}

    def add_chunk(self, told: dict) -> None:
        self.replaced.update(told["replaced"])
        self.flags.update(told["flags"])
        for reason, found in told["examples"].items():
            kept = self.examples.setdefault(reason, [])
            kept += found[: self.most - len(kept)]

    def add_example(self, reason: str, row: dict) -> None:
        if len(self.examples.get(reason, ())) < self.most:
            self.examples.setdefault(reason, []).append("\n".join(texts(row))[:400])

    def add_row(self, row: dict, tokens: int) -> None:
        if tokens:
            self.tokens[_bin(tokens, TOKEN_EDGES)] += 1
            self.total_tokens += tokens
        self.images[str(len(row["images"]))] += 1
        for image in row["images"]:
            self.sides[_bin(max(image["height"], image["width"]), SIDE_EDGES)] += 1

    def as_dict(self) -> dict:
        return {
            "tokens": self.total_tokens,
            "token_histogram": dict(self.tokens),
            "image_side_histogram": dict(self.sides),
            "images_a_row": dict(sorted(self.images.items(), key=lambda pair: int(pair[0]))),
            "identifiers_replaced": dict(sorted(self.replaced.items())),
            "flags": dict(sorted(self.flags.items())),
            "examples": self.examples,
        }


def _table(heads: list[str], rows: list[list]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{c:,}</td>" if isinstance(c, int) else f"<td>{escape(c)}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _bars(counts: dict[str, int]) -> str:
    """A histogram as SVG, a bar a line."""
    most = max([*counts.values(), 1])
    lines = []
    for place, (name, count) in enumerate(counts.items()):
        y, width = 20 * place, 400 * count / most
        lines.append(
            f'<text x="110" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="120" y="{y + 3}" width="{width:.1f}" height="14"/>'
            f'<text x="{126 + width:.1f}" y="{y + 14}">{count:,}</text>'
        )
    return f'<svg width="640" height="{20 * len(counts) + 4}">{"".join(lines)}</svg>'


def html(report: dict) -> str:
    """The page: of a report's dict with `examples`, which are shown where there are any."""
    share = f"{report['kept'] / report['in']:.1%}" if report["in"] else "none"
    parts = [
        f"<h1>Curation</h1><p>{report['in']:,} rows in = {report['kept']:,} kept ({share}) + "
        f"{sum(report['dropped'].values()):,} dropped. {report['tokens']:,} tokens.</p>",
        "<h2>Sources</h2>",
        _table(
            ["source", "in", "kept", "dropped"],
            [
                [name, s["in"], s["kept"], sum(s["dropped"].values())]
                for name, s in report["sources"].items()
            ],
        ),
        "<h2>Dropped, by reason</h2>",
        _table(
            ["reason", "all", *report["sources"]],
            [
                [r, n, *(s["dropped"].get(r, 0) for s in report["sources"].values())]
                for r, n in report["dropped"].items()
            ],
        ),
        "<h2>Tokens a row</h2>" + _bars(report["token_histogram"]),
        "<h2>Longer side of the images, pixels</h2>" + _bars(report["image_side_histogram"]),
        "<h2>Images a row</h2>" + _bars(report["images_a_row"]),
    ]
    for title, name in (
        ("Identifiers replaced in texts", "identifiers_replaced"),
        ("Flags", "flags"),
        ("Benchmark items found in rows, which were dropped", "contaminated"),
    ):
        if report[name]:
            parts.append(f"<h2>{title}</h2>" + _table(["", "count"], list(report[name].items())))
    if report["examples"]:
        parts.append("<h2>Examples of what was dropped: texts of patients</h2>")
        for reason, found in sorted(report["examples"].items()):
            parts.append(f"<h3>{escape(reason)}</h3>")
            parts += [f"<pre>{escape(text)}</pre>" for text in found]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )
