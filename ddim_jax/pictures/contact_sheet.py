"""A page of single images, each with what it is and the command that draws it again."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddim_jax.pictures.images import encode_png

STYLE = (
    ":root{color-scheme:light dark;--ink:#222;--ground:#fff;--dim:#5c5c5c;--card:#f2f2f2}"
    "@media(prefers-color-scheme:dark)"
    "{:root{--ink:#eee;--ground:#161616;--dim:#a8a8a8;--card:#262626}}"
    "body{font:16px/1.45 system-ui,sans-serif;margin:1rem auto;padding:0 1rem;max-width:75rem;"
    "color:var(--ink);background:var(--ground)}h1{font-size:1.3rem;overflow-wrap:anywhere}"
    "main{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr))}"
    "figure{margin:0;padding:.5rem;border-radius:.4rem;background:var(--card);min-width:0}"
    "img{width:100%;display:block}.small{image-rendering:pixelated}"
    "p,.dim,summary{color:var(--dim)}.dim,summary,code{font-size:.8rem}"
    "summary{cursor:pointer;padding:.5rem 0}"
    "code{display:block;overflow-wrap:anywhere;-webkit-user-select:all;user-select:all}"
)


class Card(NamedTuple):
    """One image of a contact sheet."""

    pixels: np.ndarray  # uint8 (H, W, 1 or 3)
    title: str  # its number and class
    details: str  # seed and settings
    command: str  # draws it again


def contact_sheet(title: str, note: str, cards: Sequence[Card]) -> str:
    """A self-contained HTML page: images inline, two in a row on a phone, light or dark as it is.

    A tap opens an image's command, and another marks all of it.

    Args:
      title, note: plain text, at its head.
      cards: the images.

    Returns:
      The page's text, which refers to no other file.

    Example:
      >>> card = Card(np.zeros((8, 8, 1), np.uint8), "0", "seed 0", "ddim-jax sample digits")
      >>> contact_sheet("One", "", [card]).count("<img")
      1
    """
    e = html.escape
    figures = []
    for card in cards:
        data = base64.b64encode(encode_png(card.pixels)).decode()
        height, width = card.pixels.shape[:2]
        small = ' class="small"' if max(height, width) < 128 else ""
        figures.append(
            f'<figure><img{small} alt="{e(card.title)}" width="{width}" height="{height}" '
            f'style="height:auto" src="data:image/png;base64,{data}"><figcaption>'
            f'<b>{e(card.title)}</b><div class="dim">{e(card.details)}</div><details><summary>'
            f"draw it again</summary><code>{e(card.command)}</code></details>"
            "</figcaption></figure>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{e(title)}</title><style>{STYLE}</style></head><body><h1>{e(title)}</h1>"
        f"<p>{e(note)}</p><main>\n" + "\n".join(figures) + "\n</main></body></html>\n"
    )
