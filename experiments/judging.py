"""How images are scored against the data, and what real images score."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ddim_jax.data import Dataset
from ddim_jax.data.reader import CACHE_BYTES
from ddim_jax.evaluation import (
    Extractor,
    Moments,
    Reference,
    evaluate,
    features,
    frechet_jackknife,
    moments,
    parse_extractor,
    reference_statistics,
    shipped_reference,
)
from ddim_jax.training.presets import DataConfig

Cell = dict[str, Any]


class Judge:
    """The part of an `Experiment` that scores: its extractor, and the statistics of its data."""

    args: argparse.Namespace
    data_config: DataConfig
    dataset: Dataset
    cell: Callable[[str, Callable[[], Cell]], Cell]

    @functools.cached_property
    def at_hand(self) -> bool:
        """Whether the data are."""
        return self.data_config.at_hand(self.args.data_dir)

    @functools.cached_property
    def extractor(self) -> Extractor:
        """What `--extractor` names; by default the ResNet-56 for CIFAR-10, else pixels."""
        name = self.args.extractor or ("resnet56" if self._is_cifar10 else "pixels")
        return parse_extractor(name)()

    @property
    def _is_cifar10(self) -> bool:
        """As it is, neither cut nor resized."""
        data = self.data_config
        return data == DataConfig(data.name, data.split) and data.name.split(":")[0] == "cifar10"

    @functools.cached_property
    def shipped(self) -> Reference | None:
        """The statistics that ship, where the data are not at hand, and they are of them."""
        if "extractor" not in self.args or not self._is_cifar10 or self.at_hand:
            return None
        return shipped_reference("cifar10", self.data_config.split, self.extractor)

    @functools.cached_property
    def reference(self) -> Reference:
        """Statistics of the data: those that ship, or computed once for the folder."""
        if self.shipped:
            return self.shipped
        if not (self.args.out / "reference.npz").exists():
            self._decode()
        return reference_statistics(
            self.args.out / "reference.npz",
            self.dataset,
            self.extractor,
            batch_size=self.args.batch_size,
        )

    def score(self, images: Any) -> Cell:
        """Figures of uint8 images against the data: FD with its standard error, KD, precision.

        Args:
          images: uint8 (n, H, W, C), or a list of such shards.

        Returns:
          {"name", "distance", "se", "kernel", "precision", "recall", "num_images"}.
        """
        number = sum(map(len, images)) if isinstance(images, list) else len(images)
        blocks = jackknife_blocks(number)
        found = evaluate(
            images, self.reference, self.extractor, blocks=blocks, batch_size=self.args.batch_size
        )
        return {
            "name": found.frechet.name,
            "distance": found.frechet.value,
            "se": found.frechet.se,
            "kernel_name": found.kernel.name,
            "kernel": found.kernel.value,
            "kernel_se": found.kernel.se,
            "precision": found.precision.value,
            "recall": found.recall.value,
            "num_images": found.size,
            "blocks": blocks,
        }

    def floor(self, number: int) -> Cell:
        """What real images score at `number`, on which the distance depends.

        Half against half: min(number, N/2) random images of the odd-numbered half of the data,
        against all of the even-numbered one. Where the data are not at hand, some of them against
        all, by the features that ship.
        """

        def compute() -> Cell:
            if self.shipped:
                some = self.shipped.features[:number]
                return self._floor(some, self.shipped.moments)
            self._decode()
            rng = np.random.default_rng(self.args.seed)
            even, odd = np.arange(0, len(self.dataset), 2), np.arange(1, len(self.dataset), 2)
            some = rng.permutation(odd)[:number]
            x, y = (
                np.concatenate(list(features(
                    self.extractor, self.dataset.take(half)["image"], self.args.batch_size
                )))
                for half in (some, even)
            )  # fmt: skip
            return self._floor(x, moments(y))

        return self.cell(f"floor-n{number}", compute)

    def _floor(self, x: np.ndarray, against: Moments) -> Cell:
        value, se = frechet_jackknife(x, against, jackknife_blocks(len(x)))
        name = self.extractor.frechet_name
        return {"name": name, "distance": value, "se": se, "num_images": len(x)}

    def _decode(self) -> None:
        """Decodes data that fit in memory, by several threads; they are kept there."""
        if len(self.dataset) * np.prod(self.dataset.image_shape) <= CACHE_BYTES:
            self.dataset.arrays()


def jackknife_blocks(number: int) -> int:
    """20 where there are enough samples."""
    return max(2, min(20, number // 2))
