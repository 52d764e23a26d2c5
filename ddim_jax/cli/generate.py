"""`ddim-jax generate`."""

from __future__ import annotations

import pathlib

import tyro

from ddim_jax.cli.options import ProcessOptions, SourceOptions, check_writable
from ddim_jax.cli.ways import DrawingOptions
from ddim_jax.generation import shards as module


def generate(
    model: tyro.conf.Positional[str],
    sampling: DrawingOptions,
    source: SourceOptions,
    processes: ProcessOptions,
    out: pathlib.Path,
    num_images: int = 50_000,
    batch_size: int = 100,
    shard_size: int = 1000,
) -> None:
    """Draw many images, for evaluation, into a folder of .npy shards; called again, it goes on.

    Args:
      model: see `sample`.
      out: the folder.
      num_images: how many; image k is the same whatever the number of devices and processes. More
        than a finished folder has: the further ones are drawn.
      batch_size: images at a time on each device; divides shard_size.
      shard_size: images in a file.
    """
    sampling.check()
    module.check_sizes(num_images, batch_size, shard_size)
    check_writable(out / "settings.json")
    processes.join()
    loaded = source.load(sampling.model(model))
    sampling.check_model(model, loaded)
    sampling = sampling.of(loaded)
    pipeline = sampling.as_stored and sampling.tau is None
    steps = sampling.steps if pipeline else sampling.timesteps(loaded.schedule)
    module.generate(
        loaded,
        out,
        num_images,
        steps,
        sampling.eta,
        method=module.AS_STORED if sampling.as_stored else sampling.method,
        clip=sampling.clip,
        labels=sampling.wanted,
        guidance=sampling.guidance,
        guidance_interval=sampling.interval(loaded.schedule.num_steps),
        seed=sampling.seed,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    print(f"{out}: {num_images} images, {sampling}")
