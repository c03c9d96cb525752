"""Plots as inline SVG: text as text, colours as CSS variables, so that a page shows them in the light and in the dark.

The title and the legend stand outside the drawing, where they wrap and can cover nothing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Of a colour its CSS variable, and what it is in the light and in the dark: all at least 3 to 1 against the page. The lines' hues are
# Okabe and Ito's, which colour-blind readers can tell apart, darker in the light and lighter in the dark.
INKS = {"ink": ("#1c1f23", "#e6e9ec"), "grid": ("#c9ced4", "#3a4148")}
LINES = {
    "line-0": ("#0072b2", "#56b4e9"), "line-1": ("#d55e00", "#ff8c42"), "line-2": ("#008f68", "#2bc79a"),
    "line-3": ("#b8589b", "#e59ac8"), "line-4": ("#8a6d00", "#e3c443"), "line-5": ("#2a2d31", "#f2f4f6"),
    "line-6": ("#7b8289", "#9aa5b1"),
}  # fmt: skip
PALETTE = INKS | LINES
COLOURS = tuple(light for light, _ in LINES.values())
# Seven colours and four dashes: each run differs from the one before in both, and 28 in one of them; then markers tell on.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (6, 1.6, 1.2, 1.6))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FEW_POINTS = 12  # a curve of fewer shows where they are
POINTS_TO_PIXELS = 4 / 3
SMALLEST_SCALE = 0.8  # a drawing is not shrunk further on a narrow screen; it scrolls in its box

matplotlib.rcParams.update({
    "text.parse_math": False,  # names of runs are text, whatever is in them
    "svg.fonttype": "none",
    "svg.hashsalt": "refine-nsp",  # the same drawing is the same text
    "font.size": 8.5, "text.color": INKS["ink"][0], "axes.labelcolor": INKS["ink"][0], "xtick.color": INKS["ink"][0],
    "ytick.color": INKS["ink"][0], "axes.edgecolor": INKS["ink"][0], "grid.color": INKS["grid"][0],
    "axes.titlesize": 8.5, "axes.labelsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
})  # fmt: skip
Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Plot:
    """drawing: an <svg> element. legend: name and the style of its line, for each line drawn."""

    title: str
    drawing: str
    legend: tuple[tuple[str, Style], ...] = ()

    def html(self) -> str:
        """A <figure> for a page whose style has the variables of PALETTE."""
        keys = "".join(f"<li>{style.sample()}{escape(name)}</li>" for name, style in self.legend)
        legend = f"<ul class='legend'>{keys}</ul>" if keys else ""
        label = escape(self.title, quote=True)
        drawing = self.drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        box = f"<div class='drawing' tabindex='0'>{drawing}</div>"
        return f"<figure class='plot'><figcaption>{escape(self.title)}</figcaption>{box}{legend}</figure>"

    def svg(self) -> str:
        """A file of its own: on white, with its title above and its legend below."""
        width, height = (float(x) for x in re.findall(r'viewBox="0 0 (\S+) ([^"]+)"', self.drawing)[0])
        tag, rest = self.drawing.split(">", 1)
        tag = re.sub(r' (?:width|height)="[^"]*"', "", tag).replace("<svg", f'<svg y="20" width="{width}" height="{height}"')
        inner = f"{tag}>{rest}"
        lines = [
            f'<g transform="translate(10,{32 + height + 14 * i})">{style.sample()}<text x="40" y="8">{escape(name)}</text></g>'
            for i, (name, style) in enumerate(self.legend)
        ]
        tall = 24 + height + 14 * len(lines)
        text = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {tall}" '
            f'width="{width * POINTS_TO_PIXELS:.0f}" height="{tall * POINTS_TO_PIXELS:.0f}" font-family="sans-serif" font-size="9">'
            f'<rect width="100%" height="100%" fill="#ffffff"/><text x="10" y="13" font-size="10">{escape(self.title)}</text>'
            f"{inner}{''.join(lines)}</svg>\n"
        )
        return re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", text)  # not every viewer of files knows variables


@dataclass(frozen=True)
class Style:
    """How the i-th of several lines is drawn, on every plot of a page alike."""

    colour: str
    dashes: tuple[float, ...]
    marker: str

    @classmethod
    def of(cls, i: int) -> Style:
        turn = i // (len(COLOURS) * len(DASHES))
        return cls(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[turn % len(MARKERS)])

    @lru_cache(maxsize=256)  # noqa: B019  a handful of values, kept for good
    def sample(self) -> str:
        """A short piece of the line, as SVG."""
        fig = plt.figure(figsize=(30 / 72, 10 / 72))
        axis = fig.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        axis.plot([0, 1, 2], [0, 0, 0], **self.options(), marker=self.marker, markevery=[1])
        return to_svg(fig)

    def options(self) -> dict[str, Any]:
        """matplotlib's, of a line."""
        return {
            "color": self.colour,
            "linewidth": 1.6,
            "linestyle": (0, self.dashes) if self.dashes else "-",
            "markersize": 3.5,
        }


