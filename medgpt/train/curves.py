"""Loss curves of stages as an SVG, without a plotting library."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, EDGE, TOP = 300, 220, 44, 28  # of one stage, in pixels
COLORS = ("#1a9850", "#2166ac", "#d6604d", "#762a83", "#bf812d", "#35978f")


def draw_curves(path: str | os.PathLike, stages: Mapping[str, Sequence[Mapping]]) -> Path:
    """Writes the losses that each stage logged, in all and of each source, side by side.

    Args:
        stages: {title: entries of the trainer's log, with "step", "loss" and "loss/<source>"};
            entries without a loss are passed over, and so are stages without any.
    """
    stages = {title: [e for e in log if "loss" in e] for title, log in stages.items()}
    stages = {title: log for title, log in stages.items() if log}
    if not stages:
        raise ValueError("draw_curves: expected entries with a loss, got none")
    names = sorted({n for log in stages.values() for e in log for n in e if n.startswith("loss/")})
    colors = {n: COLORS[i % len(COLORS)] for i, n in enumerate(names)} | {"loss": "#222"}
    highest = max(e[n] for log in stages.values() for e in log for n in colors if n in e)
    parts = ['<rect width="100%" height="100%" fill="white"/>']
    for column, (title, log) in enumerate(stages.items()):
        parts += _panel(EDGE + column * (WIDTH + EDGE), title, log, colors, highest)
    for i, (name, color) in enumerate(colors.items()):
        x, y = EDGE + 130 * i, TOP + HEIGHT + 36
        label = "all" if name == "loss" else escape(name.removeprefix("loss/"))
        parts.append(f'<text x="{x}" y="{y}" fill="{color}">{label}</text>')
    width = EDGE + max(len(stages) * (WIDTH + EDGE), 130 * len(colors))
    size = f'width="{width}" height="{TOP + HEIGHT + 48}" font-family="sans-serif" font-size="12"'
    content = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'
    Path(path).write_text(content, encoding="utf-8")
    return Path(path)


def _panel(left: int, title: str, log, colors: dict[str, str], highest: float) -> list[str]:
    last = max(e["step"] for e in log)
    frame = f'x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [
        f'<text x="{left}" y="{TOP - 10}">{escape(title)}</text>',
        f'<rect {frame} fill="none" stroke="#999"/>',
        f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 14}" text-anchor="end">{last} steps</text>',
    ]
    for share in (0, 0.5, 1):  # of the highest loss
        y = TOP + HEIGHT * (1 - share)
        parts.append(
            f'<text x="{left - 4}" y="{y + 4:.0f}" text-anchor="end">{share * highest:.1f}</text>'
        )
    for name, color in colors.items():
        points = " ".join(
            f"{left + WIDTH * e['step'] / last:.1f},{TOP + HEIGHT * (1 - e[name] / highest):.1f}"
            for e in log
            if name in e
        )
        width = 2 if name == "loss" else 1
        line = f'fill="none" stroke="{color}" stroke-width="{width}"'
        parts.append(f'<polyline points="{points}" {line}/>')
    return parts
