"""What the commands that begin runs share."""

from __future__ import annotations

import pathlib

import jax

from ddim_jax.data.sets import path_of
from ddim_jax.pictures import plots
from ddim_jax.storage.files import write_whole
from ddim_jax.training.run_folder import read_metrics


def tell(text: str) -> None:
    """Prints it, in one process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def draw_loss(run: pathlib.Path) -> None:
    """Draws the curve of a finished run into it, in one process."""
    if jax.process_index() == 0:
        curve = plots.loss_curve(read_metrics(run / "metrics.jsonl"))
        write_whole(run / "loss.png", plots.png_bytes(curve))


def check_apart(out: pathlib.Path, name: str, data_dir: pathlib.Path | None) -> None:
    """Raises ValueError where the pictures that a run draws would be among those it learns from."""
    pictures = path_of(name, data_dir)
    if pictures and pictures.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"--out {out} lies in the pictures to learn from, {name}, and would add its own to "
            "them: choose a folder outside"
        )
