"""Training: one pure step (loss, Adam, moving average) and the host loop around it (optax).

The step's randomness is a function of (seed, step), and a checkpoint holds everything else that
the next step depends on; so a resumed run is the unbroken run, bit for bit.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ddim_jax.checkpoint import Checkpoints, restore, saved_steps
from ddim_jax.data import Dataset, batches
from ddim_jax.images import to_model
from ddim_jax.objective import loss
from ddim_jax.schedule import Schedule

Params = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
ApplyFn = Callable[..., jax.Array]  # (params, x, t, dropout_key=None, labels=None) -> ε

# These may change when a run is resumed; anything else would make it another run.
FREE_ON_RESUME = ("num_steps", "log_every", "checkpoint_every", "keep")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are those of the paper's CIFAR-10 run (with Ho et al.'s warm-up).

    Attributes:
      batch_size: images per step.
      num_steps: optimiser steps in all.
      learning_rate: Adam's, after the warm-up.
      warmup_steps: the rate of step n = 0, 1, … is learning_rate · min(1, (n+1)/warmup_steps).
      cosine_decay: multiply the rate by ½(1 + cos(π n/num_steps)): better for short runs. num_steps
        is then part of what a resumed run must keep.
      grad_clip: largest global norm of the gradient; a larger one is scaled down to it.
      adam_b1: decay of the mean of the gradient.
      adam_b2: decay of the mean of its square.
      adam_eps: Adam's ε.
      ema_decay: of the moving average, see `ema_rate`.
      flip: mirror each image left-right with probability 1/2.
      label_dropout: for class-conditional networks, the probability of hiding a label from the
        network (classifier-free guidance); unused by unconditional ones.
      seed: of everything random in training.
      log_every: steps between lines of metrics.
      checkpoint_every: steps between checkpoints, a multiple of `log_every`.
      keep: how many checkpoints stay.

    Raises:
      ValueError: a field outside its range.

    Example:
      >>> TrainConfig(batch_size=128, num_steps=1000, warmup_steps=100).learning_rate
      0.0002
    """

    batch_size: int = 128
    num_steps: int = 800_000
    learning_rate: float = 2e-4
    warmup_steps: int = 5000
    cosine_decay: bool = False
    grad_clip: float = 1.0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    ema_decay: float = 0.9999
    flip: bool = False
    label_dropout: float = 0.1
    seed: int = 0
    log_every: int = 100
    checkpoint_every: int = 5000
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_steps", "log_every", "checkpoint_every", "keep"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("learning_rate", "grad_clip", "adam_eps"):
            _require(0 < getattr(self, name) < math.inf, self, name, "positive and finite")
        for name in ("adam_b1", "adam_b2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, self, name, "in [0, 1)")
        _require(self.warmup_steps >= 0, self, "warmup_steps", "at least 0")
        _require(0 <= self.label_dropout <= 1, self, "label_dropout", "in [0, 1]")
        _require(0 <= self.seed < 2**32, self, "seed", "in 0..2**32 - 1")
        multiple = self.checkpoint_every % self.log_every == 0
        _require(multiple, self, "checkpoint_every", f"a multiple of log_every = {self.log_every}")


class TrainState(NamedTuple):
    """All that the next step depends on, beside its batch."""

    step: jax.Array  # () int32, updates made so far
    params: Params  # float32
    ema: Params  # float32, shaped like params
    opt_state: optax.OptState


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam (Kingma & Ba 2015) with warm-up, and decay if asked.

    Args:
      config: its optimiser fields.

    Returns:
      An optax transformation.

    Example:
      >>> optimizer = make_optimizer(TrainConfig(warmup_steps=0, learning_rate=0.5))
      >>> updates, _ = optimizer.update(jnp.ones(1), optimizer.init(jnp.zeros(1)))
      >>> round(float(updates[0]), 3)
      -0.5
    """

    def rate(count: jax.Array) -> jax.Array:
        warm = jnp.minimum((count + 1) / max(config.warmup_steps, 1), 1.0)
        if config.cosine_decay:
            warm *= (1 + jnp.cos(jnp.pi * count / config.num_steps)) / 2
        return config.learning_rate * warm

    optimizer = optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adam(rate, config.adam_b1, config.adam_b2, config.adam_eps),
    )

    def update(
        grads: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            return optimizer.update(grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def ema_rate(step: jax.Array, ema_decay: float) -> jax.Array:
    """Weight of the new parameters in the average: 1 − min(ema_decay, (1 + n)/(10 + n)).

    The average of a short run thus forgets its start; past n ≈ 9/(1 − ema_decay) steps the
    weight is 1 − ema_decay (TensorFlow's `ExponentialMovingAverage` with `num_updates`).

    Args:
      step: () n ≥ 0, updates made before this one.
      ema_decay: in [0, 1).

    Returns:
      () float32.

    Example:
      >>> ema_rate(jnp.array([0, 90, 10**6]), 0.999)
      Array([0.9  , 0.09 , 0.001], dtype=float32)
    """
    return jnp.maximum(1.0 - ema_decay, 9.0 / (10.0 + step.astype(jnp.float32)))


def init_state(params: Params, config: TrainConfig) -> TrainState:
    """The state before the first step: ema = params, copied, so that both may be donated.

    Args:
      params: pytree of float32 arrays.
      config: decides the optimiser.

    Returns:
      `TrainState` at step 0.

    Example:
      >>> int(init_state({"w": jnp.zeros(3)}, TrainConfig()).step)
      0
    """
    params = jax.tree.map(jnp.array, params)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.int32(0), params, ema, make_optimizer(config).init(params))


def make_train_step(
    apply_fn: ApplyFn,
    schedule: Schedule,
    config: TrainConfig,
    num_classes: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update of Eq. 5 (γ = 1) by Adam, and of the moving average: θ̄ ← θ̄ + ema_rate·(θ − θ̄).

    Every random number derives from `fold_in(key(config.seed), state.step)`.

    Args:
      apply_fn: (params, x (B, H, W, C), t (B,), dropout_key, labels=…) -> ε (B, H, W, C); labels
        are passed only if `num_classes` is given.
      schedule: of the forward process.
      config: optimiser, average, flips, seed.
      num_classes: K of a class-conditional network, whose label K means "none".

    Returns:
      Jitted (state, {"image": uint8 (B, H, W, C), "label": int32 (B,)}) -> (state, metrics). The
      given state is donated: do not use it again. metrics are scalars on the device: "loss" and
      "grad_norm" (before clipping).

    Example:
      >>> from ddim_jax.schedule import linear_schedule
      >>> def apply_fn(params, x, t, dropout_key=None):
      ...     return params["scale"] * x
      >>> config = TrainConfig(batch_size=4)
      >>> step = make_train_step(apply_fn, linear_schedule(1000), config)
      >>> state = init_state({"scale": jnp.zeros(())}, config)
      >>> images = jnp.zeros((4, 8, 8, 1), jnp.uint8)
      >>> state, metrics = step(state, {"image": images, "label": jnp.zeros(4, jnp.int32)})
      >>> int(state.step), sorted(metrics)
      (1, ['grad_norm', 'loss'])
    """
    optimizer = make_optimizer(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss_key, dropout_key, flip_key, label_key = jax.random.split(key, 4)
        x_0 = to_model(batch["image"])
        if config.flip:
            mirrored = jax.random.bernoulli(flip_key, 0.5, (x_0.shape[0], 1, 1, 1))
            x_0 = jnp.where(mirrored, x_0[:, :, ::-1], x_0)
        kwargs = {}
        if num_classes is not None:
            hidden = jax.random.bernoulli(label_key, config.label_dropout, batch["label"].shape)
            kwargs["labels"] = jnp.where(hidden, num_classes, batch["label"])

        def objective(params: Params) -> jax.Array:
            def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
                return apply_fn(params, x, t, dropout_key, **kwargs)

            return loss(denoise, schedule, x_0, loss_key)

        value, grads = jax.value_and_grad(objective)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = ema_rate(state.step, config.ema_decay)
        ema = jax.tree.map(lambda e, p: e + rate * (p - e), state.ema, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def fit(
    apply_fn: ApplyFn,
    params: Params,
    schedule: Schedule,
    dataset: Dataset,
    config: TrainConfig,
    directory: str | PathLike[str],
    *,
    facts: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    resume: bool = False,
    progress: bool = True,
    on_log: Callable[[TrainState, dict[str, float]], None] | None = None,
) -> TrainState:
    """Trains, or continues training, in a run folder.

    The folder gets `checkpoints/`, `metrics.jsonl` and TensorBoard's event file. A line of metrics
    every `log_every` steps holds the step, means of loss and gradient norm since the last line,
    images per second (compilation included in the first) and seconds since the start. Losses and
    gradients are looked at when they are logged, always before a checkpoint: a run that diverges
    stops at the next line, names the first bad step, and leaves only good checkpoints.

    Args:
      apply_fn: see `make_train_step`.
      params: initial parameters; on resume only their shapes matter.
      schedule: of the forward process.
      dataset: images to train on.
      config: how to train.
      directory: the run folder, made if missing.
      facts: JSON-able, kept in every checkpoint's config beside "train" (the TrainConfig) and
        "data" (the data set's provenance): {"model": …}, what a reader needs to rebuild apply_fn.
      num_classes: see `make_train_step`.
      resume: continue from the latest checkpoint, or anew if the run died before its first;
        without it the folder must not hold a run.
      progress: show a progress bar on stderr.
      on_log: called with the state and each line of metrics; the state dies with the next step,
        so copy what you keep.

    Returns:
      The state after `config.num_steps` steps.

    Raises:
      FileExistsError: the folder holds a run and `resume` is False.
      CheckpointError: `resume`, but no readable checkpoint that fits `params`.
      ValueError: `resume`, but the saved configuration differs; the message shows where.
      FloatingPointError: a loss or gradient is not finite.
    """
    directory = pathlib.Path(directory)
    folder, log_path = directory / "checkpoints", directory / "metrics.jsonl"
    config_dict = {"train": dataclasses.asdict(config), "data": dataset.provenance, **(facts or {})}
    config_dict = json.loads(json.dumps(config_dict))  # as a checkpoint returns it
    if not resume and (saved_steps(folder) or log_path.exists()):
        raise FileExistsError(
            f"{directory} already holds a run; resume it, or choose another folder"
        )
    if num_classes not in (None, dataset.num_classes):
        raise ValueError(
            f"the network is for {num_classes} classes, {dataset.name} has {dataset.num_classes}"
        )
    state = init_state(params, config)
    iterator = batches(dataset, config.batch_size, config.seed)
    if resume and (saved_steps(folder) or not log_path.exists()):  # else it died before its first
        restored = restore(folder, state)
        _check_same_run(restored.config, config_dict)
        state = restored.state
        iterator.set_state(restored.data_state)
    step = start = int(state.step)
    train_step = make_train_step(apply_fn, schedule, config, num_classes)
    directory.mkdir(parents=True, exist_ok=True)
    _forget_after(log_path, start)
    pending: list[Metrics] = []
    began = logged = time.perf_counter()
    with (
        Checkpoints(folder, config.keep) as checkpoints,
        log_path.open("a") as log,
        SummaryWriter(str(directory), purge_step=start + 1) as board,
        tqdm(total=config.num_steps, initial=start, unit="step", disable=not progress) as bar,
    ):
        while step < config.num_steps:
            state, metrics = train_step(state, jax.device_put(next(iterator)))
            step += 1
            pending.append(metrics)
            last = step == config.num_steps
            if step % config.log_every and not last:
                continue
            line = {"step": step, **_means(pending, step)}  # waits for the device
            now = time.perf_counter()
            line["images_per_second"] = len(pending) * config.batch_size / (now - logged)
            line["seconds"] = now - began
            log.write(json.dumps(line) + "\n")
            log.flush()
            for name in ("loss", "grad_norm", "images_per_second"):
                board.add_scalar(name, line[name], step)
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} im/s")
            bar.update(len(pending))
            if on_log:
                on_log(state, line)
            if step % config.checkpoint_every == 0 or last:
                checkpoints.save(step, state, iterator.get_state(), config_dict)
            pending, logged = [], now
    return state


def _means(pending: list[Metrics], step: int) -> dict[str, float]:
    """Means over the steps that ended with `step`; a FloatingPointError names the first bad one."""
    fetched = jax.device_get(pending)
    for at, metrics in enumerate(fetched, start=step - len(fetched) + 1):
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {at}: training stopped. Checkpoints are from "
                    "before it; try a lower learning_rate or grad_clip in a new run"
                )
    return {name: float(sum(m[name] for m in fetched) / len(fetched)) for name in fetched[0]}


def _check_same_run(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        paths = jax.tree_util.tree_flatten_with_path(config, is_leaf=lambda v: v is None)[0]
        named = {jax.tree_util.keystr(p, simple=True, separator="."): v for p, v in paths}
        free = {f"train.{name}" for name in FREE_ON_RESUME}
        if named.get("train.cosine_decay"):
            free.remove("train.num_steps")
        return {name: value for name, value in named.items() if name not in free}

    a, b = flat(saved), flat(wanted)
    differ = [
        f"  {name}: saved {a.get(name, 'nothing')!r}, now {b.get(name, 'nothing')!r}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
    if differ:
        raise ValueError(
            "\n".join(["a resumed run must keep its configuration, but these differ:", *differ])
        )


def _forget_after(log_path: pathlib.Path, step: int) -> None:
    """Drops lines of steps that are about to be run again."""
    if log_path.exists():
        lines = log_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        log_path.write_text("".join(kept))


def _require(condition: bool, config: TrainConfig, name: str, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)!r}")
