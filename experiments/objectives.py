"""What to predict and how to weigh it: ε, v, x_0, min-SNR, EDM's scaling, zero terminal SNR.

    python -m experiments.objectives [--data digits | mnist | FILE.npz] [--out results/objectives]

Networks of one preset learn from the same batches, for as many updates, and are scored by the
Fréchet distance at η = 0 from the same x_T. The data lie on the device; but for a CPU, whose loops
are slow, many updates are one call. What a run is (seed, length, learning rate, γ, schedule) are
arguments of the compiled program: one compilation serves all that predict alike. An .npz file holds
`images`, uint8 (N, H, W[, C]), and is learned by the network of the preset with images of its shape.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddim_jax as ddim
from ddim_jax import data
from ddim_jax.data import Dataset
from ddim_jax.evaluation import features, frechet_jackknife, moments
from ddim_jax.networks import unet
from ddim_jax.pictures.images import to_model, to_uint8
from ddim_jax.process.prediction import Predictor
from ddim_jax.sampling.plan import Plan
from ddim_jax.sampling.plan import run as run_plan
from ddim_jax.training.presets import PRESETS, Preset
from ddim_jax.training.step import TrainConfig, TrainState, ema_rate, init_state, make_optimizer
from experiments import drawing
from experiments.arguments import parse, run
from experiments.common import Cell, Experiment, jackknife_blocks


class Objective(NamedTuple):
    """What a network learns, and γ_t and ᾱ_t of it."""

    prediction: str
    gamma: str = "one"
    zero_terminal_snr: bool = False


OBJECTIVES = {
    "eps": Objective("eps"),
    "v": Objective("v"),
    "x_0": Objective("x_0"),
    "v-min-snr-5": Objective("v", "min-snr-5"),
    "x_0-min-snr-5": Objective("x_0", "min-snr-5"),
    "eps-min-snr-5": Objective("eps", "min-snr-5"),
    "edm": Objective("edm", "edm"),
    "v-zero-snr": Objective("v", zero_terminal_snr=True),
}
MORE = {
    "edm-one": Objective("edm"),
    "edm-min-snr-5": Objective("edm", "min-snr-5"),
    "eps-bound": Objective("eps", "bound"),
    "v-bound": Objective("v", "bound"),
    "v-edm": Objective("v", "edm"),
    "v-p2": Objective("v", "experiments.objectives:p2"),
    "x_0-zero-snr": Objective("x_0", zero_terminal_snr=True),
    "edm-zero-snr": Objective("edm", "edm", True),
}
SMALL = {"objectives": list(OBJECTIVES), "seeds": [0], "updates": [0], "steps": [10, 50],
         "num_images": ["2000"], "recipes": ["preset"], "chunk": 100}  # fmt: skip
FULL = {"seeds": [0, 1, 2]}
HELP = {
    "objectives": f"of {', '.join(OBJECTIVES | MORE)}",
    "seeds": "of the network and its batches",
    "updates": "lengths of training, each with its own decay of the rate; 0 for the preset's",
    "recipes": "the preset's, or name=value[,name=value]: learning_rate, warmup_steps, ema_decay, …",
    "chunk": "updates in one call, where that is no CPU",
}
NUMBERS = ("num_updates", "learning_rate", "warmup_steps", "grad_clip", "adam_b1", "adam_b2",
           "adam_eps", "ema_decay", "seed")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> Cell:
    """Trains and scores every objective."""
    words = {"without": ["extractor"], **HELP}
    args = parse("objectives", __doc__.splitlines()[0], argv, SMALL, FULL, **words)
    if args.model or args.config or args.schedule or args.prediction:
        raise ValueError("objectives trains its own networks: no --model, --config, --schedule or "
                         "--prediction")  # fmt: skip
    if unknown := sorted(set(args.objectives) - set(OBJECTIVES | MORE)):
        raise ValueError(f"no objective {unknown[0]!r}; choose of {', '.join(OBJECTIVES | MORE)}")
    dataset = _dataset(args.data or "digits", args.data_dir)
    preset = _preset(dataset)
    args.updates = [n or preset.train.num_updates for n in args.updates]
    recipes = {recipe: _recipe(recipe, preset.train) for recipe in args.recipes}
    args.extractor = "pixels"
    experiment = Experiment("objectives", args)
    experiment.dataset = dataset
    network = dataclasses.replace(preset.model, dtype=args.dtype or preset.model.dtype)
    bench = _Bench(experiment, preset, network)
    experiment.begin(data=dataset.provenance, network=dataclasses.asdict(network),
                     train=dataclasses.asdict(preset.train), sigma_data=bench.sigma_data)  # fmt: skip
    cells = []
    for name in args.objectives:
        for recipe, config in recipes.items():
            for updates in args.updates:
                for seed in args.seeds:
                    now = dataclasses.replace(config, num_updates=updates, seed=seed)
                    key = f"{name}-{recipe}-{updates}-seed{seed}"
                    cell = experiment.cell(key, partial(bench.judged, key, name, now))
                    run_of = {"objective": name, "recipe": recipe, "updates": updates, "seed": seed}
                    cells.append({**run_of, **cell})
    rows = [row for s in args.steps for row in summary(cells, s)]
    for row in rows:
        print(f"{row['objective']}, {row['recipe']}, {row['updates']} updates, S = {row['S']}: "
              f"{row['distance']:.4f} ± {row['se']:.4f}", flush=True)  # fmt: skip
    series: dict[str, Any] = {}
    for row in rows:
        label = ", ".join([row["objective"], *([row["recipe"]] if len(recipes) > 1 else []),
                           *([f"{row['updates']:,}"] if len(args.updates) > 1 else [])])  # fmt: skip
        for values, name in zip(series.setdefault(label, ([], [], [])), ("S", "distance", "se")):
            values.append(row[name])
    floors = [experiment.floor(n) for n in sorted({experiment.num_images(s) for s in args.steps})]
    caption = (
        f"FD-pixels at η = 0 of {experiment.num_images(args.steps[0]):,} samples, mean over seeds "
        f"{', '.join(map(str, args.seeds))}; bars are one standard error."
    )
    figure = drawing.lines(series, "network calls S", "FD-pixels")
    return experiment.finish(cells, figure, caption, rows=rows, floors=floors, name="FD-pixels")


def summary(cells: Sequence[Cell], steps: int) -> list[Cell]:
    """Means over seeds at one S, with the standard error of each.

    Over several seeds it is the scatter of the seeds, which holds that of sampling; of one seed it
    is the jackknife's, which knows nothing of training.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if str(steps) in cell["distance"]:
            group = (cell["objective"], cell["recipe"], cell["updates"])
            groups.setdefault(group, []).append(cell)
    rows = []
    for (objective, recipe, updates), group in groups.items():
        values = np.array([cell["distance"][str(steps)] for cell in group])
        sampling = float(np.mean([cell["se"][str(steps)] for cell in group]))
        se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else sampling
        rows.append({"objective": objective, "recipe": recipe, "updates": updates, "S": steps,
                     "distance": float(values.mean()), "se": se, "sampling_se": sampling,
                     "seeds": len(values)})  # fmt: skip
    return rows


