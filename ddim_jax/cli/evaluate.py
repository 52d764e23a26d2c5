"""`ddim-jax evaluate`."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from ddim_jax.cli.bits import Bits, BitsOptions, evaluate_bits
from ddim_jax.cli.options import Source, SourceOptions, check_writable
from ddim_jax.cli.ways import Classes, ClassOptions, file_name
from ddim_jax.data import of_classes
from ddim_jax.data.sets import path_of
from ddim_jax.evaluation import evaluate as measure
from ddim_jax.evaluation import parse_extractor, reference_statistics, shipped_reference
from ddim_jax.generation.condition import Labels, class_numbers
from ddim_jax.generation.settings import read_settings
from ddim_jax.generation.shards import iter_shards
from ddim_jax.training.presets import DataConfig


def evaluate(
    images: tyro.conf.Positional[pathlib.Path],
    bits: BitsOptions,
    source: SourceOptions,
    data: str,
    classes: ClassOptions,
    split: str = "train",
    crop: tuple[int, int, int, int] | None = None,
    resize: int | None = None,
    background: str | None = None,
    channels: Literal[1, 3] | None = None,
    data_labels: str | None = None,
    on_corrupt: Literal["stop", "skip"] = "stop",
    data_dir: pathlib.Path | None = None,
    extractor: str = "pixels",
    reference: pathlib.Path | None = None,
    blocks: int = 20,
) -> None:
    """Compare generated images with a data set, or give real ones' bits/dim under a model.

    The former: Fréchet distance, KID, precision and recall. The latter: --bits.

    With --label or --labels it compares the images drawn of these classes with the data of them.

    Args:
      images: a folder of `ddim-jax generate`; with --bits a model, as `sample` takes it.
      data: the data set, by a name or path that --data.name of training takes.
      split: its split.
      crop: what is first cut out of each of its images (top, left, height, width), as in training.
      resize: then bring the shorter side to this, and cut out the centre square.
      background: behind what is transparent in pictures of your own, as in training.
      channels: of pictures of your own, as in training.
      data_labels: as --data.labels in training, for --label and --labels: folders.
      on_corrupt: what a record that cannot be read does, as in training.
      data_dir: where TFDS data sets lie; default $DDIM_JAX_DATA, else TFDS's own.
      extractor: "pixels", "resnet56", of CIFAR-10, or "inception:FILE"; only the FID weights give a
        "FID".
      reference: file of the data set's statistics, made if missing; by default beside `images`.
        CIFAR-10's by resnet56 ship, and serve where the data are not at hand.
      blocks: of the jackknife behind the standard error; 0 for none, which is faster.
    """
    config = DataConfig(
        *(data, split, crop, resize, on_corrupt),
        labels=data_labels,
        background=background,
        channels=channels,
    )
    if bits.bits:
        if (extractor, reference, blocks) != ("pixels", None, 20):
            raise ValueError("--extractor, --reference and --blocks are not for --bits")
        if classes != Classes():
            raise ValueError(
                "--label and --labels are not for --bits, where networks with classes are told none"
            )
        return evaluate_bits(str(images), config, data_dir, bits, source)
    if (bits, source) != (Bits(), Source()):
        raise ValueError(
            "say --bits bound or --bits ode, as options of these or of a model are given; or leave "
            "those out, to compare a folder of ddim-jax generate"
        )
    make, kind = parse_extractor(extractor), extractor.partition(":")[0]
    classes.check_classes()
    settings = read_settings(images)
    shape, asked = tuple(settings["image_shape"]), _numbers(classes.wanted, settings)
    chosen = _chosen(settings, asked)
    number = int(chosen.sum())
    if not number:
        raise ValueError(f"{images} holds no image of the classes {asked}")
    if blocks and not 2 <= blocks <= number // 2:
        raise ValueError(
            f"--blocks must be 0, or from 2 to half of the {number} images in {images}, "
            f"got {blocks}"
        )
    shards = iter_shards(images)
    if kind == "resnet56" and asked is reference is None and config == DataConfig(data, split):
        features = make()
        known = None if config.at_hand(data_dir) else shipped_reference(data, split, features)
        if known is not None:
            print("the data are not at hand: compared with the statistics that ship")
            print(measure(_shown(shards, chosen), known, features, blocks=blocks, progress=True))
            return None
    mark = "" if asked is None else file_name(f"-{classes.label or classes.labels}")
    path = path_of(data, data_dir)
    name = path.resolve().name if path else data.replace("/", "_")
    file = reference or images.resolve().with_name(f"{name}-{split}{mark}-{kind}.npz")
    check_writable(file)
    dataset = config.load(data_dir)
    if dataset.image_shape != shape:
        raise ValueError(
            f"{images} holds images {shape}, {data} {dataset.image_shape}: name the data that the "
            "model learned from, with --crop and --resize as in training"
        )
    if asked is not None and dataset.num_classes is None:
        raise ValueError(f"{data} has no labels: say where they are, --data-labels, as in training")
    if asked is not None:
        dataset = of_classes(dataset, asked)
    features = make()
    statistics = reference_statistics(file, dataset, features, progress=True)
    print(measure(_shown(shards, chosen), statistics, features, blocks=blocks, progress=True))


def _numbers(wanted: Labels, settings: dict[str, Any]) -> tuple[int, ...] | None:
    """The numbers of the classes asked for, as the model of the images names them."""
    model = settings.get("model", {})
    count = model.get("model", {}).get("num_classes")
    if wanted is None:
        return None
    if count is None or settings.get("labels") is None:
        raise ValueError("the images were drawn without classes: leave out --label and --labels")
    return class_numbers(wanted, count, model.get("label_names"))


def _chosen(settings: dict[str, Any], asked: tuple[int, ...] | None) -> np.ndarray:
    """(n,) bool: which images of the folder are of the classes asked for."""
    number = settings["num_images"]
    if asked is None:
        return np.ones(number, bool)
    return np.isin(np.resize(settings["labels"], number), asked)


def _shown(shards: Iterable[np.ndarray], chosen: np.ndarray) -> Iterator[np.ndarray]:
    """The chosen images, a hundred at a time, with a bar."""
    start = 0
    with tqdm(total=int(chosen.sum()), unit="image", desc="samples", delay=1) as bar:
        for shard in shards:
            some = shard[chosen[start : start + len(shard)]]
            start += len(shard)
            for part in np.array_split(some, math.ceil(len(some) / 100) or 1):
                yield part
                bar.update(len(part))
