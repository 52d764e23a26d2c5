"""Figures: sample grids, x̂_0 trajectories, loss curves (matplotlib)."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from ddim_jax.pictures.images import grid

GREY = "#666666"


def loss_curve(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss against step, on a logarithmic axis, with its running median, and that held out, if any.

    Args:
      lines: from `run_folder.read_metrics`.

    Returns:
      A figure.
    """
    step = np.array([line["step"] for line in lines])
    loss = np.array([line["loss"] for line in lines])
    width = max(1, len(loss) // 20)
    smooth = [np.median(loss[max(0, i - width) : i + width + 1]) for i in range(len(loss))]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.semilogy(step, loss, color="#b7c9e2", linewidth=1, label="mean since the last line")
    axes.semilogy(step, smooth, color="#1f4e9c", linewidth=2, label="running median")
    held = [line for line in lines if "held_out_loss" in line]
    for name, style in {"held_out_loss": "--", "held_out_loss_ema": "-"}.items() if held else ():
        axes.semilogy(
            [line["step"] for line in held],
            [line[name] for line in held],
            style,
            color="#c0392b",
            marker="." if len(held) < 30 else "",
            label="held out, moving average" if style == "-" else "held out",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss" if held else "training loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def sample_table(
    cells: Mapping[tuple[float, int], np.ndarray], scores: Mapping[tuple[float, int], float]
) -> Figure:
    """One panel of samples for each (η, S), rows by η and columns by S, as one picture.

    Args:
      cells: (η, S) → (n, H, W, C).
      scores: (η, S) → Fréchet distance, written over its panel.

    Returns:
      A figure.
    """
    etas = sorted({eta for eta, _ in cells})
    counts = sorted({s for _, s in cells})
    figure, axes = plt.subplots(
        len(etas),
        len(counts),
        figsize=(2.6 * len(counts), 2.85 * len(etas)),
        layout="constrained",
        squeeze=False,
    )
    for i, eta in enumerate(etas):
        for j, count in enumerate(counts):
            axis = axes[i, j]
            axis.imshow(grid(np.asarray(cells[eta, count]), scale=4, gap=6))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"Fréchet {scores[eta, count]:.2f}", fontsize=9, color=GREY)
            if j == 0:
                axis.set_ylabel(f"η = {eta:g}", fontsize=12)
            if i == len(etas) - 1:
                axis.set_xlabel(f"S = {count}", fontsize=12)
    return figure


def trajectory_strip(t: np.ndarray, x_t: np.ndarray, x_0: np.ndarray) -> Figure:
    """x_t above x̂_0 for each image, along the steps kept.

    Args:
      t: (K,) decreasing.
      x_t: (K, B, H, W, C).
      x_0: (K, B, H, W, C), the predictions x̂_0.

    Returns:
      A figure of 2B rows and K columns.
    """
    count, batch = x_t.shape[:2]
    figure, axes = plt.subplots(
        2 * batch,
        count,
        figsize=(0.6 * count, 1.25 * batch),
        layout="constrained",
        squeeze=False,
    )
    for k in range(count):
        for b in range(batch):
            for row, image in ((2 * b, x_t[k, b]), (2 * b + 1, x_0[k, b])):
                axis = axes[row, k]
                axis.imshow(grid(np.asarray(image)[None], gap=0))
                axis.set_xticks([])
                axis.set_yticks([])
                if k == 0:
                    axis.set_ylabel("$x_t$" if row % 2 == 0 else r"$\hat{x}_0$", rotation=0)
                    axis.yaxis.set_label_coords(-0.4, 0.3)
        axes[0, k].set_title(f"t = {t[k]}", fontsize=8)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()


def page(title: str, body: Sequence[str]) -> str:
    """A self-contained HTML page, for wide screens and narrow ones.

    Args:
      title: plain text.
      body: HTML fragments, in order; see `figure_html`, `panels_html`, `table_html` and
        `commands_html`.

    Returns:
      The page's text, with no reference to any other file.
    """
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:1rem auto;padding:0 1rem;"
        "color:#222}img{max-width:100%}.wide{overflow-x:auto}table{border-collapse:collapse}"
        "td,th{padding:.3rem .4rem;border-bottom:1px solid #ddd;text-align:right;"
        "white-space:nowrap}h1{font-size:1.6rem;line-height:1.2}th:first-child,td:first-child{text-align:left}"
        ".text td,.text th{white-space:normal;text-align:left}"
        "figcaption,.note,dd{color:#666}code{background:#f3f3f3;padding:.1rem .3rem}"
        "figure{margin:1rem 0}.panels{display:grid;gap:.75rem;grid-template-columns:1fr 1fr}"
        ".panels figure{margin:0}.panels img{width:100%;image-rendering:pixelated}"
        ".panels.smooth img{image-rendering:auto}"
        ".panels figcaption{font-size:.85rem}"
        "@media(min-width:40rem){td,th{padding:.3rem .9rem}"
        ".panels{grid-auto-flow:column;grid-template-columns:none;grid-auto-columns:1fr;grid-template-rows:repeat(var(--rows),auto)}}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{style}</style><h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "</html>\n"
    )


def figure_html(png: bytes, caption: str) -> str:
    """The picture, inlined, with its caption as alternative text too."""
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def panels_html(panels: Sequence[tuple[np.ndarray, str]], rows: int, smooth: bool = False) -> str:
    """Pictures and their captions side by side: columns of `rows`, on a phone two in a row.

    Args:
      panels: uint8 (H, W, 3) and caption, column by column.
      rows: panels in a column of a wide screen.
      smooth: scaled smoothly by the browser, as photographs are.

    Returns:
      An HTML fragment.
    """
    figures = []
    for pixels, caption in panels:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        figures.append(figure_html(buffer.getvalue(), caption))
    kind = "panels smooth" if smooth else "panels"
    return f'<div class="{kind}" style="--rows:{rows}">' + "".join(figures) + "</div>"


def table_html(
    header: Sequence[str], rows: Sequence[Sequence[str]], sentences: bool = False
) -> str:
    """A plain table of text cells, which scrolls where the screen is narrower.

    Args:
      header, rows: its cells.
      sentences: in its cells, which are broken into lines.

    Returns:
      An HTML fragment.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = line("th", header) + "".join(line("td", row) for row in rows)
    kind = "wide text" if sentences else "wide"
    return f'<div class="{kind}"><table>{body}</table></div>'


def commands_html(commands: Mapping[str, str]) -> str:
    """Commands to type, each with what it does."""
    terms = (
        f"<dt><code>{html.escape(command)}</code></dt><dd>{html.escape(does)}</dd>"
        for command, does in commands.items()
    )
    return "<dl>" + "".join(terms) + "</dl>"
