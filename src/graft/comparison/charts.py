"""Plots as SVG texts, which take their colours from the page they stand in."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 16, 46
COLOURS = 6  # of lines; the further ones are grey
LETTER, LINE = 6.2, 12  # of a label, in pixels
PLACES = (
    (8, 4, "start"), (8, -8, "start"), (8, 16, "start"), (-8, 4, "end"), (-8, -8, "end"), (-8, 16, "end"),
    (0, -9, "middle"), (0, 18, "middle"),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One contestant: a place, half the length of a bar up and down, how it is drawn, and what a pointer shows."""

    label: str
    x: float
    y: float
    spread: float | None = None
    control: bool = False
    front: bool = False


@dataclass(frozen=True)
class Series:
    """One line: [(x, y), ...]."""

    label: str
    points: Sequence[tuple[float, float]]


def scatter(title: str, x: str, y: str, points: Sequence[Point], *, log: bool = False) -> str:
    """Points with names; those on the Pareto front are filled and joined, controls are squares."""
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.x > 0 or not log)]
    if not shown:
        return ""
    across = _axis([p.x for p in shown], LEFT, WIDTH - RIGHT, log)
    up = _axis([v for p in shown for v in (p.y - (p.spread or 0), p.y + (p.spread or 0))], HEIGHT - BOTTOM, TOP, False)
    front = sorted((p for p in shown if p.front), key=lambda p: p.x)
    parts = [_frame(x, y, across, up)]
    if len(front) > 1:
        corners = " ".join(f"{across.at(p.x):.1f},{up.at(p.y):.1f}" for p in front)
        parts.append(f'<polyline class="front" points="{corners}"/>')
    taken: list[tuple[float, float, float]] = []
    for p in sorted(shown, key=lambda p: (not p.front, not p.control, -p.y)):
        at, height = across.at(p.x), up.at(p.y)
        said = f"{p.label}: {y} {p.y:.4g}{f' ± {p.spread:.2g}' if p.spread else ''}, {x} {p.x:.4g}"
        kind = f"{'control' if p.control else 'method'}{' on' if p.front else ''}"
        bar = ""
        if p.spread:
            ends = f'y1="{up.at(p.y - p.spread):.1f}" y2="{up.at(p.y + p.spread):.1f}"'
            bar = f'<line class="bar" x1="{at:.1f}" x2="{at:.1f}" {ends}/>'
        mark = (
            f'<rect x="{at - 4:.1f}" y="{height - 4:.1f}" width="8" height="8"/>'
            if p.control
            else f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4"/>'
        )
        parts.append(f'<g class="{kind}"><title>{escape(said)}</title>{bar}{mark}</g>')
        taken.append((at - 5, at + 5, height))
    for p in sorted(shown, key=lambda p: (not p.front, not p.control, -p.y)):
        parts.append(_label(p.label, across.at(p.x), up.at(p.y), taken))
    return _svg(title, f"{y} against {x}", parts)


def lines(title: str, x: str, y: str, series: Sequence[Series], *, log: bool = False) -> str:
    """Lines with their names at the right; the first ones are coloured."""
    shown = [s for s in series if s.points and all(math.isfinite(v) for p in s.points for v in p)]
    if not shown:
        return ""
    right = WIDTH - RIGHT - min(150, LETTER * max(len(s.label) for s in shown[:COLOURS]) + 8)
    across = _axis([px for s in shown for px, _ in s.points], LEFT, right, log)
    up = _axis([py for s in shown for _, py in s.points], HEIGHT - BOTTOM, TOP, False)
    parts, ends = [_frame(x, y, across, up)], []
    for i, s in reversed(list(enumerate(shown))):
        kind = f"c{i}" if i < COLOURS else "other"
        corners = " ".join(f"{across.at(px):.1f},{up.at(py):.1f}" for px, py in s.points)
        dots = "".join(f'<circle cx="{across.at(px):.1f}" cy="{up.at(py):.1f}" r="2"/>' for px, py in s.points)
        said = f"{s.label}: {', '.join(f'{py:.4g} at {px:.4g}' for px, py in s.points)}"
        drawn = f'<polyline points="{corners}"/>{dots}'
        parts.append(f'<g class="line {kind}"><title>{escape(said)}</title>{drawn}</g>')
        if i < COLOURS:
            ends.append((up.at(s.points[-1][1]), s.label, kind))
    height = -math.inf
    for wanted, label, kind in sorted(ends):
        height = max(wanted, height + LINE)
        parts.append(
            f'<text class="{kind}" x="{right + 6:.1f}" y="{height + 4:.1f}">{escape(_short(label, 24))}</text>'
        )
    return _svg(title, f"{y} over {x}", parts)


@dataclass(frozen=True)
class _Axis:
    """From numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: Sequence[float]

    def at(self, value: float) -> float:
        scale: Callable[[float], float] = math.log10 if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> _Axis:
    low, high = min(values), max(values)
    if log:
        low, high = 10 ** (math.log10(low) - 0.15), 10 ** (math.log10(high) + 0.15)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        return _Axis(low, high, start, end, True, ticks or [low, high])
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= 6)
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return _Axis(low, high, start, end, False, ticks)


def _frame(x: str, y: str, across: _Axis, up: _Axis) -> str:
    floor, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = []
    for tick in up.ticks:
        at = up.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{across.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in across.ticks:
        at = across.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{short(tick)}</text>')
    centre = (LEFT + across.end) / 2
    parts.append(f'<text x="{centre:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    turned = f'transform="translate(14 {middle:.1f}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y)}</text>')
    return "".join(parts)


def _label(label: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """The name of a point beside it, where there is room; otherwise none: the pointer shows it."""
    text = _short(label, 26)
    wide = LETTER * len(text)
    for dx, dy, anchor in PLACES:
        start, base = x + dx, y + dy
        left = {"start": start, "end": start - wide, "middle": start - wide / 2}[anchor]
        inside = left >= LEFT and left + wide <= WIDTH - 2 and TOP + 4 <= base <= HEIGHT - BOTTOM
        if inside and not any(left < b and a < left + wide and abs(base - 4 - h) < LINE - 2 for a, b, h in taken):
            taken.append((left, left + wide, base - 4))
            return f'<text class="name" x="{start:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    return ""


def _svg(title: str, description: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
    said = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f"{head}{said}{''.join(parts)}</svg>"


def short(value: float) -> str:
    """A number of an axis: 1.5M, 20k, 0.25."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