def variables(dark: bool) -> str:
    """PALETTE as CSS."""
    return "".join(f"--{name}:{colours[dark]};" for name, colours in PALETTE.items())


def figure(width: float = 4.3, height: float = 2.5, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes (one, or an array of them), in the house style; in inches."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), constrained_layout=True, **options)
    for axis in fig.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(linewidth=0.6)
    return fig, axes


def to_svg(fig: Figure) -> str:
    """The figure as an <svg> element without a background; closes it."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(fig)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, (light, _) in PALETTE.items():
        text = re.sub(rf"(fill|stroke): {light}", rf"\1: var(--{name}, {light})", text)
    least = round(fig.get_figwidth() * 72 * POINTS_TO_PIXELS * SMALLEST_SCALE)
    # Its style sheet would be the whole page's: what it says stands on the element.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    return text.replace("<svg", f'<svg style="min-width:{least}px;stroke-linejoin:round;stroke-linecap:butt"', 1)


def line_plot(curves: Mapping[str, Curve], title: str, x_label: str = "step") -> Plot:
    """One line per name, (x, y) each; an empty one keeps its style for other plots, and is not in the legend."""
    fig, axis = figure()
    legend = []
    for i, (name, (x, y)) in enumerate(curves.items()):
        if not len(x):
            continue
        style = Style.of(i)
        legend.append((name, style))
        few, beyond = len(x) < FEW_POINTS, i >= len(COLOURS) * len(DASHES)
        every = max(1, len(x) // FEW_POINTS)
        axis.plot(x, y, **style.options(), marker=style.marker if few or beyond else None, markevery=every)
    axis.set_xlabel(x_label)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    return Plot(title, to_svg(fig), tuple(legend) if len(curves) > 1 else ())


def forest_plot(groups: Mapping[str, Sequence[tuple[float, float]]], labels: Sequence[str], title: str, x_label: str) -> Plot:
    """A row per name and a panel per label, each with an axis of its own: (mean, half-width) as a point with its interval, and zero."""
    names = list(groups)
    beside = max(1.4, 0.065 * max(map(len, names)))  # inches that the names take
    fig, axes = figure(beside + 1.5 * len(labels), 1.0 + 0.24 * len(names), columns=len(labels), sharey=True, squeeze=False)
    for i, (axis, label) in enumerate(zip(axes[0], labels, strict=True)):
        means, halves = zip(*(groups[name][i] for name in names), strict=True)
        axis.axvline(0, color=INKS["ink"][0], linewidth=0.8)
        axis.errorbar(means, range(len(names)), xerr=halves, fmt="o", color=COLOURS[0], capsize=3, markersize=4.5)
        axis.set_title(label, wrap=True)
        axis.locator_params(axis="x", nbins=3)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    fig.supxlabel(x_label, fontsize=8.5)
    return Plot(title, to_svg(fig))


def heat_map(
    values: Sequence[Sequence[float | None]], columns: Sequence[str], rows: Sequence[str], title: str, x_label: str, y_label: str
) -> Plot:
    """A value (0..100, or None) in each cell, written in it."""
    fig, axis = figure(max(3.2, 1.4 + 0.6 * len(columns)), 0.8 + 0.32 * len(rows))
    grid = [[float("nan") if v is None else v for v in row] for row in values]
    shades = matplotlib.colormaps["viridis"]
    axis.pcolormesh(grid, vmin=0, vmax=100, cmap=shades)  # not imshow, which makes a bitmap
    axis.grid(visible=False)
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            if v is not None:
                ink = "#000000" if _luminance(shades(v / 100)) > 0.18 else "#ffffff"  # whichever has more contrast
                axis.text(j + 0.5, i + 0.5, f"{v:.0f}", ha="center", va="center", color=ink)
    axis.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axis.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axis.invert_yaxis()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    return Plot(title, to_svg(fig))


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of (r, g, b), each 0..1, as contrast is reckoned from it."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
