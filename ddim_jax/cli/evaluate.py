"""`ddim-jax evaluate`."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from ddim_jax.cli.options import check_writable
from ddim_jax.data.sets import path_of
from ddim_jax.evaluation import evaluate as measure
from ddim_jax.evaluation import parse_extractor, reference_statistics
from ddim_jax.generation.shards import iter_shards, read_settings
from ddim_jax.training.presets import DataConfig


def evaluate(
    images: tyro.conf.Positional[pathlib.Path],
    data: str,
    split: str = "train",
    crop: tuple[int, int, int, int] | None = None,
    resize: int | None = None,
    background: str | None = None,
    channels: Literal[1, 3] | None = None,
    data_dir: pathlib.Path | None = None,
    extractor: str = "pixels",
    reference: pathlib.Path | None = None,
    blocks: int = 20,
) -> None:
    """Compare generated images with a data set: Fréchet distance, KID, precision and recall.

    Args:
      images: a folder of `ddim-jax generate`.
      data: the data set, by a name or path that --data.name of training takes.
      split: its split.
      crop: what is first cut out of each of its images (top, left, height, width), as in training.
      resize: then bring the shorter side to this, and cut out the centre square.
      background: behind what is transparent in pictures of your own, as in training.
      channels: of pictures of your own, as in training.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      extractor: "pixels", "resnet56:FILE" or "inception:FILE"; only the FID weights give a "FID".
      reference: file of the data set's statistics, made if missing; by default beside `images`.
      blocks: of the jackknife behind the standard error; 0 for none, which is faster.
    """
    make, kind = parse_extractor(extractor), extractor.partition(":")[0]
    settings = read_settings(images)
    number, shape = settings["num_images"], tuple(settings["image_shape"])
    if blocks and not 2 <= blocks <= number // 2:
        raise ValueError(
            f"--blocks must be 0, or from 2 to half of the {number} images in {images}, "
            f"got {blocks}"
        )
    shards = iter_shards(images)
    path = path_of(data, data_dir)
    name = path.resolve().name if path else data.replace("/", "_")
    file = reference or images.resolve().with_name(f"{name}-{split}-{kind}.npz")
    check_writable(file)
    dataset = DataConfig(data, split, crop, resize, background=background, channels=channels).load(
        data_dir
    )
    if dataset.image_shape != shape:
        raise ValueError(
            f"{images} holds images {shape}, {data} {dataset.image_shape}: name the data that the "
            "model learned from, with --crop and --resize as in training"
        )
    features = make()
    statistics = reference_statistics(file, dataset, features, progress=True)
    print(measure(_shown(shards, number), statistics, features, blocks=blocks, progress=True))


def _shown(shards: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The images, a hundred at a time, with a bar."""
    with tqdm(total=total, unit="image", desc="samples", delay=1) as bar:
        for shard in shards:
            for part in np.array_split(shard, math.ceil(len(shard) / 100)):
                yield part
                bar.update(len(part))
