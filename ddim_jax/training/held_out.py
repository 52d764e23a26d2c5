"""The loss of images that are not learned from, at fixed t and noise: a smooth curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from ddim_jax.data import Dataset, batches
from ddim_jax.pictures.images import to_model
from ddim_jax.process.schedule import Schedule
from ddim_jax.training import parallel
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.step import DENOISING, ApplyFn, Batch, Params, TrainState, objective

MOST_BATCHES = 8  # of the held-out images, as they cost as much as a few updates


def make_held_out(
    apply_fn: ApplyFn,
    schedule: Schedule,
    dataset: Dataset | None,
    config: TrainConfig,
    num_classes: int | None,
    mesh: Mesh,
    loss: Partial = DENOISING,
) -> Callable[[TrainState], dict[str, float]] | None:
    """The training loss on held-out images, with the weights and with their moving average.

    Image, t and noise of each term stay what they are, functions of `config.seed`: only the
    weights change from one call to the next. Nothing is flipped, dropped out or unlabelled.

    Args:
      apply_fn, schedule, config, num_classes, mesh: as `make_train_step` takes them; apply_fn says
        what it predicts.
      dataset: the held-out images; at most `MOST_BATCHES` batches of them are used, a last one
        is filled up from the first. Or None.
      loss: of the train step.

    Returns:
      state → {"held_out_loss": of params, "held_out_loss_ema": of the average}, the same in every
      process; or None for no images.
    """
    if dataset is None:
        return None
    count = min(math.ceil(len(dataset) / config.batch_size), MOST_BATCHES)
    stream = batches(
        dataset,
        config.batch_size,
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    kept = list(itertools.islice(stream, count))
    key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)  # no step of training

    _, gamma = objective(schedule, config)

    @jax.jit
    def batch_loss(params: Params, batch: Batch, number: jax.Array, loss: Partial) -> jax.Array:
        labels = {} if num_classes is None else {"labels": batch["label"]}
        denoise = partial(apply_fn, params, **labels)
        x_0 = to_model(batch["image"])
        return loss(denoise, schedule, x_0, jax.random.fold_in(key, number), gamma, **labels)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = np.zeros(2)
        for number, batch in enumerate(kept):
            placed = parallel.put_batch(mesh, batch)
            both = [
                batch_loss(p, placed, np.uint32(number), loss) for p in (state.params, state.ema)
            ]
            sums += jax.device_get(both)
        raw, ema = sums / count
        return {"held_out_loss": float(raw), "held_out_loss_ema": float(ema)}

    return evaluate
