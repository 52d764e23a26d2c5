"""Batches on their way to the step: several a call, and of a data set that fits only their indices.

A call of a compiled function costs the host some milliseconds for the thousand arrays of a state,
and images take a way from the host that indices do not. What a batch holds does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from ddim_jax.data import Dataset, batches
from ddim_jax.training import parallel
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import Batch, Metrics, TrainState

SECONDS_A_CALL = 0.5  # about: long for the host, short for whoever waits for a stop
MOST_STEPS = 50
UTILISATION = 0.3  # of a device's peak, about
USUAL_FLOPS = 100e12  # where the peak is not known
SHARE_OF_MEMORY = 1 / 8  # that the images may take


def steps_per_call(config: TrainConfig, start: int, flops: float, peak: float | None) -> int:
    """How many updates one call makes: a divisor of every interval and of where the run begins.

    On a CPU one, as XLA runs the gradient of a convolution slowly inside a loop there.

    Args:
      config: its intervals, and `steps_per_call`, the most.
      start: updates made before.
      flops: of one update on one device.
      peak: FLOP/s of the device, if known.

    Returns:
      K ≥ 1.

    Example:
      >>> steps_per_call(TrainConfig(steps_per_call=30), start=0, flops=0.0, peak=None)
      25
    """
    most = config.steps_per_call
    if most is None:
        rate = UTILISATION * peak if peak else USUAL_FLOPS
        quick = math.ceil(min(MOST_STEPS, SECONDS_A_CALL * rate / max(flops, 1.0)))
        most = 1 if jax.default_backend() == "cpu" else quick
    intervals = (config.log_every, config.checkpoint_every, config.sample_every)
    common = math.gcd(*intervals, config.num_updates, start)
    return max(k for k in range(1, min(most, common) + 1) if common % k == 0)


def on_device(dataset: Dataset, config: TrainConfig) -> bool:
    """Whether all images are to lie on each device, as `config.data_on_device` says or they fit."""
    if config.data_on_device is not None:
        return config.data_on_device
    stats = jax.local_devices()[0].memory_stats() or {}
    room = SHARE_OF_MEMORY * stats.get("bytes_limit", 0)
    fits = len(dataset) * math.prod(dataset.image_shape) <= room
    return jax.default_backend() != "cpu" and fits and not config.num_workers


class Feed:
    """What the steps of a run take: `data`, and `next(feed)`, K batches or K times their indices.

    Args:
      dataset, config: of `fit`.
      mesh: from `parallel.make_mesh`.
      start: number of the first batch.
      size: K, batches a call.
    """

    def __init__(self, dataset: Dataset, config: TrainConfig, mesh: Mesh, start: int, size: int):
        self._resident, self._size, self.mesh = on_device(dataset, config), size, mesh
        self._whole = parallel.replicated(mesh)
        self._split = NamedSharding(mesh, PartitionSpec(None, parallel.AXES))
        self._stream = batches(
            dataset,
            config.batch_size,
            config.seed,
            start=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.num_threads,
            num_workers=config.num_workers,
            prefetch=2 * size if self._resident else 4,
            indices_only=self._resident,
        )
        b, n, shape = config.batch_size, len(dataset), dataset.image_shape
        one = {"image": ((*shape,), np.uint8), "label": ((), np.int32)}
        batch = {"index": ((), np.int32)} if self._resident else one
        self.data_like = {
            k: jax.ShapeDtypeStruct((n, *s), d, sharding=self._whole)
            for k, (s, d) in one.items()
            if self._resident
        }
        self.like = {
            k: jax.ShapeDtypeStruct((size, b, *s), d, sharding=self._split)
            for k, (s, d) in batch.items()
        }
        self._decoded: Future[dict[str, np.ndarray]] | None = None
        if self._resident:  # while the step is compiled
            pool = ThreadPoolExecutor(1)
            self._decoded = pool.submit(dataset.arrays)
            pool.shutdown(wait=False)

    def data(self) -> dict[str, jax.Array]:
        """All images and labels on the devices, or nothing; waits until they are decoded."""
        if self._decoded is None:
            return {}
        arrays, self._decoded = self._decoded.result(), None
        return {
            k: jax.make_array_from_process_local_data(self._whole, v) for k, v in arrays.items()
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        some = [next(self._stream) for _ in range(self._size)]
        return {
            k: jax.make_array_from_process_local_data(self._split, np.stack([s[k] for s in some]))
            for k in some[0]
        }


def make_update(
    train_step: Callable[..., tuple[TrainState, Metrics]],
    follow: Callable[..., Any],
    feed: Feed,
    state: TrainState,
    kept: Any,
    loss: Partial,
    num_updates: int,
) -> Callable[[TrainState, Any], tuple[TrainState, Any, Metrics]]:
    """Compiles `make_steps` while images are decoded: (state, kept) → those after the next call."""
    steps = make_steps(train_step, feed.mesh, follow)
    last = np.float32(num_updates)  # an argument, as loss: runs that differ in it are one program
    compiled = steps.lower(state, kept, feed.data_like, feed.like, loss, last).compile()
    data = feed.data()
    return lambda state, kept: compiled(state, kept, data, next(feed), loss, last)


def make_steps(
    train_step: Callable[..., tuple[TrainState, Metrics]],
    mesh: Mesh,
    follow: Callable[..., Any],
) -> Any:
    """Several train steps in one call.

    Args:
      train_step: of `make_train_step`.
      mesh: its mesh.
      follow: (kept, params, step) → kept, after each step; see `averages.follow`.

    Returns:
      Jitted (state, kept, data, batches, loss, num_updates) → (state, kept, metrics (K,)), of a
      `Feed`'s data and batches. The given state and kept are donated.
    """

    def taken(data: Batch, batch: Batch) -> Batch:
        if not data:
            return batch
        split = parallel.batch_sharding(mesh)
        return {
            k: with_sharding_constraint(v.at[batch["index"]].get(mode="clip"), split)
            for k, v in data.items()
        }

    def steps(
        state: TrainState,
        kept: Any,
        data: Batch,
        batches: Batch,
        loss: Partial,
        num_updates: Any = None,
    ) -> tuple[TrainState, Any, Metrics]:
        def one(carry: tuple[TrainState, Any], batch: Batch) -> tuple[tuple[TrainState, Any], Any]:
            state, metrics = train_step(carry[0], taken(data, batch), loss, num_updates)
            return (state, follow(carry[1], state.params, state.step)), metrics

        if jax.default_backend() != "cpu":
            (state, kept), metrics = jax.lax.scan(one, (state, kept), batches)
            return state, kept, metrics
        carry, rows = (state, kept), []  # XLA runs the gradient of a convolution slowly in a loop
        for k in range(len(jax.tree.leaves(batches)[0])):
            carry, row = one(carry, jax.tree.map(lambda v, k=k: v[k], batches))
            rows.append(row)
        return *carry, jax.tree.map(lambda *values: jnp.stack(values), *rows)

    return jax.jit(steps, donate_argnums=(0, 1))
