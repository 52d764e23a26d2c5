"""Feature extractors: what turns images into the vectors that distances compare.

The name of every figure comes from here: "FID" and "KID" belong to one file of weights alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from ddim_jax.arrays import import_name
from ddim_jax.evaluation import inception as inception_network
from ddim_jax.evaluation import inception_weights
from ddim_jax.evaluation import resnet56 as resnet56_network


class Extractor(NamedTuple):
    """A map from uint8 images to feature vectors, and the names of figures made with it."""

    name: str  # "Inception", "ResNet56", "pixels"
    dim: int | None  # d; None where it is the image's own H·W·C
    digest: str  # SHA-256 of the weights; "" without weights
    preprocessing: str  # from uint8 pixels to the network's input, in words
    apply: Callable[[np.ndarray], Any]  # uint8 (n, H, W, C) → floating (n, d)

    @property
    def frechet_name(self) -> str:
        """ "FID" with the FID's own weights, "FD-<name>" with anything else."""
        return "FID" if self.digest == inception_weights.SHA256 else f"FD-{self.name}"

    @property
    def kernel_name(self) -> str:
        """ "KID" with the FID's own weights, "KD-<name>" with anything else."""
        return "KID" if self.digest == inception_weights.SHA256 else f"KD-{self.name}"


def features(
    extractor: Extractor, images: np.ndarray | Iterable[np.ndarray], batch_size: int = 100
) -> Iterator[np.ndarray]:
    """Features of images in order, batch by batch.

    Arrays are cut and joined to batches of one size, so that a network is compiled once; the last
    one is filled up, and what filled it is dropped.

    Args:
      extractor: from `pixels`, `resnet56` or `inception`.
      images: uint8 (n, H, W, C), or an iterable of such arrays of any n, all of one (H, W, C).
        Images in the network's range [−1, 1] become uint8 by `ddim_jax.pictures.images.to_uint8`.
      batch_size: images at a time.

    Returns:
      An iterator of float32 (≤ batch_size, d).

    Raises:
      TypeError: images are not uint8.
      ValueError: images are not (n, H, W, C), differ in (H, W, C), or are none.

    Example:
      >>> shards = [np.zeros((3, 8, 8, 1), np.uint8), np.full((4, 8, 8, 1), 255, np.uint8)]
      >>> [batch.shape for batch in features(pixels(), shards, batch_size=5)]
      [(5, 64), (2, 64)]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    return _features(extractor, [images] if isinstance(images, np.ndarray) else images, batch_size)


def _features(
    extractor: Extractor, shards: Iterable[np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
    for batch in _rebatch(shards, batch_size):
        short = batch_size - len(batch)
        full = np.concatenate([batch, np.zeros((short, *batch.shape[1:]), np.uint8)])
        out = np.asarray(extractor.apply(full), np.float32)[: len(batch)]
        dim = extractor.dim or math.prod(batch.shape[1:])
        if out.shape != (len(batch), dim):
            raise ValueError(
                f"extractor {extractor.name} was to give {(len(batch), dim)} features, "
                f"got {out.shape}"
            )
        yield out


def _rebatch(shards: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in arrays of `size`, the last perhaps smaller."""
    held: list[np.ndarray] = []
    count, shape = 0, None
    for shard in shards:
        shard = np.asarray(shard)
        if shard.dtype != np.uint8:
            raise TypeError(
                f"images must be uint8 in 0..255, got {shard.dtype}; turn images in [-1, 1] into "
                "pixels with ddim_jax.pictures.images.to_uint8"
            )
        if shard.ndim != 4 or 0 in shard.shape[1:]:
            raise ValueError(f"images must be (n, H, W, C), got {shard.shape}")
        shape = shape or shard.shape[1:]
        if shard.shape[1:] != shape:
            raise ValueError(f"all images must have one shape, got {shape} and {shard.shape[1:]}")
        while len(shard):
            take = size - sum(map(len, held))
            held.append(shard[:take])
            count += len(held[-1])
            shard = shard[take:]
            if sum(map(len, held)) == size:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)
    if not count:
        raise ValueError("there are no images")


