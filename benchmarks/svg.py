"""Small charts as SVG text, lines and bars; the same input gives the same bytes.

They lie on a card of their own, dark where the reader's system is, and name each line at its end.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 168, 76, 84
LINE = 17  # between lines of text
KINDS = ("ours", "ours2", "peer", "peer2", "bound", "baseline")

LIGHT = {
    "card": "#ffffff", "edge": "#d1d9e0", "ink": "#1f2328", "muted": "#59636e", "grid": "#e6eaef",
    "ours": "#0969da", "ours2": "#1b7c83", "peer": "#bc4c00", "peer2": "#8250df",
    "bound": "#6e7781", "baseline": "#6e7781",
}  # fmt: skip
DARK = {
    "card": "#0d1117", "edge": "#3d444d", "ink": "#f0f6fc", "muted": "#9198a1", "grid": "#242b34",
    "ours": "#4493f8", "ours2": "#39c5cf", "peer": "#f0883e", "peer2": "#bc8cff",
    "bound": "#8b949e", "baseline": "#8b949e",
}  # fmt: skip


class Series(NamedTuple):
    """One line: its name, one of KINDS, and points (x, y, lower and upper quartile of y)."""

    name: str
    kind: str
    points: Sequence[tuple[float, float, float, float]]


class Bar(NamedTuple):
    """One bar from zero, with its quartiles and the words behind it."""

    name: str
    value: float
    low: float
    high: float
    words: str


class Axis(NamedTuple):
    """What maps values to pixels."""

    label: str
    ticks: tuple[float, ...]
    log: bool
    begin: float  # pixels of the first tick and of the last
    end: float

    def place(self, value: float) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        if self.log:
            value, first, last = (math.log(x) for x in (value, first, last))
        return self.begin + (self.end - self.begin) * (value - first) / (last - first)


def linear_ticks(highest: float) -> tuple[float, ...]:
    """From zero past `highest`, in four to eight steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(s * power for s in (1, 2, 5, 10) if highest / (s * power) <= 8)
    return tuple(i * step for i in range(math.ceil(highest / step - 1e-9) + 1))


def log_ticks(lowest: float, highest: float) -> tuple[float, ...]:
    """1, 2 and 5 times powers of ten around the values; only the powers past two decades."""
    steps = (1, 2, 5) if highest / lowest < 60 else (1,)
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    ticks = [s * 10.0**p for p in powers for s in steps]
    first = max(t for t in ticks if t <= lowest * (1 + 1e-9))
    last = min(t for t in [*ticks, 10 * ticks[-1]] if t >= highest * (1 - 1e-9))
    return tuple(t for t in ticks if first <= t <= max(last, 10 * first / steps[-1]))


def text(x: float, y: float, words: str, kind: str = "muted", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def number(value: float) -> str:
    """4096 as 4K, 0.5 as 0.5."""
    if value >= 1024 and value == int(value) and int(value) % 1024 == 0:
        return f"{int(value) // 1024}K"
    return f"{value:,.10g}" if value >= 1 else f"{value:.3g}"


def _style() -> str:
    def colours(palette: dict) -> str:
        rules = [f".card{{fill:{palette['card']};stroke:{palette['edge']}}}"]
        rules += [f".grid{{stroke:{palette['grid']}}}", f".axis{{stroke:{palette['muted']}}}"]
        for kind in ("ink", "muted", *KINDS):
            rules.append(f"text.{kind},circle.{kind},rect.{kind}{{fill:{palette[kind]}}}")
            rules.append(f"path.{kind}{{stroke:{palette[kind]}}}")
        return "".join(rules)

    shapes = (
        "text{font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
        "text.title{font-size:16px;font-weight:600}text.ours,text.ours2{font-weight:600}"
        "path{fill:none;stroke-width:1.8}path.ours,path.ours2{stroke-width:2.8}"
        "path.bound,path.baseline{stroke-dasharray:5 4}path.range{stroke-width:1.2}"
    )
    dark = f"@media (prefers-color-scheme:dark){{{colours(DARK)}}}"
    return f"<style>{shapes}{colours(LIGHT)}{dark}</style>"


def _page(height: float, title: str, subtitle: str, source: Sequence[str], body: list[str]) -> str:
    """The card with its heading above the body and its sources below."""
    first = height - 14 - LINE * (len(source) - 1)
    foot = [text(20, first + LINE * i, words) for i, words in enumerate(source)]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape('. '.join([subtitle, *source]))}</desc>",
        _style(),
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="8"/>',
        text(20, 29, title, "ink title"),
        text(20, 49, subtitle),
    ]
    return "\n".join([*head, *body, *foot, "</svg>"]) + "\n"


