"""Pictures of a run on its way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddim_jax.pictures.images import grid
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import timesteps
from ddim_jax.sampling import initial_noise, make_sampler
from ddim_jax.training import parallel
from ddim_jax.training.run_folder import MetricsLog
from ddim_jax.training.step import (
    ApplyFn,
    Params,
)
from ddim_jax.weights import Model

PREVIEW_IMAGES, PREVIEW_STEPS = 36, 20


class Preview:
    """Draws the same x_T with the moving average, η = 0; process 0 does so, on its first device.

    Along τ, by default of `PREVIEW_STEPS`.
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        schedule: Schedule,
        image_shape: tuple[int, int, int],
        num_classes: int | None,
        mesh: Mesh,
        seed: int,
        say: Callable[[str], None],
        tau: Sequence[int] | None = None,
    ):
        self._gather = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(mesh))
        few = timesteps(schedule.num_steps, min(PREVIEW_STEPS, schedule.num_steps))
        self._sampler = make_sampler(Model(apply_fn, None, schedule), few if tau is None else tau)
        labels = None if num_classes is None else jnp.arange(PREVIEW_IMAGES) % num_classes
        self._labels = {} if labels is None else {"labels": labels}
        self._shape, self._seed, self._say = image_shape, seed, say
        self._can_show = image_shape[2] in (1, 3)
        self._preparing: threading.Thread | None = None

    def prepare(self, ema: Params) -> None:
        """Compiles beside the training, where that does not take its processor."""
        if jax.default_backend() == "cpu" or jax.process_count() > 1 or not self._can_show:
            return
        copied = jax.tree.map(jnp.copy, self._gather(ema))  # as the state is soon donated
        self._preparing = threading.Thread(target=self._draw, args=(copied,))
        self._preparing.start()

    def _draw(self, whole: Params) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
        x_T = initial_noise(jax.random.key(self._seed), PREVIEW_IMAGES, self._shape)
        return self._sampler(x_T, params=own, **self._labels)

    def __call__(self, ema: Params, step: int, log: MetricsLog) -> None:
        whole = self._gather(ema)
        if not self._can_show:
            self._say(f"no picture of step {step}: images have {self._shape[2]} channels")
        elif jax.process_index() == 0:
            if self._preparing:
                self._preparing.join()
            images = np.asarray(self._draw(whole))
            if np.isfinite(images).all():
                log.picture(step, grid(images, scale=max(1, 64 // self._shape[0])))
            else:
                self._say(f"no picture of step {step}: the samples are not finite")
