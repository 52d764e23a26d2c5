"""Training and drawing on the device: many runs of one program, many updates in one call."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddim_jax as ddim
from ddim_jax.evaluation import features, frechet_jackknife, moments
from ddim_jax.networks import unet
from ddim_jax.pictures.images import to_model, to_uint8
from ddim_jax.sampling.plan import Plan
from ddim_jax.sampling.plan import run as run_plan
from ddim_jax.training.config import TrainConfig
from ddim_jax.training.presets import Preset
from ddim_jax.training.step import TrainState, ema_rate, init_state, make_optimizer
from experiments.common import Cell, Experiment
from experiments.judging import jackknife_blocks

NUMBERS = ("num_updates", "learning_rate", "warmup_steps", "grad_clip", "adam_b1", "adam_b2",
           "adam_eps", "ema_decay", "seed")  # fmt: skip


class Objective(NamedTuple):
    """What a network learns, and γ_t and ᾱ_t of it."""

    prediction: str
    gamma: str = "one"
    zero_terminal_snr: bool = False


class Bench:
    """The data on the device, one program for each prediction, and what is done with them."""

    def __init__(self, experiment: Experiment, preset: Preset, network: unet.UNetConfig):
        self.experiment, self.preset, self.network = experiment, preset, network
        self.apply_fn = unet.make_apply(network)
        images = experiment.dataset.arrays()["image"]
        self.images, self.shape = jnp.asarray(images), experiment.dataset.image_shape
        self.sigma_data = round(float(np.std(images / 127.5)), 2)
        self.on_cpu = jax.default_backend() == "cpu"
        self.x_T = functools.cache(
            lambda n: ddim.initial_noise(jax.random.key(experiment.args.seed), n, self.shape)
        )

    @functools.cached_property
    def reference(self) -> Any:
        """Moments of all data."""
        return moments(self.features(np.asarray(self.images)))

    def features(self, images: np.ndarray) -> np.ndarray:
        """(n, d) pixels as the extractor has them."""
        return np.concatenate(list(features(self.experiment.extractor, images)))

    @functools.cache  # noqa: B019 - one bench a process
    def trainer(self, prediction: ddim.Prediction, cosine_decay: bool) -> Callable[..., Any]:
        """Jitted (state, indices, images, schedule, γ, numbers) → (state, losses).

        The step of `ddim_jax.training.make_train_step` for networks without dropout or classes.
        """

        def update(state: TrainState, indices: Any, images: Any, schedule: Any, gamma: Any,
                   numbers: Any) -> tuple[TrainState, jax.Array]:  # fmt: skip
            config: Any = SimpleNamespace(cosine_decay=cosine_decay, **numbers)
            apply_fn = ddim.predicts(self.apply_fn, prediction, schedule=schedule)
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            key = jax.random.split(jax.random.split(key, 3)[0])[0]

            def loss(params: Any) -> jax.Array:
                denoise = partial(apply_fn, params)
                return ddim.loss(denoise, schedule, to_model(images[indices]), key, gamma)

            value, grads = jax.value_and_grad(loss)(state.params)
            optimizer = make_optimizer(config)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            rate = ema_rate(state.step, config.ema_decay)
            ema = jax.tree.map(lambda e, p: e + rate * (p - e), state.ema, params)
            return TrainState(state.step + 1, params, ema, opt_state), value

        def many(state: TrainState, indices: Any, *given: Any) -> tuple[TrainState, jax.Array]:
            return jax.lax.scan(lambda state, i: update(state, i, *given), state, indices)

        return jax.jit(update if self.on_cpu else many, donate_argnums=0)

    def trained(self, key: str, objective: Objective, config: TrainConfig) -> tuple[Any, float]:
        """The moving average after training, and the mean of the last 100 losses."""
        prediction, schedule = self.prediction(objective), self.schedule(objective)
        gamma = ddim.find_gamma(objective.gamma)(schedule, prediction).astype(np.float32)
        numbers = {n: np.asarray(getattr(config, n), _kind(n)) for n in NUMBERS}
        given = (self.images, schedule, gamma, numbers)
        train = self.trainer(prediction, config.cosine_decay)
        params = unet.build(self.network, jax.random.key(config.seed))[1]
        state, losses, began = init_state(params, config), [], time.perf_counter()
        shown, first = began, True
        batches = batch_numbers(len(self.images), config.batch_size, config.seed)
        size = 1 if self.on_cpu else math.gcd(config.num_updates, self.experiment.args.chunk)
        for done in range(0, config.num_updates, size):
            indices = np.stack([next(batches) for _ in range(size)])
            state, value = train(state, indices[0] if self.on_cpu else indices, *given)
            losses.append(value)
            last = done + size == config.num_updates
            if first or last or time.perf_counter() - shown > 15:
                now = float(np.mean(jax.device_get(value)))
                shown, first = time.perf_counter(), False
                print(f"  {key}: update {done + size:,} of {config.num_updates:,}, loss {now:.4f}, "
                      f"{shown - began:.1f} s", flush=True)  # fmt: skip
        return state.ema, float(np.mean(np.concatenate([np.ravel(v) for v in losses])[-100:]))

    @functools.cache  # noqa: B019
    def sampler(self, prediction: ddim.Prediction) -> Callable[..., jax.Array]:
        """Jitted (params, x_T, plan, schedule) → uint8 images."""

        def draw(params: Any, x_T: jax.Array, plan: Plan, schedule: ddim.Schedule) -> jax.Array:
            network = ddim.predicts(self.apply_fn, prediction, schedule=schedule)
            denoise = partial(network, params)
            x_0 = run_plan(denoise, x_T, plan)[0]
            return jnp.where(jnp.isfinite(x_0).all(), to_uint8(x_0).astype(jnp.int32), -1)

        return jax.jit(draw)

    def judged(self, key: str, objective: Objective, config: TrainConfig) -> Cell:
        """Trains one network and scores it at every S; a run that diverges has no scores."""
        args, began = self.experiment.args, time.perf_counter()
        params, loss = self.trained(key, objective, config)
        cell: Cell = {"loss": loss, "train_seconds": time.perf_counter() - began, "distance": {},
                      "se": {}, "num_images": {}, **objective._asdict()}  # fmt: skip
        if not math.isfinite(loss):
            print(f"  {key}: diverged", flush=True)
            return cell | {"loss": None}
        schedule, sampler = self.schedule(objective), self.sampler(self.prediction(objective))
        for steps in args.steps:
            number = self.experiment.num_images(steps)
            tau = ddim.timesteps(schedule.num_steps, steps, args.spacing or "linear")
            plan = ddim.ddim(0.0)(schedule, tau)
            size = min(args.batch_size, number)
            x_T = self.x_T(-(-number // size) * size)
            parts = [sampler(params, x_T[i : i + size], plan, schedule)
                     for i in range(0, number, size)]  # fmt: skip
            images = np.concatenate(jax.device_get(parts))[:number]
            if images.min() < 0:
                print(f"  {key}: samples at S = {steps} are not finite", flush=True)
                continue
            found = self.features(images.astype(np.uint8))
            value, se = frechet_jackknife(found, self.reference, jackknife_blocks(number))
            cell["distance"][str(steps)], cell["se"][str(steps)] = value, se
            cell["num_images"][str(steps)] = number
            print(f"  {key}: FD-pixels {value:.4f} ± {se:.4f} at S = {steps}, "
                  f"{time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip
        return cell

    def prediction(self, objective: Objective) -> ddim.Prediction:
        """With σ_d of the data."""
        own = {"sigma_data": self.sigma_data} if objective.prediction == "edm" else {}
        return ddim.Prediction(objective.prediction, **own)

    def schedule(self, objective: Objective) -> ddim.Schedule:
        """The preset's, of zero terminal SNR if asked for."""
        zero = objective.zero_terminal_snr
        return dataclasses.replace(self.preset.schedule, zero_terminal_snr=zero).build()


def batch_numbers(size: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Images of batch 0, 1, …, (B,) int32: an endless stream of epochs, each a permutation."""
    stream, epoch = np.empty(0, np.int32), 0
    while True:
        while len(stream) < batch_size:
            order = np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)
            stream, epoch = np.concatenate([stream, order]), epoch + 1
        yield stream[:batch_size]
        stream = stream[batch_size:]


def _kind(name: str) -> Any:
    return {"seed": np.uint32, "num_updates": np.int32, "warmup_steps": np.int32}.get(
        name, np.float32
    )
