"""All figures of a set of samples at once, each under the name that its features allow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ddim_jax.evaluation.extractors import Extractor, features
from ddim_jax.evaluation.frechet import frechet_distance, frechet_jackknife, moments
from ddim_jax.evaluation.kernel import kernel_distance
from ddim_jax.evaluation.precision_recall import precision_recall
from ddim_jax.evaluation.reference import Reference, extractor_facts
from ddim_jax.storage.files import differences


class Figure(NamedTuple):
    """A number with its name."""

    name: str  # "FID", "FD-ResNet56", "KID", ...
    value: float
    se: float | None = None  # standard error over the samples; None where none is known

    def __str__(self) -> str:
        se = "" if self.se is None else f" ± {self.se:.2g}"
        return f"{self.name} {self.value:.5g}{se}"


class Evaluation(NamedTuple):
    """The figures of one set of samples."""

    frechet: Figure
    kernel: Figure
    precision: Figure
    recall: Figure
    size: int  # samples
    reference_size: int  # images behind the Fréchet distance's reference
    facts: dict[str, Any]  # extractor, reference, and how many took part in each figure

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict: each figure as {"name", "value", "se"}."""
        figures = ("frechet", "kernel", "precision", "recall")
        return {key: dict(getattr(self, key)._asdict()) for key in figures} | {
            "size": self.size,
            "reference_size": self.reference_size,
            **self.facts,
        }

    def __str__(self) -> str:
        figures = (self.frechet, self.kernel, self.precision, self.recall)
        return ", ".join(map(str, figures)) + f" ({self.size:,} samples)"


def evaluate(
    images: np.ndarray | Iterable[np.ndarray],
    reference: Reference,
    extractor: Extractor,
    *,
    blocks: int = 20,
    subset_size: int | None = None,
    neighbours: int = 3,
    manifold: int = 10_000,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Fréchet and kernel distance, precision and recall of samples against reference statistics.

    Args:
      images: samples, uint8 (n, H, W, C) or an iterable of such arrays (shards).
      reference: from `reference_statistics`, by the same extractor.
      extractor: from `ddim_jax.evaluation.extractors`; it names the figures.
      blocks: of the Fréchet distance's jackknife, n ≥ 2·blocks; 0 for no standard error, which
        saves as many eigenvalue problems of d dimensions.
      subset_size: of the kernel distance; by default 1000, or a tenth of the smaller set.
      neighbours: k of precision and recall.
      manifold: samples, and as many of the reference's kept features, in precision and recall.
      batch_size: images at a time.
      seed: of the random subsets.
      progress: whether to show a bar of the figures' work.

    Returns:
      `Evaluation`.

    Raises:
      TypeError: images are not uint8.
      ValueError: images are of another shape than the reference's, too few, or the reference is
        of another extractor.

    Example:
      >>> import tempfile
      >>> from ddim_jax.data import load
      >>> from ddim_jax.evaluation.extractors import pixels
      >>> from ddim_jax.evaluation.reference import reference_statistics
      >>> digits = load("digits")
      >>> path = tempfile.mkdtemp() + "/digits.npz"
      >>> reference = reference_statistics(path, digits, pixels())
      >>> result = evaluate(digits.arrays()["image"][::2], reference, pixels())
      >>> print(result)
      FD-pixels 0.07... ± 0.01..., KD-pixels -0.0... ± 0.00..., precision-pixels 0.9..., ...
    """
    wanted = extractor_facts(extractor)
    saved = {name: value for name, value in reference.facts.items() if name in wanted}
    if differ := differences(saved, wanted):
        raise ValueError("\n".join(["the reference is of another extractor:", *differ]))
    shape = tuple(reference.facts["image_shape"])
    shards = _of_shape([images] if isinstance(images, np.ndarray) else images, shape)
    x = np.concatenate(list(features(extractor, shards, batch_size)))
    y = reference.features

    with tqdm(total=blocks + 2, desc="figures", delay=1, disable=not progress) as bar:
        frechet, se = (
            frechet_jackknife(x, reference.moments, blocks, bar.update)
            if blocks
            else (frechet_distance(reference.moments, moments(x)), None)
        )
        subset = subset_size or min(1000, max(2, min(len(x), len(y)) // 10))
        kernel = kernel_distance(x, y, subset_size=subset, seed=seed)
        bar.update()
        number = min(manifold, len(x), len(y))
        rng = np.random.default_rng(seed)
        some_x, some_y = (z[rng.permutation(len(z))[:number]] for z in (x, y))
        precision, recall = precision_recall(some_y, some_x, neighbours=neighbours)
        bar.update()
    facts = {
        **wanted,
        "reference": reference.facts,
        "jackknife_blocks": blocks,
        "kernel_subsets": kernel.subsets,
        "kernel_subset_size": subset,
        "neighbours": neighbours,
        "manifold": number,
    }
    return Evaluation(
        Figure(extractor.frechet_name, frechet, se),
        Figure(extractor.kernel_name, kernel.value, kernel.se),
        Figure(f"precision-{extractor.name}", precision),
        Figure(f"recall-{extractor.name}", recall),
        len(x),
        reference.moments.size,
        facts,
    )


def _of_shape(shards: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterable[np.ndarray]:
    for shard in shards:
        if np.shape(shard)[1:] != shape:
            raise ValueError(
                f"samples must be {shape} each, like the reference, got {np.shape(shard)}"
            )
        yield shard
