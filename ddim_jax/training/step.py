"""The training step: loss, Adam, moving average; one pure function for 1 device or many (optax).

Its randomness is a function of (seed, step, number of the image in its batch). `loop.fit` calls it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from ddim_jax.arrays import ArrayLike
from ddim_jax.pictures.images import to_model
from ddim_jax.process.gamma import find_gamma
from ddim_jax.process.gaussian import coefficients
from ddim_jax.process.objective import loss
from ddim_jax.process.prediction import Prediction
from ddim_jax.process.predictor import Predictor, predicts
from ddim_jax.process.schedule import Schedule
from ddim_jax.training import parallel
from ddim_jax.training.config import TrainConfig

Params = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
ApplyFn = Callable[..., jax.Array]  # (params, x, t, dropout_key=None, labels=None) -> ε


def denoising(*args: Any, labels: jax.Array | None = None, **kwargs: Any) -> jax.Array:
    """Eq. 5: `loss`, for which the network alone reads the labels."""
    return loss(*args, **kwargs)


DENOISING = Partial(denoising)


def objective(schedule: Schedule, config: TrainConfig) -> tuple[Prediction, np.ndarray | None]:
    """What the network learns to predict, and γ_t: (T+1,), or None for γ = 1.

    Args:
      schedule: of the forward process.
      config: its prediction, sigma_data and gamma.

    Returns:
      (`Prediction`, γ).

    Raises:
      ValueError: ε is to be learned where ᾱ_T = 0, or the function of γ does not fit.

    Example:
      >>> from ddim_jax.process.schedule import linear_schedule
      >>> prediction, gamma = objective(linear_schedule(1000), TrainConfig(gamma="min-snr-5"))
      >>> prediction.kind, gamma.shape
      ('eps', (1001,))
    """
    prediction = Prediction(config.prediction, sigma_data=config.sigma_data)
    prediction.check(coefficients(schedule, schedule.num_steps, 0))
    if config.gamma == "one":
        return prediction, None
    gamma = np.asarray(find_gamma(config.gamma)(schedule, prediction))
    if gamma.shape != (schedule.num_steps + 1,):
        raise ValueError(
            f"gamma {config.gamma} must return (T+1,) = ({schedule.num_steps + 1},) weights, got "
            f"shape {gamma.shape}"
        )
    return prediction, gamma


class TrainState(NamedTuple):
    """All that the next step depends on, beside its batch."""

    step: jax.Array  # () int32, updates made so far
    params: Params  # float32
    ema: Params  # float32, shaped like params
    opt_state: optax.OptState


def make_optimizer(
    config: TrainConfig, num_updates: ArrayLike | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam (Kingma & Ba 2015) with warm-up, and decay if asked.

    Args:
      config: its optimiser fields.
      num_updates: in place of `config.num_updates`, over which the rate decays; may be traced.

    Returns:
      An optax transformation.

    Example:
      >>> optimizer = make_optimizer(TrainConfig(warmup_steps=0, learning_rate=0.5))
      >>> updates, _ = optimizer.update(jnp.ones(1), optimizer.init(jnp.zeros(1)))
      >>> round(float(updates[0]), 3)
      -0.5
    """

    updates = config.num_updates if num_updates is None else num_updates

    def rate(count: jax.Array) -> jax.Array:
        warm = jnp.minimum((count + 1) / jnp.maximum(config.warmup_steps, 1), 1.0)
        if config.cosine_decay:
            warm *= (1 + jnp.cos(jnp.pi * count / updates)) / 2
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
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update of Eq. 5 by Adam, and of the moving average: θ̄ ← θ̄ + ema_rate·(θ − θ̄).

    Every random number derives from `fold_in(key(config.seed), state.step)`.

    Args:
      apply_fn: (params, x (B, H, W, C), t (B,), dropout_key, labels=…) -> ε (B, H, W, C); labels
        are passed only if `num_classes` is given.
      schedule: of the forward process.
      config: what is predicted, optimiser, average, flips, seed.
      num_classes: K of a class-conditional network, whose label K means "none".
      mesh: from `parallel.make_mesh`: the batch is split over all of it, and the state as
        `parallel.state_sharding` says: parameters are gathered for the forward pass, gradients
        are summed over all devices, and each device updates its own part.

    Returns:
      Jitted (state, {"image": uint8 (B, H, W, C), "label": int32 (B,)}, loss=`DENOISING`,
      num_updates=None) -> (state, metrics). The given state is donated: do not use it again.
      metrics are scalars on the device: "loss", "grad_norm" (before clipping) and "param_norm"
      (after the update). `loss` is a `jax.tree_util.Partial`, whose arrays are arguments of the
      compiled step too: (denoise, schedule, x_0, key, gamma, indices=…, labels=…) -> scalar, as
      `process.loss`; so is `num_updates`, see `make_optimizer`.

    Raises:
      ValueError: apply_fn says that it predicts something else than `config.prediction`; or as
        `objective`.

    Example:
      >>> from ddim_jax.process.schedule import linear_schedule
      >>> def apply_fn(params, x, t, dropout_key=None):
      ...     return params["scale"] * x
      >>> config = TrainConfig(batch_size=4)
      >>> step = make_train_step(apply_fn, linear_schedule(1000), config)
      >>> state = init_state({"scale": jnp.zeros(())}, config)
      >>> images = jnp.zeros((4, 8, 8, 1), jnp.uint8)
      >>> state, metrics = step(state, {"image": images, "label": jnp.zeros(4, jnp.int32)})
      >>> int(state.step), sorted(metrics)
      (1, ['grad_norm', 'loss', 'param_norm'])
    """
    parts, (prediction, gamma) = config.accumulate, objective(schedule, config)
    apply_fn = predicts(apply_fn, prediction, schedule=schedule)

    def own(tree: Any) -> Any:  # each device its part, as the state is kept
        if mesh is None:
            return tree
        return with_sharding_constraint(tree, parallel.state_sharding(mesh, tree))

    def whole(tree: Any) -> Any:
        return with_sharding_constraint(tree, parallel.replicated(mesh)) if mesh else tree

    def split(x: jax.Array) -> jax.Array:  # (B, ...) -> (parts, B/parts, ...), none moves
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, parallel.AXES)
        return with_sharding_constraint(x, NamedSharding(mesh, spec)) if mesh else x

    def part_loss(params: Params, key: jax.Array, part: Batch, loss: Partial) -> jax.Array:
        loss_key, dropout_key = jax.random.split(key)
        dropout_key = jax.random.fold_in(dropout_key, part["number"][0])
        labels = {"labels": part["label"]} if num_classes is not None else {}

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            return apply_fn(params, x, t, dropout_key, **labels)

        return loss(
            Predictor(denoise, prediction),
            schedule,
            part["x_0"],
            loss_key,
            gamma,
            indices=part["number"],
            **labels,
        )

    def train_step(
        state: TrainState,
        batch: Batch,
        loss: Partial = DENOISING,
        num_updates: ArrayLike | None = None,
    ) -> tuple[TrainState, Metrics]:
        optimizer = make_optimizer(config, num_updates)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss_key, flip_key, label_key = jax.random.split(key, 3)
        x_0, label = to_model(batch["image"]), batch["label"]
        if config.flip:
            mirrored = jax.random.bernoulli(flip_key, 0.5, (x_0.shape[0], 1, 1, 1))
            x_0 = jnp.where(mirrored, x_0[:, :, ::-1], x_0)
        if num_classes is not None:
            hidden = jax.random.bernoulli(label_key, config.label_dropout, label.shape)
            label = jnp.where(hidden, num_classes, label)
        numbered = {"x_0": x_0, "label": label, "number": jnp.arange(x_0.shape[0])}
        params = whole(state.params)

        def gradient(part: Batch) -> tuple[jax.Array, Params]:
            value, grads = jax.value_and_grad(part_loss)(params, loss_key, part, loss)
            return value, own(grads)

        if parts == 1:
            value, grads = gradient(numbered)
        else:
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            total, _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None),
                zero,
                jax.tree.map(split, numbered),
                # XLA runs the gradient of a convolution slowly inside a loop on CPU: no loop there.
                unroll=jax.default_backend() == "cpu",
            )
            value, grads = jax.tree.map(lambda v: v / parts, total)
        norm = optax.tree.norm(grads)
        with jax.named_scope("optimiser"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            rate = ema_rate(state.step, config.ema_decay)
            ema = jax.tree.map(lambda e, p: e + rate * (p - e), state.ema, params)
        new = TrainState(state.step + 1, params, ema, opt_state)
        if config.skip_nonfinite:
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            new = new._replace(step=state.step + 1)
        metrics = {"loss": value, "grad_norm": norm, "param_norm": optax.tree.norm(new.params)}
        return own(new), whole(metrics)

    return jax.jit(train_step, donate_argnums=0)
