"""`ddim-jax demo`."""

from __future__ import annotations

import pathlib

from ddim_jax.demo import run


def demo(
    out: pathlib.Path = pathlib.Path("demo"),
    num_updates: int | None = None,
    num_images: int = 300,
) -> None:
    """Train on 8×8 digits for a few minutes, and make a page of what it draws, and in colour.

    Args:
      out: the folder to write; an interrupted demo is continued.
      num_updates: training steps, by default half of the digits preset's.
      num_images: samples behind each Fréchet distance.
    """
    if (out / "index.html").exists():
        print(f"{out} holds a finished demo: open {out}/index.html, or choose another --out")
        return
    print(f"open {run(out, num_updates, num_images)}")
