"""Draw plots as inline SVG, with text as text and colours as CSS variables, so that a page can show them in light and in dark.

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

# Each colour has a CSS variable, a value for light pages and one for dark pages, all with a contrast of at least 3 to 1. The lines' hues
# are Okabe and Ito's, which colour-blind readers can tell apart, darkened for light pages and lightened for dark ones.
INKS = {"ink": ("#1c1f23", "#e6e9ec"), "grid": ("#c9ced4", "#3a4148")}
LINES = {
    "line-0": ("#0072b2", "#56b4e9"), "line-1": ("#d55e00", "#ff8c42"), "line-2": ("#008f68", "#2bc79a"),
    "line-3": ("#b8589b", "#e59ac8"), "line-4": ("#8a6d00", "#e3c443"), "line-5": ("#2a2d31", "#f2f4f6"),
    "line-6": ("#7b8289", "#9aa5b1"),
}  # fmt: skip
PALETTE = INKS | LINES
COLOURS = tuple(light for light, _ in LINES.values())
# There are seven colours and four dashes. Each run differs from the one before it in both, and 28 runs differ in one of them; further runs
# differ in their markers.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (6, 1.6, 1.2, 1.6))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FEW_POINTS = 12  # a curve of fewer points shows a marker at each
POINTS_TO_PIXELS = 4 / 3
SMALLEST_SCALE = 0.8  # on a narrow screen a drawing is shrunk no further, but scrolls in its box

matplotlib.rcParams.update({
    "text.parse_math": False,  # names of runs are plain text, dollar signs included
    "svg.fonttype": "none",
    "svg.hashsalt": "refine-nsp",  # the same drawing gives the same file
    "font.size": 8.5, "text.color": INKS["ink"][0], "axes.labelcolor": INKS["ink"][0], "xtick.color": INKS["ink"][0],
    "ytick.color": INKS["ink"][0], "axes.edgecolor": INKS["ink"][0], "grid.color": INKS["grid"][0],
    "axes.titlesize": 8.5, "axes.labelsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
})  # fmt: skip
Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Plot:
    """Hold a drawing, an <svg> element, with its title and a legend of the name and the style of each line."""

    title: str
    drawing: str
    legend: tuple[tuple[str, Style], ...] = ()

    def html(self) -> str:
        """Write a <figure> for a page whose style sheet has the variables of PALETTE."""
        keys = "".join(f"<li>{style.sample()}{escape(name)}</li>" for name, style in self.legend)
        legend = f"<ul class='legend'>{keys}</ul>" if keys else ""
        label = escape(self.title, quote=True)
        drawing = self.drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        box = f"<div class='drawing' tabindex='0'>{drawing}</div>"
        return f"<figure class='plot'><figcaption>{escape(self.title)}</figcaption>{box}{legend}</figure>"

    def svg(self) -> str:
        """Write a file of its own: on white, with its title above and its legend below."""
        width, height = (float(x) for x in re.findall(r'viewBox="0 0 (\S+) ([^"]+)"', self.drawing)[0])
        tag, rest = self.drawing.split(">", 1)
        tag = re.sub(r' (?:width|height)="[^"]*"', "", tag).replace("<svg", f'<svg y="20" width="{width}" height="{height}"')
        lines = [
            f'<g transform="translate(10,{32 + height + 14 * i})">{style.sample()}<text x="40" y="8">{escape(name)}</text></g>'
            for i, (name, style) in enumerate(self.legend)
        ]
        tall = (32 if lines else 24) + height + 14 * len(lines)
        text = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {tall}" '
            f'width="{width * POINTS_TO_PIXELS:.0f}" height="{tall * POINTS_TO_PIXELS:.0f}" font-family="sans-serif" font-size="9">'
            f'<rect width="100%" height="100%" fill="#ffffff"/><text x="10" y="13" font-size="10">{escape(self.title)}</text>'
            f"{tag}>{rest}{''.join(lines)}</svg>\n"
        )
        return re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", text)  # not every viewer knows CSS variables


@dataclass(frozen=True)
class Style:
    """Say how the i-th of several lines is drawn, alike on every plot of a page."""

    colour: str
    dashes: tuple[float, ...]
    marker: str

    @classmethod
    def of(cls, i: int) -> Style:
        turn = i // (len(COLOURS) * len(DASHES))
        return cls(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[turn % len(MARKERS)])

    @lru_cache(maxsize=256)  # noqa: B019  a handful of values, kept for good
    def sample(self) -> str:
        """Draw a short piece of the line as SVG."""
        fig = plt.figure(figsize=(30 / 72, 10 / 72))
        axis = fig.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        axis.plot([0, 1, 2], [0, 0, 0], **self.options(), marker=self.marker, markevery=[1])
        return to_svg(fig)

    def options(self) -> dict[str, Any]:
        """Return matplotlib's options for this line."""
        line = (0, self.dashes) if self.dashes else "-"
        return {"color": self.colour, "linewidth": 1.6, "linestyle": line, "markersize": 3.5}


def variables(dark: bool) -> str:
    """Write PALETTE as CSS variables."""
    return "".join(f"--{name}:{colours[dark]};" for name, colours in PALETTE.items())


def figure(width: float = 4.3, height: float = 2.5, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Make a figure of `width` by `height` inches and its axes (one, or an array of them) in the style of all pages."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), constrained_layout=True, **options)
    for axis in fig.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(linewidth=0.6)
    return fig, axes


def to_svg(fig: Figure) -> str:
    """Convert a figure to an <svg> element without a background, and close it."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(fig)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, (light, _) in PALETTE.items():
        text = re.sub(rf"(fill|stroke): {light}", rf"\1: var(--{name}, {light})", text)
    least = round(fig.get_figwidth() * 72 * POINTS_TO_PIXELS * SMALLEST_SCALE)
    # A style sheet inside the drawing would apply to the whole page, so what it says is put on the element itself.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    return text.replace("<svg", f'<svg style="min-width:{least}px;stroke-linejoin:round;stroke-linecap:butt"', 1)


def line_plot(curves: Mapping[str, Curve], title: str, x_label: str = "step") -> Plot:
    """Draw a line (x, y) for each name. An empty curve takes its place in the order of styles, but not in the legend."""
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
    """Draw (mean, half-width) as a point with its interval, in a row for each name and a panel with its own axis for each label."""
    names = list(groups)
    margin = max(1.4, 0.065 * max(map(len, names)))  # inches that the names take
    fig, axes = figure(margin + 1.5 * len(labels), 1.0 + 0.24 * len(names), columns=len(labels), sharey=True, squeeze=False)
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
    """Draw a map of values from 0 to 100, each written into its cell; None leaves a cell empty."""
    fig, axis = figure(max(3.2, 1.4 + 0.6 * len(columns)), 0.8 + 0.32 * len(rows))
    grid = [[float("nan") if v is None else v for v in row] for row in values]
    shades = matplotlib.colormaps["viridis"]
    axis.pcolormesh(grid, vmin=0, vmax=100, cmap=shades)  # imshow would make a bitmap
    axis.grid(visible=False)
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            if v is not None:
                ink = "#000000" if _luminance(shades(v / 100)) > 0.18 else "#ffffff"  # the ink that has more contrast
                axis.text(j + 0.5, i + 0.5, f"{v:.0f}", ha="center", va="center", color=ink)
    axis.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axis.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axis.invert_yaxis()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    return Plot(title, to_svg(fig))


def _luminance(colour: Sequence[float]) -> float:
    """Compute the relative luminance of (r, g, b), each 0..1, from which contrast follows."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
