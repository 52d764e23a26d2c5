"""Batches of images, with or without a class: the one place where a command draws."""

from __future__ import annotations

import reprlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from ddim_jax.arrays import Array, image_keys
from ddim_jax.generation.condition import Condition
from ddim_jax.pictures.images import to_uint8
from ddim_jax.process import predicts
from ddim_jax.process.predictor import Predictor, variance_of
from ddim_jax.sampling import (
    Method,
    classifier_free_labels,
    clip_x0,
    initial_noise,
)
from ddim_jax.sampling.plan import check_network, run
from ddim_jax.weights import Model

WHOLE, SPLIT = PartitionSpec(), PartitionSpec("images")


class Drawn(NamedTuple):
    """A batch of images, on the devices or fetched."""

    images: Array  # (n, H, W, C) uint8
    finite: Array  # (n,) bool
    path: Array  # (n, K, H, W, C) uint8, x̂_0 at the steps kept, in the order of sampling


def make_draw(
    model: Model,
    mesh: Mesh,
    tau: np.ndarray,
    method: Method,
    *,
    clip: bool = False,
    keep: np.ndarray | None = None,
) -> Callable[..., Drawn]:
    """A jitted function of image numbers, spread over a mesh.

    Each device draws its own slice of `numbers` from beginning to end: no collective.

    Args:
      model: the network and its schedule; its weights are not used.
      mesh: n devices on one axis, "images".
      tau, method: as in `sample`.
      clip: as in `generate`.
      keep: (S,) bool, the network's calls whose x̂_0 are wanted too; None for none of them.

    Returns:
      `(params, keys, numbers, labels, guidance, interval) → Drawn`: the weights, keys (2,) for x_T
      and the noise, numbers (n·b,) uint32, and labels (n·b,) int32, the guidance scale and its
      interval (2,) int32, each of them or None. All are traced.

    Raises:
      ValueError: as `sample`.
    """
    network = conditioned(model, clip)
    plan = method(model.schedule, tau)
    check_network(network.apply_fn, plan)
    noisy = plan.steps.sigma is not None
    keep = np.zeros(len(plan.t), bool) if keep is None else keep

    def draw(params: Any, keys: Array, numbers: Array, *inputs: Array | None) -> Drawn:
        x_T = initial_noise(keys[0], numbers, model.image_shape)
        key = image_keys(keys[1], numbers) if noisy else None
        condition = dict(zip(("labels", "guidance", "interval"), inputs, strict=True))
        denoise = partial(network.apply_fn, network.computed(params), **condition)
        x_0, (_, path) = run(denoise, x_T, plan, key, keep)
        return Drawn(to_uint8(x_0), jnp.isfinite(x_0).all((1, 2, 3)), to_uint8(path).swapaxes(0, 1))

    specs = (WHOLE, WHOLE, SPLIT, SPLIT, WHOLE, WHOLE)
    spread = jax.shard_map(draw, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)
    return jax.jit(spread, in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))


def make_drawer(
    model: Model,
    tau: np.ndarray,
    method: Method,
    condition: Condition,
    seed: int,
    *,
    clip: bool = False,
    keep: np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Callable[[np.ndarray], Drawn], int]:
    """`make_draw` with everything put in its place: (numbers → Drawn, number of devices).

    Args:
      model, tau, method, clip, keep: as in `make_draw`.
      condition: classes and guidance.
      seed: of x_T and of the noise.
      devices: to draw on; all of this process by default.

    Returns:
      What `batches_of` takes: a function of numbers (n·b,) uint32, and n.
    """
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("images",))
    draw = make_draw(model, mesh, tau, method, clip=clip, keep=keep)
    whole, split = NamedSharding(mesh, WHOLE), NamedSharding(mesh, SPLIT)
    scale = None if condition.guidance is None else np.float32(condition.guidance)
    interval = None if condition.interval is None else np.array(condition.interval, np.int32)
    keys = jax.random.split(jax.random.key(seed))
    params, keys, scale, interval = jax.device_put((model.params, keys, scale, interval), whole)

    def of(numbers: np.ndarray) -> Drawn:
        placed = jax.device_put((numbers, condition.of(numbers)), split)
        return draw(params, keys, *placed, scale, interval)

    return of, mesh.size


def conditioned(model: Model, clip: bool = False) -> Model:
    """The model whose apply_fn also takes labels, a guidance scale and its interval, all traced.

    Args:
      model: see `load_model`.
      clip: clip each x̂_0 to [−1, 1].

    Returns:
      A `Model` with apply_fn (params, x, t, labels=None, guidance=None, interval=None), for
      `make_sampler`; labels (B,) int32 or None for none, guidance a scale or None for labels
      alone, interval (2,) in t or None for everywhere.

    Example:
      >>> import ddim_jax as ddim
      >>> model = conditioned(ddim.load_model("digits-labels"))
      >>> sampler = ddim.make_sampler(model, [10, 1000])
      >>> sampler(jnp.ones((1, *model.image_shape)), labels=np.array([3]), guidance=2.0).shape
      (1, 8, 8, 1)
    """

    def apply_fn(
        params: Any,
        x: Array,
        t: Array,
        labels: Array | None = None,
        guidance: Any = None,
        interval: Any = None,
    ) -> Array:
        if labels is None:
            return model.apply_fn(params, x, t)

        def network(x: Array, t: Array, labels: Array) -> Array:
            return model.apply_fn(params, x, t, labels=labels)

        if guidance is None:
            return network(x, t, labels)
        none = jnp.int32(model.config.num_classes)
        guided = classifier_free_labels(network, labels, none, guidance, interval=interval)
        return guided(x, t)

    both = variance_of(model.apply_fn)

    def with_variance(
        params: Any, x: Array, t: Array, labels: Any = None, guidance: Any = None, **_: Any
    ) -> tuple[Array, Array]:
        if guidance is not None:
            raise ValueError("guidance towards a class has no learned variance; use another method")
        assert both is not None
        return both(params, x, t) if labels is None else both(params, x, t, labels=labels)

    taking = model._replace(
        apply_fn=Predictor(apply_fn, model.prediction, with_variance if both else None)
    )
    return predicts(taking, x0_fn=clip_x0(1.0)) if clip else taking


def wait(arrays: Any, bar: tqdm | None = None) -> None:
    """Waits for arrays such that a signal is heard at once, and the bar's clock goes on."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
        time.sleep(0.01)
        if bar is not None and sys.stderr.isatty() and time.time() > bar.last_print_t + 1:
            bar.last_print_t = time.time()
            bar.refresh()


def batches_of(
    draw: Callable[[np.ndarray], Drawn],
    numbers: np.ndarray,
    size: int,
    devices: int,
    bar: tqdm | None = None,
) -> Iterator[Drawn]:
    """The images of `numbers`, which ascend; each batch is fetched while the next is computed.

    A batch is a block of `size` consecutive numbers for each device, whole blocks always: image k
    has the same neighbours whatever was drawn before. What is not among `numbers` is dropped.
    """
    computing: deque[tuple[np.ndarray, Any]] = deque()

    def fetch() -> Drawn:
        batch, result = computing.popleft()
        wait(result, bar)
        drawn = jax.device_get(result)
        wanted = np.isin(batch, numbers)
        check_finite(batch[wanted & ~drawn.finite])
        return Drawn(*(part[wanted] for part in drawn))

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
