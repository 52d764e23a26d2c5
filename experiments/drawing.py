"""The experiments' figures, by matplotlib: panels of images, and lines with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ddim_jax.pictures.images import grid
from ddim_jax.pictures.plots import GREY, plt

COLOURS = ("#1f4e9c", "#2a9d8f", "#e9a03b", "#c8553d", "#6a4c93", "#7f7f7f", "#111111", "#b56576")
Series = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]


def panels(
    cells: Mapping[tuple[str, str], np.ndarray],
    titles: Mapping[tuple[str, str], str] | None = None,
    *,
    columns: int | None = None,
    size: float = 2.1,
) -> Figure:
    """A panel of images for each (row, column), in the order given.

    Args:
      cells: (row label, column label) → images (n, H, W, C), uint8 or in [−1, 1].
      titles: over a panel.
      columns: images in a row of a panel.
      size: of a panel, in inches of height.
    """
    rows, across = (list(dict.fromkeys(k[i] for k in cells)) for i in (0, 1))
    tiles = {k: grid(v, columns, scale=max(1, 32 // v.shape[1])) for k, v in cells.items()}
    height, width = next(iter(tiles.values())).shape[:2]
    figure, axes = plt.subplots(
        len(rows),
        len(across),
        figsize=(size * width / height * len(across) + 0.6, (size + 0.25) * len(rows) + 0.3),
        layout="constrained",
        squeeze=False,
    )
    for i, row in enumerate(rows):
        for j, column in enumerate(across):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if (row, column) in tiles:
                axis.imshow(tiles[row, column])
                if titles:
                    axis.set_title(titles[row, column], fontsize=9, color=GREY)
            if j == 0:
                axis.set_ylabel(row, fontsize=11)
            if i == len(rows) - 1:
                axis.set_xlabel(column, fontsize=11)
    return figure


def strips(rows: Mapping[str, np.ndarray]) -> Figure:
    """Rows of images under one another, all of one length, with a label to the left of each."""
    columns, count = len(next(iter(rows.values()))), len(rows)
    images = np.concatenate(list(rows.values()))
    tiles = grid(images, columns, scale=max(1, 32 // images.shape[1]))
    size = (0.5 * columns + 0.2 + 0.07 * max(map(len, rows)), 0.5 * count + 0.2)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(tiles)
    axis.set_anchor("E")
    axis.set_yticks((np.arange(count) + 0.5) * tiles.shape[0] / count, list(rows), fontsize=8)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def lines(
    series: Series,
    xlabel: str,
    ylabel: str,
    *,
    log: str = "xy",
    horizontal: Mapping[str, float] | None = None,
) -> Figure:
    """Lines with bars of one standard error.

    Args:
      series: label → (x, y, standard errors); with no errors a plain line with no points.
      xlabel, ylabel: of the axes.
      log: which axes are logarithmic: "xy", "x", "y" or "".
      horizontal: label → height of a dashed line.
    """
    figure, axes = plt.subplots(figsize=(6.6, 4), layout="constrained")
    for i, (label, (x, y, se)) in enumerate(series.items()):
        colour, dash = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        if not len(se):
            axes.plot(x, y, label=label, color=colour, linestyle=dash, linewidth=1)
            continue
        axes.errorbar(x, y, se, label=label, color=colour, linestyle=dash, marker="o",
                      markersize=4, linewidth=1.5, capsize=2)  # fmt: skip
    for label, height in (horizontal or {}).items():
        axes.axhline(height, color=GREY, linestyle="--", linewidth=1, label=label)
    ticks = sorted({v for x, _, _ in series.values() for v in x})
    if "x" in log:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
        axes.minorticks_off()
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        if high < 10 * low:  # then there is one power of ten at most
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 8)))
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