def pixels() -> Extractor:
    """The pixels themselves, v / 127.5 − 1, flattened: the features of "FD-pixels".

    Example:
      >>> pixels().frechet_name, pixels().kernel_name
      ('FD-pixels', 'KD-pixels')
    """
    return Extractor("pixels", None, "", "v / 127.5 - 1, flattened", _flat_pixels)


def _flat_pixels(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) / 127.5 - 1).reshape(len(images), -1)


def resnet56(
    path: str | os.PathLike[str] = resnet56_network.SHIPPED, *, allow_unknown: bool = False
) -> Extractor:
    """64 pooled features of a CIFAR-10 ResNet-56 (see `ddim_jax.evaluation.resnet56`).

    Args:
      path: its weights, an `.npz` file of arrays under their PyTorch names; by default those that
        ship, the known ones.
      allow_unknown: take weights other than the known ones; figures are then named after them,
        "FD-ResNet56-1a2b3c4d" with the first digits of their hash.

    Returns:
      An `Extractor` for uint8 (n, 32, 32, 3); its figures are "FD-ResNet56" and "KD-ResNet56".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, holds another network, or unknown weights while
        `allow_unknown` is False.
    """
    state = resnet56_network.load_state(path)
    digest = resnet56_network.state_digest(state)
    name = _marked("ResNet56", digest, resnet56_network.SHA256, path, allow_unknown)
    params = jax.device_put(resnet56_network.fold(state))
    apply = partial(jax.jit(resnet56_network.pooled), params)
    return Extractor(name, resnet56_network.DIM, digest, resnet56_network.PREPROCESSING, apply)


def inception(path: str | os.PathLike[str], *, allow_unknown: bool = False) -> Extractor:
    """2048 pooled features of the FID's Inception-v3 (see `ddim_jax.evaluation.inception`).

    Args:
      path: the PyTorch weights, `pt_inception-2015-12-05-6726825d.pth`;
        `ddim_jax.evaluation.inception_weights.fetch_inception` downloads them.
      allow_unknown: take other weights of the same network; figures are then not called FID but
        "FD-Inception-1a2b3c4d", with the first digits of the file's hash.

    Returns:
      An `Extractor` for uint8 (n, H, W, 3) of any size; (n, H, W, 1) are taken as grey.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not the known one while `allow_unknown` is False, is damaged, or
        holds another network.
    """
    digest = inception_weights.file_digest(path)
    name = _marked("Inception", digest, inception_weights.SHA256, path, allow_unknown)
    params = jax.device_put(inception_weights.fold(inception_weights.load_state(path)))
    apply = partial(jax.jit(inception_network.pooled), params)
    return Extractor(name, inception_network.DIM, digest, inception_network.PREPROCESSING, apply)


def _marked(
    name: str, digest: str, known: str, path: str | os.PathLike[str], allow_unknown: bool
) -> str:
    """The network's name, with a mark on it where the weights are not the known ones."""
    if digest == known:
        return name
    if not allow_unknown:
        raise ValueError(
            f"{path} does not hold the known {name} weights: its SHA-256 is {digest}, theirs is "
            f"{known}. If that is meant, pass allow_unknown=True; figures are then named after it"
        )
    return f"{name}-{digest[:8]}"


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "pixels": pixels,
    "resnet56": resnet56,
    "inception": inception,
}


def parse_extractor(text: str) -> Callable[[], Extractor]:
    """What `--extractor` names, to be made when it is needed: checked before any long work.

    Args:
      text: "pixels", "resnet56", "resnet56:FILE", "inception:FILE", or "module:function", called
        with nothing.

    Returns:
      () → `Extractor`.

    Raises:
      ValueError: the name is unknown, or a file is missing from it or too many.
      ModuleNotFoundError: there is no such module.

    Example:
      >>> parse_extractor("pixels")().name
      'pixels'
    """
    name, _, rest = text.partition(":")
    if name in EXTRACTORS and (name != "pixels" if rest else name != "inception"):
        return partial(EXTRACTORS[name], *([rest] if rest else []))
    if name in EXTRACTORS or not rest:
        raise ValueError(
            f"extractor must be pixels, resnet56, inception:FILE or module:function, got {text!r}"
        )
    return import_name(text, "extractor")
