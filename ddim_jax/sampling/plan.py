"""A method as a table, and the one scan that runs any of them.

Every sampler here is the DDIM step of Eq. 12 with a weighted sum of the last predictions in the
place of the prediction,

    x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε̄ + σ z,   ε̄ = Σ_j w_j ε_j   (or x̄_0 = Σ_j w_j x̂_0,j),

where j counts calls back in time, and each of (x̂_0, ε̄) fixes the other at x_t. A corrector first
adds Σ_j c_j m_j of the same memory to x_t. The numbers are known before the run: a method is a
function (schedule, τ) → `Plan`, one row a step, and two methods of one memory length are one
compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import (
    Array,
    ArrayLike,
    Denoiser,
    call,
    check_batch,
    image_keys,
    is_concrete,
    normal,
    wide,
)
from ddim_jax.process.gaussian import Coefficients, coefficients
from ddim_jax.process.prediction import to_x0_eps
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps
from ddim_jax.process.stepping import towards
from ddim_jax.sampling.learned import LearnedVariance, with_variance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A method's numbers for one τ: S rows, in the order of sampling.

    Attributes:
      t: (S,) int, what the network is told.
      steps: `Coefficients` of (S,) for the state, from its t to its s; sigma is None where no
        noise is ever added.
      weights: (S, M) of the last M predictions, newest first; None where the newest is all, and
        nothing is remembered.
      told: `Coefficients` of (S,) of the t that the network is told, where it is not the state's
        (encoders); else None.
      remembers: which predictions `weights` and `corrects` sum: `"eps"` or `"x_0"`.
      corrects: (S, M), newest first: what of the last M predictions is added to the state after
        the network was called with it and before it steps on; None where nothing is. Beside
        `weights`, whose memory it sums.
      learned: the σ of each pixel is the network's own choice, between these; None where it is
        that of `steps`, which is then above 0 where there is any.

    Example:
      >>> import ddim_jax as ddim
      >>> plan = ddim.ddim()(ddim.linear_schedule(1000), [1, 10, 100])
      >>> plan.t.tolist(), plan.steps.sigma, plan.weights
      ([100, 10, 1], None, None)
    """

    t: Any
    steps: Coefficients
    weights: Any = None
    told: Coefficients | None = None
    remembers: str = dataclasses.field(default="eps", metadata={"static": True})
    corrects: Any = None
    learned: LearnedVariance | None = None


class Method(Protocol):
    """(schedule, τ) → `Plan`: float64 on the host where both are concrete."""

    def __call__(self, schedule: Schedule, tau: ArrayLike | Sequence[int], /) -> Plan: ...


def pairs(schedule: Schedule, tau: ArrayLike | Sequence[int]) -> tuple[Any, Any]:
    """The steps (t, s) of τ in the order of sampling: (τ_S, τ_{S−1}), …, (τ₁, 0), each (S,) int.

    Raises:
      ValueError: τ is no strictly increasing int vector in 1..T.

    Example:
      >>> import ddim_jax as ddim
      >>> t, s = pairs(ddim.linear_schedule(1000), [1, 10, 100])
      >>> t.tolist(), s.tolist()
      ([100, 10, 1], [10, 1, 0])
    """
    xp: Any = np
    if is_concrete(tau):
        tau = as_timesteps(np.asarray(tau), schedule.num_steps)
    else:
        xp, tau = jnp, jnp.asarray(tau)
        if tau.ndim != 1 or not jnp.issubdtype(tau.dtype, jnp.integer):
            raise ValueError(f"tau must be an int vector (S,), got {tau.dtype}{tau.shape}")
    return tau[::-1], xp.concatenate([tau[-2::-1], xp.zeros(1, tau.dtype)])


def euler(
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    sigma: ArrayLike | None = None,
) -> Plan:
    """DDIM's own plan, Eq. 12 with σ(η) of Eq. 16 or σ along τ: where every method starts.

    Raises:
      ValueError: τ, η or σ is out of range, or one of the latter is of another length than τ.

    Example:
      >>> import ddim_jax as ddim
      >>> euler(ddim.linear_schedule(1000), [1, 500, 1000], eta=1.0).steps.sigma.round(2).tolist()
      [0.96, 0.01, 0.0]
    """
    t, s = pairs(schedule, tau)
    steps = coefficients(schedule, t, s, _along("eta", eta, t), sigma=_along("sigma", sigma, t))
    noise = eta if sigma is None else sigma
    silent = is_concrete(noise) and not np.any(np.asarray(noise))
    return Plan(t, steps._replace(sigma=None) if silent else steps)


