"""`ddim-jax data`."""

from __future__ import annotations

import pathlib
from typing import Literal

import tyro

from ddim_jax.data import available, prepare


def data(
    action: tyro.conf.Positional[Literal["list", "prepare"]],
    name: tyro.conf.Positional[str] = "",
    data_dir: pathlib.Path | None = None,
) -> None:
    """List the data sets that are there, or download and prepare one (this needs TensorFlow).

    Args:
      action: "list" or "prepare".
      name: of the TFDS data set to prepare: cifar10, celeb_a, lsun/bedroom.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
    """
    if action == "list":
        print("\n".join(available(data_dir)))
    elif not name:
        raise ValueError("say which data set to prepare: ddim-jax data prepare cifar10")
    else:
        print(f"prepared: {prepare(name, data_dir)}")
