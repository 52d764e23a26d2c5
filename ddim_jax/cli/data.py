"""`ddim-jax data`."""

from __future__ import annotations

import pathlib
from typing import Literal

import tyro

from ddim_jax.cli.options import check_writable
from ddim_jax.data import available, inspect, prepare
from ddim_jax.pictures.images import save_png


def data(
    action: tyro.conf.Positional[Literal["list", "inspect", "prepare"]],
    name: tyro.conf.Positional[str] = "",
    data_dir: pathlib.Path | None = None,
    out: pathlib.Path | None = None,
    split: str = "train",
    labels: str | None = None,
    background: str | None = None,
) -> None:
    """List data sets, look into one or a folder, or download and prepare one (with TensorFlow).

    Args:
      action: "list", "inspect" or "prepare".
      name: of the TFDS data set to prepare: cifar10, celeb_a, lsun/bedroom; or what to look into, a
        folder of pictures, a file .npy or .npz, or any name that training takes.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      out: with inspect, a PNG to write: a contact sheet.
      split: with inspect, which part of a data set that is no folder.
      labels: with inspect, as --data.labels: folders.
      background: with inspect, as --data.background: white.
    """
    if action == "list":
        print("\n".join(available(data_dir)))
    elif not name:
        what = "inspect DIR" if action == "inspect" else "prepare cifar10"
        raise ValueError(f"say which data set to {action}: ddim-jax data {what}")
    elif action == "prepare":
        print(f"prepared: {prepare(name, data_dir)}")
    else:
        if out is not None and out.suffix.lower() != ".png":
            raise ValueError(f"--out must end in .png, the format written, got {out}")
        if out is not None and out.exists():
            raise FileExistsError(f"{out} exists; choose another name")
        if out is not None:
            check_writable(out)
        text, sheet = inspect(name, split, data_dir, labels=labels, background=background)
        print(text)
        if out is not None and sheet is not None:
            save_png(out, sheet)
            print(f"contact sheet {out}")
        elif out is not None:
            print("contact sheet none, as no picture can be used")