def run(
    denoise: Denoiser,
    x_T: Array,
    plan: Plan,
    keys: Array | None = None,
    keep: np.ndarray | None = None,
    noise: Array | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """The scan: x_T → x_0, along a plan.

    The network is traced once whatever S is; memory holds M predictions. The state and all
    coefficients are float32 at least; the network is given x in x_T's dtype.

    Args:
      denoise: the network, with what it predicts.
      x_T: (B, ...) floating.
      plan: of a method.
      keys: (B,) one key per image, from `image_keys`; None for no noise.
      keep: (S,) bool, the steps whose (x_t, x̂_0) are wanted; None for none of them.
      noise: (S, B, ...) the z themselves, in the order of sampling, in place of keys.

    Returns:
      (x_0, (x_t, x̂_0) of the kept steps, each (K, B, ...)), in x_T's dtype.
    """
    x_T = check_batch(x_T)
    if plan.corrects is not None and plan.weights is None:
        raise ValueError("a plan that corrects sums a memory: give it weights (S, M) too")
    if keys is not None and keys.shape != x_T.shape[:1]:
        raise ValueError(f"got keys of {keys.shape[0]} images for {x_T.shape[0]} images")
    x = wide(x_T)
    check_network(denoise, plan)
    keep = np.zeros(plan.t.shape[0], bool) if keep is None else keep
    num_kept = int(keep.sum())
    slots = np.where(keep, np.cumsum(keep) - 1, num_kept)  # the one out of range is dropped

    def body(carry: Any, row: Any) -> tuple[Any, None]:
        (x, past, kept), (now, slot, z) = carry, row
        z = z if keys is None else step_noise(keys, now.t, x)
        x_s, past, predicted = advance(denoise, x, past, now, z, x_T.dtype)
        if num_kept:
            kept = tuple(
                old.at[slot].set(new.astype(old.dtype), mode="drop")
                for old, new in zip(kept, (x, predicted), strict=True)
            )
        return (x_s, past, kept), None

    past = no_memory(plan, x)
    kept = tuple(jnp.zeros((num_kept, *x.shape), x_T.dtype) for _ in range(2))
    (x_0, _, kept), _ = jax.lax.scan(
        body, (x, past, kept), (rows(plan, x.dtype), slots.astype(np.int32), noise)
    )
    return x_0.astype(x_T.dtype), (kept[0], kept[1])


def no_memory(plan: Plan, x: Array) -> Array:
    """(M, B, ...) zeros: the predictions that a plan remembers before its first step."""
    memory = 0 if plan.weights is None else plan.weights.shape[-1]
    return jnp.zeros((memory, *x.shape), x.dtype)


def advance(
    denoise: Denoiser, x: Array, past: Array, now: Plan, z: Array | None, dtype: Any
) -> tuple[Array, Array, Array]:
    """One step of a plan.

    Args:
      denoise: the network, with what it predicts.
      x: (B, ...) the state.
      past: (M, B, ...) the last M predictions, newest first; see `no_memory`.
      now: one row of `rows`, without its axis.
      z: noise of x's shape, or None.
      dtype: in which the network is given x.

    Returns:
      (x_s, past, x̂_0 as the network predicts it).
    """
    t, steps = jnp.full(x.shape[:1], now.t), now.steps
    if now.learned is None:
        output = call(denoise, x, t, dtype)
    else:
        both = with_variance(denoise)(x.astype(dtype), t)
        output, v = (out.astype(x.dtype) for out in both)
        steps = now.learned.steps(steps, v)
    x_0, eps = prediction_of(denoise).x0_eps(now.told or now.steps, x, output)
    predicted = x_0
    if now.told is not None:
        x_0, eps = to_x0_eps(now.steps, x, eps)
    if now.weights is not None:
        past = jnp.concatenate([(eps if now.remembers == "eps" else x_0)[None], past[:-1]])
        mean = jnp.einsum("j,j...->...", now.weights, past)
        state = x if now.corrects is None else x + jnp.einsum("j,j...->...", now.corrects, past)
        x_0, eps = to_x0_eps(now.steps, state, mean, now.remembers)
    return towards(steps, x_0, eps, z), past, predicted


def check_network(network: Any, plan: Plan) -> None:
    """Raises ValueError where a network does not go with a plan, before anything is traced."""
    prediction_of(network).check(plan.told or plan.steps)
    if plan.learned is not None:
        with_variance(network)


def rows(plan: Plan, dtype: Any) -> Plan:
    """The plan on the device, as the input of a scan: t in int32, all else in `dtype`."""

    def cast(v: ArrayLike) -> Array:
        v = jnp.asarray(v)
        return v.astype(jnp.int32 if jnp.issubdtype(v.dtype, jnp.integer) else dtype)

    return jax.tree.map(cast, plan)


def with_noise(plan: Plan) -> Plan:
    """The plan in the program of those that add noise: σ = 0 where there is none."""
    steps = plan.steps
    if steps.sigma is not None:
        return plan
    return dataclasses.replace(plan, steps=steps._replace(sigma=steps.direction * 0))


def with_memory(plan: Plan, memory: int) -> Plan:
    """The plan in the program of those that remember so many predictions and correct: zeros.

    One that remembers nothing takes part as one of x̂_0.

    Raises:
      ValueError: it remembers more.

    Example:
      >>> import ddim_jax as ddim
      >>> plan = ddim.dpm_solver(2)(ddim.linear_schedule(1000), [1, 10, 100])
      >>> with_memory(plan, 3).weights.shape, with_memory(plan, 3).corrects.tolist()
      ((3, 3), [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    """
    if plan.weights is None:
        plan = dataclasses.replace(plan, weights=np.ones((len(plan.t), 1)), remembers="x_0")
    corrects = np.zeros((len(plan.t), 1)) if plan.corrects is None else plan.corrects
    if (own := np.shape(plan.weights)[1]) > memory:
        raise ValueError(f"the plan remembers {own} predictions, more than {memory}")
    weights, corrects = (
        np.pad(v, ((0, 0), (0, memory - np.shape(v)[1]))) for v in (plan.weights, corrects)
    )
    return dataclasses.replace(plan, weights=weights, corrects=corrects)


def single_rows(plan: Plan) -> Iterator[Plan]:
    """Plans of one step each, for a host that steps: one program for every S and τ."""
    plan = jax.tree.map(np.asarray, plan)
    for k in range(len(plan.t)):
        yield jax.tree.map(lambda v, k=k: v[k : k + 1], plan)


def noise_keys(
    plan: Plan, x_T: Array, key: Array | None, noise: Array | None = None
) -> Array | None:
    """One key an image for the noise of a run; None where there is no key, or z (S, B, ...) itself.

    Raises:
      ValueError: the plan adds noise and there is neither, or there are both, or z does not fit.
    """
    if noise is not None:
        if key is not None or plan.steps.sigma is None:
            raise ValueError("give noise to a sampler that adds some (eta > 0), and then no key")
        if np.shape(noise) != (wanted := (*plan.t.shape, *x_T.shape)):
            raise ValueError(f"noise must be (S, B, ...) = {wanted}, got shape {np.shape(noise)}")
        return None
    if key is not None:
        return image_keys(key, x_T.shape[0])
    if plan.steps.sigma is not None:
        raise ValueError("this sampler adds noise (eta > 0) and needs key=jax.random.key(...)")
    return None


def step_noise(keys: Array, t: Array, like: Array) -> Array:
    """z ~ N(0, I) of image k at t, from `fold_in(key of k, t)` alone."""
    draw = lambda key: normal(jax.random.fold_in(key, t), like.shape[1:], like.dtype)  # noqa: E731
    return jax.vmap(draw)(keys)


def _along(name: str, value: Any, t: Any) -> Any:
    """η or σ along τ, in the order of sampling."""
    if value is not None and np.shape(value) not in ((), t.shape):
        raise ValueError(
            f"{name} must be a scalar or one value per element of tau, {t.shape}, got shape "
            f"{np.shape(value)}"
        )
    if np.shape(value) == ():
        return value
    return (value if isinstance(value, jax.Array) else np.asarray(value))[::-1]
