"""Batches of images, with or without a class: the one place where a command draws."""

from __future__ import annotations

import math
import reprlib
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from ddim_jax.arrays import Array, image_keys
from ddim_jax.pictures.images import to_uint8
from ddim_jax.process import predicts
from ddim_jax.process.prediction import Predictor
from ddim_jax.sampling import (
    Method,
    classifier_free_labels,
    clip_x0,
    initial_noise,
    make_sampler,
)
from ddim_jax.weights import Model

WHOLE, SPLIT = PartitionSpec(), PartitionSpec("images")
Labels = Literal["cycle"] | int | None


def make_draw(
    model: Model,
    mesh: Mesh,
    tau: np.ndarray,
    method: Method,
    *,
    clip: bool = False,
) -> Callable[..., tuple[Array, Array]]:
    """A jitted `(params, keys, numbers, labels, guidance) → (images, finite)`, spread over a mesh.

    Each device draws its own slice of `numbers` from beginning to end: no collective.

    Args:
      model: the network and its schedule; its weights are not used.
      mesh: n devices on one axis, "images".
      tau, method: as in `sample`.
      clip: as in `generate`.

    Returns:
      A function of the weights, keys (2,) for x_T and the noise, numbers (n·b,) uint32, labels
      (n·b,) int32 or None, and the guidance scale or None, returning images (n·b, H, W, C) uint8,
      and whether each was finite (n·b,).

    Raises:
      ValueError: as `sample`.
    """
    sampler = make_sampler(conditioned(model, clip), tau, method=method)
    noisy = method(model.schedule, tau).steps.sigma is not None

    def draw(
        params: Any, keys: Array, numbers: Array, labels: Array | None, guidance: Array | None
    ) -> tuple[Array, Array]:
        x_T = initial_noise(keys[0], numbers, model.image_shape)
        key = image_keys(keys[1], numbers) if noisy else None
        x_0 = sampler(x_T, key, params=params, labels=labels, guidance=guidance)
        return to_uint8(x_0), jnp.isfinite(x_0).all((1, 2, 3))

    specs = (WHOLE, WHOLE, SPLIT, SPLIT, WHOLE)
    spread = jax.shard_map(draw, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)
    return jax.jit(spread, in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))


def conditioned(model: Model, clip: bool = False) -> Model:
    """The model whose apply_fn also takes labels and a guidance scale, both of them traced.

    Args:
      model: see `load_model`.
      clip: clip each x̂_0 to [−1, 1].

    Returns:
      A `Model` with apply_fn (params, x, t, labels=None, guidance=None), for `make_sampler`; labels
      (B,) int32 or None for none, guidance a scale or None for labels alone.

    Example:
      >>> import ddim_jax as ddim
      >>> model = conditioned(ddim.load_model("digits"))
      >>> sampler = ddim.make_sampler(model, [10, 1000])
      >>> sampler(jnp.ones((1, *model.image_shape)), labels=None).shape
      (1, 8, 8, 1)
    """

    def apply_fn(
        params: Any, x: Array, t: Array, labels: Array | None = None, guidance: Any = None
    ) -> Array:
        if labels is None:
            return model.apply_fn(params, x, t)

        def network(x: Array, t: Array, labels: Array) -> Array:
            return model.apply_fn(params, x, t, labels=labels)

        if guidance is None:
            return network(x, t, labels)
        none = jnp.int32(model.config.num_classes)
        return classifier_free_labels(network, labels, none, guidance)(x, t)

    taking = model._replace(apply_fn=Predictor(apply_fn, model.prediction))
    return predicts(taking, x0_fn=clip_x0(1.0)) if clip else taking


def check_condition(
    model: Model, labels: Labels, guidance: float | None
) -> tuple[Labels, float | None]:
    """`labels` and `guidance` as `generate` takes them, checked against the model.

    Raises:
      ValueError: the model has no classes, there is no such class, or there is nothing to guide.
    """
    num_classes = model.config.num_classes
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if num_classes is None and (labels, guidance) != (None, None):
        raise ValueError(
            f"the model has no classes: labels and guidance must be None, got {labels!r} and "
            f"{guidance!r}"
        )
    if num_classes is None:
        return None, None
    if labels is None and guidance is not None:
        raise ValueError("guidance is towards a class: give labels (--label, --cycle-labels) too")
    if labels is None:
        warnings.warn(
            f"the model has {num_classes} classes and draws without any: choose labels=0..."
            f"{num_classes - 1} or 'cycle' (--label, --cycle-labels), or {num_classes}, which "
            "means none",
            stacklevel=3,
        )
    elif labels != "cycle" and labels not in range(num_classes + 1):
        raise ValueError(
            f"labels must be a class in 0..{num_classes - 1}, {num_classes} for none, or 'cycle', "
            f"got {labels!r}"
        )
    else:
        labels = labels if labels == "cycle" else int(labels)
    return labels, None if guidance is None else float(guidance)


def label_of(model: Model, labels: Labels, numbers: np.ndarray) -> np.ndarray | None:
    """The classes (n,) int32 of the images of these numbers, None where labels is None."""
    if labels is None:
        return None
    each = numbers % (model.config.num_classes or 1) if labels == "cycle" else labels
    return np.broadcast_to(each, numbers.shape).astype(np.int32)


def wait(arrays: Any, bar: tqdm | None = None) -> None:
    """Waits for arrays such that a signal is heard at once, and the bar's clock goes on."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
        time.sleep(0.01)
        if bar is not None and sys.stderr.isatty() and time.time() > bar.last_print_t + 1:
            bar.last_print_t = time.time()
            bar.refresh()


def batches_of(
    draw: Callable[[np.ndarray], tuple[Array, Array]], numbers: np.ndarray, size: int, devices: int
) -> Iterator[np.ndarray]:
    """The images of `numbers`, which ascend; each batch is fetched while the next is computed.

    A batch is a block of `size` consecutive numbers for each device, whole blocks always: image k
    has the same neighbours whatever was drawn before. What is not among `numbers` is dropped.
    """
    computing: deque[tuple[np.ndarray, Any]] = deque()

    def fetch() -> np.ndarray:
        batch, result = computing.popleft()
        wait(result)
        images, finite = jax.device_get(result)
        wanted = np.isin(batch, numbers)
        check_finite(batch[wanted & ~finite])
        return images[wanted]

    blocks = np.unique(numbers // np.uint32(size))
    padding = blocks[-1] + np.arange(1, 1 + -len(blocks) % devices, dtype=np.uint32)
    blocks = np.concatenate([blocks, padding]).reshape(-1, devices, 1)
    for batch in (blocks * np.uint32(size) + np.arange(size, dtype=np.uint32)).reshape(
        -1, devices * size
    ):
        computing.append((batch, draw(batch)))
        if len(computing) > 1:
            yield fetch()
    yield fetch()


def check_finite(bad: np.ndarray) -> None:
    if len(bad):
        raise FloatingPointError(
            f"{len(bad)} images of the batch are not finite, numbers {reprlib.repr(bad.tolist())}: "
            "the model may be damaged; try clip=True, smaller eta or more steps"
        )
