"""Appendix A: a network of categories, trained on black-and-white digits and sampled at several S.

    python -m experiments.discrete [--data digits | mnist] [--out results/discrete]

A small U-Net learns f(x_0|x_t) of binarised digits (K = 2) by the cross-entropy to which Appendix A
reduces its objective, each t with weight 1 as γ = 1 in Eq. 5. Of every five images the first is
held out. Samples are scored as images of 0 and 255 by the Fréchet distance to all of the data,
beside real images and independent pixels; the network by the variational bound, in bits per pixel
of held-out images. The paper reports no figures for this case.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax import categorical, data
from ddim_jax.networks import unet
from ddim_jax.storage.weights_file import load_weights, save_weights
from ddim_jax.training.presets import PRESETS
from ddim_jax.training.step import TrainState, ema_rate, init_state, make_optimizer
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment
from experiments.table2 import mean_se

K = 2
ROWS: dict[str, dict[str, float]] = {
    "η = 0, largest σ": {"eta": 0.0},
    "η = 1, ancestral": {"eta": 1.0},
    "η = 0, σ = 0": {"eta": 0.0, "sigma": 0.0},
}
KEYS = dict(zip(ROWS, ("least", "ancestral", "sigma0")))  # of the cells' files
SMALL = {
    "steps": [1, 5, 10, 20, 100],
    "num_images": ["300"],
    "train_steps": 800,
    "train_batch": 64,
    "channels": 32,
    "bound_images": 128,
}
FULL = {
    "steps": [1, 5, 10, 20, 50, 100, 1000],
    "num_images": ["10000"],
    "train_steps": 20_000,
    "channels": 64,
    "bound_images": 2000,
}
HELP = {
    "train_steps": "updates of the network",
    "train_batch": "images in each",
    "channels": "width of the network, a multiple of 32",
    "bound_images": "held-out images in the variational bound",
}


@dataclasses.dataclass(frozen=True)
class Binarise:
    """uint8 → 0 or 255, at a threshold."""

    threshold: int = 128

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return np.where(image >= self.threshold, 255, 0).astype(np.uint8)


def main(argv: Sequence[str] | None = None) -> Cell:
    """Trains, samples and scores."""
    args = parse("discrete", __doc__.splitlines()[0], argv, SMALL, FULL, **HELP)
    if args.model or args.config or args.extractor not in (None, "pixels"):
        raise ValueError("discrete trains its own network, and compares pixels: no --model, "
                         "--config or --extractor")  # fmt: skip
    name = args.data or "digits"
    if name not in ("digits", "mnist"):
        raise ValueError(f"--data must be digits or mnist here, got {name!r}")
    args.extractor = "pixels"
    experiment = Experiment("discrete", args)
    experiment.dataset = data.load(name, data_dir=args.data_dir, transform=Binarise())
    experiment.begin(data=experiment.dataset.provenance)
    task = _Task(experiment, name)
    trained = experiment.cell("train", task.train)
    samples, bounds = [], []
    for s in args.steps:
        for row in ROWS:
            key = f"{KEYS[row]}-S{s}"
            cell = experiment.cell(key, partial(task.scored, s, row))
            samples.append({"row": row, "S": s, **cell})
        bounds.append({"S": s} | experiment.cell(f"bound-S{s}", partial(task.bound, s)))
    independent = experiment.cell("independent", task.independent)
    floor = experiment.floor(experiment.num_images(args.steps[0]))
    shown = [s for s in (1, 10, 100) if s in args.steps] or args.steps[:3]
    panels = {(r, f"S = {s}"): task.draw(s, r, 36) for r in ROWS for s in shown}
    panels["η = 0, largest σ", "for comparison"] = experiment.dataset.take(task.train_indices[:36])[
        "image"
    ]
    panels["η = 1, ancestral", "for comparison"] = task.independent_images(36)
    titles = dict.fromkeys(panels, "")
    titles["η = 0, largest σ", "for comparison"] = "real images"
    titles["η = 1, ancestral", "for comparison"] = "independent pixels"
    caption = (
        f"36 samples for each sampler and S, of a network of {trained['parameters']:,} parameters "
        f"trained for {args.train_steps:,} steps of {args.train_batch} on "
        f"{len(task.train_indices):,} black-and-white {name}."
    )
    cells = {"train": trained, "samples": samples, "bounds": bounds, "independent": independent}
    figure = drawing.panels(panels, titles)
    return experiment.finish(cells, figure, caption, floors=[floor], name=samples[0]["name"])


class _Task:
    """The data, the network, and what is done with them."""

    def __init__(self, experiment: Experiment, name: str):
        self.experiment, self.args, self.preset = experiment, experiment.args, PRESETS[name]()
        numbers = np.arange(len(experiment.dataset))
        self.held_out, self.train_indices = numbers[::5], numbers[numbers % 5 != 0]
        self.schedule = ddim.linear_schedule(1000)
        self.config = dataclasses.replace(
            self.preset.model, in_channels=K, channels=self.args.channels
        )
        self.network = unet.make_apply(self.config)
        self.key = jax.random.key(self.args.seed)

    def states(self, indices: np.ndarray) -> jax.Array:
        """Images as categories, (n, H, W) int32."""
        images = self.experiment.dataset.take(indices)["image"]
        return jnp.asarray(images[..., 0] // 255, jnp.int32)

    def logits(self, params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        """(B, H, W) categories → (B, H, W, K) logits of x_0."""
        return self.network(params, 2 * jax.nn.one_hot(x, K) - 1, t)

    @property
    def params(self) -> Any:
        """The moving average of training."""
        return load_weights(self.args.out / "weights.safetensors")[0]

    def train(self) -> Cell:
        """Minimises −log f(x_0|x_t), t uniform in 1..T."""
        config = dataclasses.replace(
            self.preset.train,
            num_updates=self.args.train_steps,
            batch_size=self.args.train_batch,
            warmup_steps=min(100, self.args.train_steps),
            seed=self.args.seed,
        )
        optimizer = make_optimizer(config)

        def loss(params: Any, x_0: jax.Array, key: jax.Array) -> jax.Array:
            t_key, x_key = jax.random.split(key)
            t = jax.random.randint(t_key, x_0.shape[:1], 1, self.schedule.num_steps + 1)
            x_t = self.noised(x_0, t, x_key)
            logits = self.logits(params, x_t, t)
            return categorical.cross_entropy_bound(self.schedule, logits, x_0, t, 0 * t).mean()

        @jax.jit
        def update(state: TrainState, x_0: jax.Array) -> tuple[TrainState, jax.Array]:
            key = jax.random.fold_in(self.key, state.step)
            value, gradient = jax.value_and_grad(loss)(state.params, x_0, key)
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = jax.tree.map(jnp.add, state.params, updates)
            rate = ema_rate(state.step, config.ema_decay)
            ema = jax.tree.map(lambda e, p: e + rate * (p - e), state.ema, params)
            return TrainState(state.step + 1, params, ema, opt_state), value

        params = unet.build(self.config, self.key)[1]
        state = init_state(params, config)
        images, rng = self.states(self.train_indices), np.random.default_rng(self.args.seed)
        losses = []
        for _ in range(config.num_updates):
            state, value = update(state, images[rng.integers(len(images), size=config.batch_size)])
            losses.append(value)
        last = float(np.mean(jax.device_get(losses[-100:])))
        if not np.isfinite(last):
            raise FloatingPointError("training diverged; change --seed or --channels")
        path = self.args.out / "weights.safetensors"
        save_weights(path, state.ema, {"config": dataclasses.asdict(self.config)}, overwrite=True)
        return {"loss_nats_per_pixel": last, "parameters": unet.count_params(params)}

    def noised(self, x_0: jax.Array, t: jax.Array, key: jax.Array) -> jax.Array:
        """x_t ~ q(x_t|x_0), Eq. 17."""
        log_q = categorical.forward_marginal(self.schedule, categorical.log_one_hot(x_0, K), t)
        return jax.random.categorical(key, log_q)

    @functools.cache  # noqa: B019 - one task a process
    def _sampler(self, steps: int, row: str) -> Callable[[Any, jax.Array], jax.Array]:
        """Jitted (params, indices) → x_0."""
        shape = self.experiment.dataset.image_shape[:2]
        tau = ddim.timesteps(self.schedule.num_steps, steps, self.args.spacing or "linear")

        def batch(params: Any, indices: jax.Array) -> jax.Array:
            def logits(x: jax.Array, t: jax.Array) -> jax.Array:
                return self.logits(params, x, t)

            x_T = categorical.initial(self.key, indices, shape, K)
            return categorical.sample(
                logits, x_T, self.schedule, tau, key=self.key, indices=indices, **ROWS[row]
            )

        return jax.jit(batch)

    def draw(self, steps: int, row: str, number: int | None = None) -> np.ndarray:
        """Samples as images, uint8 (n, H, W, 1)."""
        all_of_them = self.experiment.num_images(steps)
        number, size = number or all_of_them, min(self.args.batch_size, all_of_them)
        sampler, params = self._sampler(steps, row), self.params
        parts = [sampler(params, jnp.arange(i, i + size)) for i in range(0, number, size)]
        x_0 = np.concatenate(parts)[:number]
        if (x_0 < 0).any():
            raise FloatingPointError(f"samples of S = {steps} are not finite")
        return (255 * x_0[..., None]).astype(np.uint8)

    def scored(self, steps: int, row: str) -> Cell:
        """`draw`, scored."""
        return self.experiment.score(self.draw(steps, row))

    def bound(self, steps: int) -> Cell:
        """−ELBO of S steps in bits per pixel, over held-out images (App. A), at η = 1 and η = 0.

        KL(q(x_T|x_0) ‖ uniform) + Σ KL(q(x_s|x_t,x_0) ‖ p(x_s|x_t)) − log p(x_0|x_{τ_1}), one draw
        of each x_t per image. At η = 0 the process is the least stochastic one: the same
        network, another bound.
        """
        tau = ddim.timesteps(self.schedule.num_steps, steps, self.args.spacing or "linear")
        pairs = (jnp.asarray(tau), jnp.asarray(np.append(0, tau[:-1]).astype(tau.dtype)))

        @jax.jit
        def nats(params: Any, x_0: jax.Array, key: jax.Array) -> jax.Array:
            log_q = categorical.forward_marginal(
                self.schedule, categorical.log_one_hot(x_0, K), int(tau[-1])
            )
            start = (jnp.exp(log_q) * (log_q + float(np.log(K)))).sum((1, 2, 3))
            start = jnp.stack([start, start])

            def step(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> Any:
                t, s = (jnp.full(x_0.shape[:1], v) for v in pair)
                x_t = self.noised(x_0, t, jax.random.fold_in(key, pair[0]))
                logits = self.logits(params, x_t, t)
                kl = [
                    categorical.variational_loss(self.schedule, logits, x_0, x_t, t, s, eta)
                    for eta in (1.0, 0.0)
                ]
                return total + jnp.stack(kl).sum((2, 3)), None

            return jax.lax.scan(step, start, pairs)[0]

        chosen = self.held_out[: self.args.bound_images]
        size, params = self.args.batch_size, self.params
        parts = [
            nats(params, self.states(chosen[i : i + size]), jax.random.fold_in(self.key, i))
            for i in range(0, len(chosen), size)
        ]
        pixels = int(np.prod(self.experiment.dataset.image_shape))
        ancestral, least = np.concatenate(parts, axis=1) / (pixels * np.log(2))
        (bits, se), (least_bits, least_se) = mean_se(ancestral), mean_se(least)
        return {"bits": bits, "se": se, "least_bits": least_bits, "least_se": least_se,
                "images": len(chosen)}  # fmt: skip

    def independent_images(self, number: int) -> np.ndarray:
        """Pixels drawn independently, each as often white as in the training images."""
        rng = np.random.default_rng(self.args.seed)
        white = self._white()
        return (255 * (rng.random((number, *white.shape)) < white[None])[..., None]).astype(
            np.uint8
        )

    def independent(self) -> Cell:
        """What a model of independent pixels scores, and its bits per held-out pixel."""
        white = self._white()
        x = np.asarray(self.states(self.held_out[: self.args.bound_images]), bool)
        nats = -np.where(x, np.log(white)[None], np.log1p(-white)[None]).mean()
        number = self.experiment.num_images(self.args.steps[0])
        score = self.experiment.score(self.independent_images(number))
        return score | {"bits": float(nats / np.log(2))}

    def _white(self) -> np.ndarray:
        """(H, W) share of white, with one of each colour added."""
        x = np.asarray(self.states(self.train_indices), np.float64)
        return (x.sum(axis=0) + 1) / (len(x) + 2)


if __name__ == "__main__":
    run(main)
