"""What the commands that begin runs share."""

from __future__ import annotations

import pathlib

import jax

from ddim_jax.data.sets import path_of


def tell(text: str) -> None:
    """Prints it, in one process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def check_apart(out: pathlib.Path, name: str, data_dir: pathlib.Path | None) -> None:
    """Raises ValueError where the pictures that a run draws would be among those it learns from."""
    pictures = path_of(name, data_dir)
    if pictures and pictures.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"--out {out} lies in the pictures to learn from, {name}, and would add its own to "
            "them: choose a folder outside"
        )
