"""`ddim-jax info`."""

from __future__ import annotations

import pathlib

import tyro

from ddim_jax.cli.options import Source, SourceOptions, describe
from ddim_jax.networks.unet import count_params


def info(model: tyro.conf.Positional[str], source: SourceOptions, verify: bool = False) -> None:
    """Say what a model or a run is: progress, checkpoints, configuration.

    Args:
      model: see `sample`.
      verify: read all checkpoints of a run, and compare each with its digest.
    """
    run = (pathlib.Path(model) / "checkpoints").is_dir() and source == Source()
    if verify and not run:
        more = "".join(f" --{name} {value}" for name, value in source.given().items())
        raise ValueError(f"--verify is for all checkpoints of a run folder, got {model}{more}")
    if run:
        from ddim_jax.training.summary import summarise

        print(describe(summarise(model, verify)))
    else:
        loaded = source.load(model)
        print(describe({**loaded.facts, "parameters": count_params(loaded.params)}))