def _grid(x: Axis, y: Axis) -> list[str]:
    made = []
    for tick in y.ticks:
        at = y.place(tick)
        made.append(f'<path class="grid" d="M{x.begin:.1f} {at:.1f}H{x.end:.1f}"/>')
        made.append(text(x.begin - 8, at + 4, number(tick), anchor="end"))
    for tick in x.ticks:
        at = x.place(tick)
        made.append(f'<path class="axis" d="M{at:.1f} {y.begin:.1f}v5"/>')
        made.append(text(at, y.begin + 19, number(tick), anchor="middle"))
    made.append(f'<path class="axis" d="M{x.begin:.1f} {y.begin:.1f}H{x.end:.1f}"/>')
    made.append(text((x.begin + x.end) / 2, y.begin + 37, x.label, anchor="middle"))
    made.append(text(20, y.end - 10, y.label))
    return made


def spread(wanted: Sequence[float], lowest: float, highest: float) -> list[float]:
    """Places at least LINE apart, near the wanted ones and in their order, for the lines' names."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [max(wanted[i], lowest) for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LINE)
    limit = highest
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - LINE
    return [places[order.index(i)] for i in range(len(wanted))]


def line_chart(
    title: str,
    subtitle: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    source: Sequence[str],
    log_y: bool = False,
    roof: tuple[str, float] | None = None,
) -> str:
    """Lines over a logarithmic x, ticked at the values measured; y from zero, or logarithmic.

    `roof` is a dashed level with its name: what the machine can do at most.
    """
    lines = [*series]
    x_values = sorted({p[0] for line in lines for p in line.points})
    if roof:
        level = roof[1]
        lines.append(
            Series(roof[0], "bound", [(x_values[0], *[level] * 3), (x_values[-1], *[level] * 3)])
        )
    values = [p[i] for line in lines for p in line.points for i in (1, 2, 3)]
    y_ticks = log_ticks(min(values), max(values)) if log_y else linear_ticks(max(values))
    x = Axis(x_label, tuple(x_values), True, LEFT, WIDTH - RIGHT)
    y = Axis(y_label, y_ticks, log_y, HEIGHT - BOTTOM - LINE * (len(source) - 1), TOP + 14)
    whole = [line for line in lines if line.points[-1][0] == x_values[-1]]
    places = spread([y.place(line.points[-1][1]) for line in whole], y.end, y.begin)
    ends = {line.name: place for line, place in zip(whole, places, strict=True)}
    body = _grid(x, y)
    for line in sorted(lines, key=lambda line: line.kind == "ours"):
        dots = [(x.place(a), y.place(b)) for a, b, _, _ in line.points]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in dots)
        body.append(f'<path class="{line.kind}" d="M{path}"/>')
        for (a, b), (_, _, low, high) in zip(dots, line.points, strict=True):
            if roof is None or line.name != roof[0]:
                quartiles = f"M{a:.1f} {y.place(low):.1f}V{y.place(high):.1f}"
                body.append(f'<path class="{line.kind} range" d="{quartiles}"/>')
                body.append(f'<circle class="{line.kind}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>')
        if line.name in ends:
            body.append(text(x.end + 12, ends[line.name] + 4, line.name, line.kind))
        else:  # named where it ends
            body.append(text(dots[-1][0] + 8, dots[-1][1] - 6, line.name, line.kind))
    return _page(HEIGHT, title, subtitle, source, body)


def bar_chart(
    title: str, subtitle: str, label: str, bars: Sequence[Bar], source: Sequence[str]
) -> str:
    """Horizontal bars from zero, with a line at 1, where both sides are equal."""
    names, row, top = 236, 24, 72
    bottom = top + row * len(bars)
    height = bottom + 64 + LINE * (len(source) - 1)
    x = Axis(label, linear_ticks(max(b.high for b in bars)), False, names, WIDTH - 262)
    body = []
    for tick in x.ticks:
        at = x.place(tick)
        body.append(f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>')
        body.append(text(at, bottom + 15, number(tick), anchor="middle"))
    for i, bar in enumerate(bars):
        middle = top + row * (i + 0.5)
        end = x.place(bar.value)
        kind = "ours" if bar.value >= 1 else "peer"
        body.append(text(names - 10, middle + 4, bar.name, "ink", "end"))
        place = f'x="{names}" y="{middle - 7:.1f}" width="{end - names:.1f}"'
        body.append(f'<rect class="{kind}" {place} height="14" rx="2"/>')
        quartiles = f"M{x.place(bar.low):.1f} {middle:.1f}H{x.place(bar.high):.1f}"
        body.append(f'<path class="axis" d="{quartiles}"/>')
        at = x.place(max(bar.high, bar.value)) + 8
        body.append(text(at, middle + 4, f"{bar.value:.2f}", "ink"))
        body.append(text(at + 34, middle + 4, bar.words))
    body.append(f'<path class="axis" d="M{x.place(1):.1f} {top - 4}V{bottom}"/>')
    body.append(text(x.begin, bottom + 33, label))
    return _page(height, title, subtitle, source, body)
