"""A page on which sliders move images: S, η, the path between two x_T, and t."""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SMALL = 16 * 16  # pixels of an image up to which a sheet is without loss
QUALITY = 90  # of WebP above that
MOST = 2**16  # images of a sheet: their numbers are of 16 bits
SIDE = 16383  # of a WebP picture


class Path(NamedTuple):
    """What a τ of one S drew: K states on the way, and the images at the end of both."""

    t: np.ndarray  # (K + 1,) decreasing, the last is 0
    x_t: np.ndarray  # (E, P, N, K + 1, H, W, C) uint8, for each η and place on the path
    x_0: np.ndarray  # the predictions x̂_0 from them


class Codes(NamedTuple):
    """Images, encoded and decoded again with each S."""

    originals: np.ndarray  # (M, H, W, C) uint8
    x_T: np.ndarray  # (number of S, M, H, W, C) uint8
    decoded: np.ndarray  # the same shape
    errors: np.ndarray  # (number of S, M), of `reconstruction_error`
    names: Sequence[str]  # (M,) what stands under each
    origin: str  # a sentence: where the originals come from


class Exploration(NamedTuple):
    """All that an explorer shows."""

    steps: Sequence[int]
    etas: Sequence[float]
    positions: np.ndarray  # (P,) in [0, 1]
    names: Sequence[str]  # (N,) what stands under each image
    paths: Sequence[Path]  # one for each S
    codes: Codes


class Sheet(NamedTuple):
    """Equal images, once each, in one picture."""

    webp: bytes
    columns: int
    numbers: list[np.ndarray]  # for each array of images (..., H, W, C), (...) which of the sheet


def sheet_of(arrays: Sequence[np.ndarray]) -> Sheet:
    """Packs images into one WebP, row by row; one that occurs twice is kept once.

    Images up to 16×16 are kept without loss, larger ones at quality 90.

    Args:
      arrays: of uint8 images (..., H, W, 1 or 3), all of one size.

    Returns:
      A `Sheet`.

    Raises:
      ValueError: there are more images than a sheet holds.

    Example:
      >>> sheet = sheet_of([np.zeros((2, 3, 8, 8, 1), np.uint8), np.ones((1, 8, 8, 1), np.uint8)])
      >>> [n.tolist() for n in sheet.numbers], sheet.columns
      ([[[0, 0, 0], [0, 0, 0]], [1]], 2)
    """
    h, w, c = arrays[0].shape[-3:]
    found: dict[bytes, int] = {}
    numbers = [
        np.array([found.setdefault(image.tobytes(), len(found)) for image in flat]).reshape(
            array.shape[:-3]
        )
        for array in arrays
        for flat in [array.reshape(-1, h, w, c)]
    ]
    columns = math.ceil(math.sqrt(len(found)))
    if len(found) > MOST or columns * max(h, w) > SIDE:
        raise ValueError(
            f"{len(found):,} images of {h}×{w} do not fit into one sheet: take fewer images, "
            "places on the path, frames, or values of S or η"
        )
    tiles = np.zeros((columns * columns, h, w, c), np.uint8)
    tiles[: len(found)] = [np.frombuffer(image, np.uint8).reshape(h, w, c) for image in found]
    pixels = tiles.reshape(columns, columns, h, w, c).swapaxes(1, 2).reshape(columns * h, -1, c)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    buffer = io.BytesIO()
    lossless = h * w <= SMALL
    Image.fromarray(pixels).save(
        buffer, "WEBP", lossless=lossless, quality=100 if lossless else QUALITY, method=4
    )
    return Sheet(buffer.getvalue(), columns, numbers)


def explorer_html(title: str, about: str, explored: Exploration) -> str:
    """The page: one file, which refers to no other, for a phone and a desktop, light and dark.

    Args:
      title, about: plain text, at its head.
      explored: the images, see `ddim_jax.generation.exploring.explore`.

    Returns:
      The page's text.

    Raises:
      ValueError: there are more images than a sheet holds.
    """
    codes, paths = explored.codes, explored.paths
    pairs = [array for path in paths for array in (path.x_t, path.x_0)]
    sheet = sheet_of([*pairs, codes.originals, codes.x_T, codes.decoded])
    numbers = np.concatenate([n.ravel() for n in sheet.numbers])
    h, w = codes.originals.shape[1:3]
    data = {
        "height": h,
        "width": w,
        "columns": sheet.columns,
        "steps": list(explored.steps),
        "etas": list(explored.etas),
        "positions": np.asarray(explored.positions).round(4).tolist(),
        "names": list(explored.names),
        "t": [path.t.tolist() for path in paths],
        "codeNames": list(codes.names),
        "errors": [[float(f"{error:.3g}") for error in row] for row in codes.errors],
        "sizes": [number.size for number in sheet.numbers],
        "numbers": _text(
            np.concatenate([n.ravel() for n in sheet.numbers]).astype("<u2").tobytes()
        ),
    }
    lossy = "without loss" if h * w <= SMALL else f"at WebP's quality {QUALITY}"
    words = {
        "TITLE": html.escape(title),
        "ABOUT": html.escape(about),
        "ORIGIN": html.escape(codes.origin),
        "KEPT": f"{numbers.max() + 1:,} different images of {h}×{w}, kept {lossy}",
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "SHEET": "data:image/webp;base64," + _text(sheet.webp),
    }
    page = (
        importlib.resources.files("ddim_jax.pictures").joinpath("explorer.html").read_text("utf-8")
    )
    head, *parts = page.split("{{")
    for part in parts:
        name, _, rest = part.partition("}}")
        head += words[name] + rest
    return head


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
