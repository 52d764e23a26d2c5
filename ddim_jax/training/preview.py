"""Pictures of a run on its way."""

from __future__ import annotations

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


def make_preview(
    apply_fn: ApplyFn,
    schedule: Schedule,
    image_shape: tuple[int, int, int],
    num_classes: int | None,
    mesh: Mesh,
    seed: int,
    say: Callable[[str], None],
    tau: Sequence[int] | None = None,
) -> Callable[[Params, int, MetricsLog], None]:
    """Draws the same x_T with the moving average, η = 0; process 0 does so, on its first device.

    Along τ, by default of `PREVIEW_STEPS`.
    """
    gather = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(mesh))

    few = timesteps(schedule.num_steps, min(PREVIEW_STEPS, schedule.num_steps))
    sampler = make_sampler(Model(apply_fn, None, schedule), few if tau is None else tau)
    labels = {} if num_classes is None else {"labels": jnp.arange(PREVIEW_IMAGES) % num_classes}

    def preview(ema: Params, step: int, log: MetricsLog) -> None:
        whole = gather(ema)
        if image_shape[2] not in (1, 3):
            say(f"no picture of step {step}: images have {image_shape[2]} channels")
        elif jax.process_index() == 0:
            own = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
            x_T = initial_noise(jax.random.key(seed), PREVIEW_IMAGES, image_shape)
            images = np.asarray(sampler(x_T, params=own, **labels))
            if np.isfinite(images).all():
                log.picture(step, grid(images, scale=max(1, 64 // image_shape[0])))
            else:
                say(f"no picture of step {step}: the samples are not finite")

    return preview
