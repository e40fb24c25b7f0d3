"""The report's figures, drawn with matplotlib, as PNG. Small ones, so that they can be read on a phone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lorkd_monai.report.content import Curve, Matrix, Point, Segmentation

__all__ = ["confusion", "curves", "dots", "heat_map", "scatter", "segmentation"]

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
GROUPS = {
    "teacher": "#000000",
    "stl": "#E69F00",
    "mtl": "#56B4E9",
    "separate": "#CC79A7",
    "teacher_tuned": "#000000",
    "lorkd": "#0072B2",
    "difference": "#0072B2",
}
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
}
_drawn = matplotlib.rc_context(_STYLE)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _plain(text: str) -> str:
    """Names of tasks and classes may hold a $, which is no formula."""
    return text.replace("$", r"\$")


def _colour(group: str) -> str:
    return GROUPS.get(group, _COLOURS[0])


@_drawn
def dots(points: Sequence[Point], axis: str, zero: bool = False, width: float = 5) -> bytes:
    """A dot for each row with its interval as a line; ticks are single seeds. ``zero`` marks no difference."""
    figure, axes = _figure(width, 0.9 + 0.27 * len(points))
    for row, point in enumerate(reversed(points)):
        colour = _colour(point.group)
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [row, row], color=colour, linewidth=1.6, solid_capstyle="round")
        if point.dots:
            axes.plot(point.dots, [row] * len(point.dots), "|", color=colour, markersize=7, alpha=0.6)
        axes.plot([point.value], [row], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(points)), [_plain(point.label) for point in reversed(points)])
    axes.set_ylim(-0.7, len(points) - 0.3)
    axes.set_xlabel(_plain(axis))
    axes.grid(axis="x", color="#dddddd")
    if zero:
        axes.axvline(0, color="#555555", linewidth=1)
    return _png(figure)


@_drawn
def scatter(points: Sequence[tuple[str, str, float, float]], axis: str) -> bytes:
    """(label, group, parameters, score): score against parameters, on a logarithmic axis; methods by number."""
    figure, axes = _figure(5, 3.4)
    ordered = sorted(points, key=lambda p: -p[3])
    for number, (label, group, size, score) in enumerate(ordered, 1):
        axes.plot([size], [score], "o", color=_colour(group), markersize=5, label=f"{number} {_plain(label)}")
        axes.annotate(str(number), (size, score), textcoords="offset points", xytext=(5, 3), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("parameters of all that was trained")
    axes.set_ylabel(_plain(axis))
    axes.grid(color="#eeeeee")
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False, handlelength=0.8)
    figure.set_size_inches(5, 3.2 + 0.16 * math.ceil(len(points) / 2))
    return _png(figure)


@_drawn
def curves(lines: Sequence[Curve], axis: str, logarithmic: bool = False) -> bytes:
    """Lines over what all of them go across."""
    figure, axes = _figure(4, 3 + 0.14 * math.ceil(len(lines) / 2))
    for number, line in enumerate(lines):
        colour, style = _COLOURS[number % len(_COLOURS)], ("-", "--", ":")[number // len(_COLOURS) % 3]
        marker = "o" if len(line.values) < 3 else None
        axes.plot(line.epochs, line.values, color=colour, label=_plain(line.label), linestyle=style, linewidth=1.4,
                  marker=marker, markersize=3)  # fmt: skip
    axes.set_xlabel(lines[0].across)
    axes.set_ylabel(_plain(axis))
    if logarithmic:
        axes.set_yscale("log")
    axes.grid(color="#eeeeee")
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return _png(figure)


def _names(axes: matplotlib.axes.Axes, matrix: Matrix, across: float | None, down: float) -> None:
    """The names of columns and rows, in font sizes (None: the default)."""
    columns, rows = ([_plain(name) for name in names] for names in (matrix.columns, matrix.rows))
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=across)
    axes.set_yticks(range(len(rows)), rows, fontsize=down)


@_drawn
def heat_map(matrix: Matrix) -> bytes:
    """A matrix in colours, with its values where there is room for them."""
    rows, columns = matrix.values.shape
    beside, below = (0.07 * max(map(len, names)) for names in (matrix.rows, matrix.columns))
    figure, axes = _figure(max(3.2, 1.2 + beside + 0.45 * columns), max(2.4, 0.8 + 0.7 * below + 0.3 * rows))
    colours = "RdBu_r" if matrix.diverging else "viridis"
    image = axes.imshow(matrix.values, cmap=colours, vmin=matrix.low, vmax=matrix.high, aspect="auto")
    _names(axes, matrix, None, 8 if rows < 16 else 6)
    axes.set_title(_plain(matrix.title))
    for (i, j), value in np.ndenumerate(matrix.values if rows * columns <= 150 else np.empty((0, 0))):
        if np.isfinite(value):
            share = (value - matrix.low) / max(matrix.high - matrix.low, 1e-12)
            light = 0.25 < share < 0.75 if matrix.diverging else value > (matrix.low + matrix.high) / 2
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="black" if light else "white")
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    return _png(figure)


@_drawn
def confusion(matrix: Matrix) -> bytes:
    """Rows: what the images are; columns: what they were called; share of each row in colour, numbers of images."""
    rows = len(matrix.rows)
    beside = 0.065 * max(map(len, matrix.rows))
    figure, axes = _figure(1.0 + beside + 0.52 * rows, 0.9 + 0.7 * beside + 0.45 * rows)
    axes.imshow(matrix.values, cmap="Blues", vmin=0, vmax=1)
    _names(axes, matrix, 8, 8)
    axes.set_xlabel("called", fontsize=8)
    axes.set_ylabel("is", fontsize=8)
    axes.set_title(_plain(matrix.title), fontsize=9)
    for (i, j), count in np.ndenumerate(matrix.values if matrix.counts is None else matrix.counts):
        colour = "white" if matrix.values[i, j] > 0.55 else "black"
        axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return _png(figure)


@_drawn
def segmentation(example: Segmentation, task: str) -> bytes:
    """An image with contours: the label's solid, the prediction's dashed."""
    height, width = example.image.shape
    figure, axes = _figure(2.6, 2.6 * min(1.6, max(0.6, height / width)) + 0.35)
    axes.imshow(example.image, cmap="gray", vmin=0, vmax=255)
    for c in range(1, int(max(example.label.max(), example.prediction.max())) + 1):
        for drawn, colour, style in ((example.label, "#E69F00", "solid"), (example.prediction, "#56B4E9", "dashed")):
            mask = drawn == c
            if mask.any() and not mask.all():
                axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1, linestyles=style)
    axes.set_axis_off()
    axes.set_title(_plain(f"{task}, {example.title}"), fontsize=7)
    return _png(figure)