def p2(schedule: ddim.Schedule, prediction: ddim.Prediction) -> np.ndarray:
    """P2 weighting (Choi et al. 2022, Eq. 8) with k = 1, exponent 1: 1/(1 + SNR) on the error of ε.

    A γ of one's own, given by module:function: that error is the output's times √ᾱ_t for v.
    """
    if prediction.kind != "v":
        raise ValueError(f"p2 is written for v here, got {prediction.kind!r}")
    a = np.asarray(schedule.alpha_bar, np.float64)
    return (1 - a) * a


class _Bench:
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

    def predicting(self, prediction: ddim.Prediction, schedule: ddim.Schedule) -> Predictor:
        """The network, of one prediction type, for one schedule."""
        own = {"sigma_data": prediction.sigma_data} if prediction.kind == "edm" else {}
        made: Predictor = ddim.predicts(self.apply_fn, prediction.kind, schedule=schedule, **own)
        return made

    @functools.cache  # noqa: B019 - one bench a process
    def trainer(self, prediction: ddim.Prediction, cosine_decay: bool) -> Callable[..., Any]:
        """Jitted (state, indices, images, schedule, γ, numbers) → (state, losses).

        The step of `ddim_jax.training.make_train_step` for networks without dropout or classes.
        """

        def update(state: TrainState, indices: Any, images: Any, schedule: Any, gamma: Any,
                   numbers: Any) -> tuple[TrainState, jax.Array]:  # fmt: skip
            config: Any = SimpleNamespace(cosine_decay=cosine_decay, **numbers)
            apply_fn = self.predicting(prediction, schedule)
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
            denoise = partial(self.predicting(prediction, schedule), params)
            x_0 = run_plan(denoise, x_T, plan)[0]
            return jnp.where(jnp.isfinite(x_0).all(), to_uint8(x_0).astype(jnp.int32), -1)

        return jax.jit(draw)

    def judged(self, key: str, name: str, config: TrainConfig) -> Cell:
        """Trains one network and scores it at every S; a run that diverges has no scores."""
        objective, args, began = (
            (OBJECTIVES | MORE)[name],
            self.experiment.args,
            time.perf_counter(),
        )
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


