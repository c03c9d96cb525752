"""Plots as inline SVG, in colours that colour-blind readers can tell apart (Okabe and Ito's palette)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

matplotlib.rcParams["text.parse_math"] = False  # names of runs are text, whatever is in them

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
Curve = tuple[Sequence[float], Sequence[float]]


def figure(width: float = 6.4, height: float = 3.2, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes (one, or an array of them), in the house style."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), constrained_layout=True, **options)
    for axis in fig.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
    return fig, axes


def to_svg(fig: Figure) -> str:
    """The figure as an <svg> element; closes it."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg")
    plt.close(fig)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def line_plot(curves: Mapping[str, Curve], title: str, x_label: str = "step", y_label: str = "") -> str:
    """One line per name, (x, y) each; an empty one keeps its colour for other plots."""
    fig, axis = figure(5.2, 2.9)
    for colour, (name, (x, y)) in zip(_colours(len(curves)), curves.items(), strict=True):
        if not len(x):
            continue
        axis.plot(x, y, label=name, color=colour, linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=3.5)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    if len(curves) > 1:
        axis.legend(fontsize=7, frameon=False)
    return to_svg(fig)


def forest_plot(groups: Mapping[str, Sequence[tuple[float, float]]], labels: Sequence[str], title: str, x_label: str) -> str:
    """A row per name and a panel per label, each with an axis of its own: (mean, half-width) as a point with its interval, and zero."""
    names = list(groups)
    fig, axes = figure(1.5 + 2.0 * len(labels), 1.2 + 0.26 * len(names), columns=len(labels), sharey=True, squeeze=False)
    for i, (axis, label) in enumerate(zip(axes[0], labels, strict=True)):
        means, halves = zip(*(groups[name][i] for name in names), strict=True)
        axis.axvline(0, color="#666666", linewidth=0.8)
        axis.errorbar(means, range(len(names)), xerr=halves, fmt="o", color=COLOURS[0], capsize=3, markersize=4.5)
        axis.set_title(label, fontsize=8)
        axis.locator_params(axis="x", nbins=4)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    fig.suptitle(title, fontsize=10)
    fig.supxlabel(x_label, fontsize=8)
    return to_svg(fig)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def heat_map(
    values: Sequence[Sequence[float | None]], columns: Sequence[str], rows: Sequence[str], title: str, x_label: str, y_label: str
) -> str:
    """A value (0..100, or None) in each cell, written in it."""
    fig, axis = figure(max(3.6, 1.6 + 0.9 * len(columns)), 0.8 + 0.42 * len(rows))
    grid = [[float("nan") if v is None else v for v in row] for row in values]
    axis.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axis.grid(visible=False)
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            if v is not None:
                axis.text(j, i, f"{v:.0f}", ha="center", va="center", fontsize=8, color="white" if v < 60 else "black")
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    return to_svg(fig)