def _recipe(words: str, config: TrainConfig) -> TrainConfig:
    """The preset's configuration with name=value,… in it."""
    changes: dict[str, Any] = {}
    for word in words.split(",") if words != "preset" else ():
        name, _, value = word.partition("=")
        own = getattr(config, name, None)
        if name not in (*NUMBERS[1:-1], "batch_size", "cosine_decay"):
            raise ValueError(f"--recipes takes preset, or name=value with a name of "
                             f"{', '.join(NUMBERS[1:-1])}, batch_size, cosine_decay; got {word!r}")  # fmt: skip
        try:
            changes[name] = value == "True" if isinstance(own, bool) else type(own)(value)
        except ValueError:
            raise ValueError(f"--recipes: {name} is no {type(own).__name__}: {value!r}") from None
    return dataclasses.replace(config, **changes)


def _dataset(name: str, data_dir: str | None) -> Dataset:
    """digits, a TFDS name, or the images of an .npz file."""
    path = pathlib.Path(name)
    if path.suffix != ".npz":
        return data.load(name, data_dir=data_dir)
    with np.load(path) as file:
        if "images" not in file.files:
            raise ValueError(f"{path} must hold an array images, it holds {', '.join(file.files)}")
        images = file["images"]
        labels = file["labels"] if "labels" in file.files else np.full(len(images), -1)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{path}: images must be uint8 (N, H, W) or (N, H, W, C), got "
                         f"{images.dtype} {images.shape}")  # fmt: skip
    sha = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return Dataset(path.stem, "train", len(images), shape, None, {"name": path.name, "sha256": sha},
                   lambda i: (images[i], labels[i].astype(np.int32)))  # fmt: skip


def _preset(dataset: Dataset) -> Preset:
    """The preset of that name, or with images of that shape."""
    presets = [make() for make in PRESETS.values()]
    found = [p for p in presets if p.model.image_shape == dataset.image_shape]
    if not found:
        raise ValueError(f"no preset has images of {dataset.image_shape}; there are "
                         f"{', '.join(str(p.model.image_shape) for p in presets)}")  # fmt: skip
    if found[0].train.flip or found[0].model.dropout:
        raise ValueError(f"preset {found[0].name} flips its images or drops out, which is not done here")  # fmt: skip
    return found[0]


if __name__ == "__main__":
    run(main)
