"""Sampling parallel in time: many steps of a τ at once, the same x_0 in fewer rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, call, check_batch, is_concrete, wide
from ddim_jax.process.prediction import to_x0_eps
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.stepping import towards
from ddim_jax.sampling.plan import Method, Plan, check_network, noise_keys, rows, step_noise
from ddim_jax.sampling.sampler import plan_of


class ParallelSample(NamedTuple):
    """What `parallel_sample` returns."""

    x_0: Array  # (B, ...) the images, as `sample` draws them
    rounds: Array  # () int32, sequential network calls, each on the whole window: at most S
    error: Array  # (B,) Σ RMS of the steps' defects that were accepted, at most `tolerance`


class _State(NamedTuple):
    """Between rounds: the window's first step, how many steps of it are final, its states."""

    first: Array  # () the window is steps first, …, first + W − 1
    done: Array  # () steps whose end is final
    moved: Array  # () by how many steps the window has just moved: as many states are unknown
    x: Array  # (W+1, B, ...) where those steps begin, and where the last one ends
    past: Array  # (M−1, B, ...) the predictions before the window, oldest first
    error: Array  # (B,)
    rounds: Array  # ()


def parallel_sample(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    method: Method | None = None,
    noise: Array | None = None,
    window: int = 64,
    tolerance: ArrayLike = 1e-3,
    sharding: jax.sharding.NamedSharding | None = None,
) -> ParallelSample:
    """`sample`, with a window of steps computed at once (Shih et al. 2023; Tang et al. 2024).

    A sampler is the triangular system x_{n+1} = Φ_n(x_n), n = 0, …, S − 1, x_0 there being x_T, as
    the noise in Φ_n depends on (key, image, t) alone. Each round calls the network at all states of
    the window, in one batch, and moves them by Picard's iteration around a linear part a_n x_n:

        x_{n+1} ← x_{n+1} + Σ_{j≤n} (Π_{j<i≤n} a_i) d_j,  with the defects d_j = Φ_j(x_j) − x_{j+1}
        a_n = √ᾱ_s √ᾱ_t + √(1 − ᾱ_s − σ²) √(1 − ᾱ_t)

    This a_n leaves the term of v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 to the iteration, which is 0 for data
    ~ N(0, I): such a chain takes one round. On the shipped digits, S = 50, Shih et al.'s a_n = 1
    takes as many rounds at η = 0, a third more at η = 0.5 and twice as many at η = 1; √ᾱ_s/√ᾱ_t,
    the ODE of Eq. 14, takes more than twice as many at any η; and the acceleration of Tang et al.
    saves this one a round or two.

    Where x_n is final and d_n = 0 nothing moves, not by a bit, and the end of the window's first
    step is Φ_n(x_n) itself. So each round makes at least one step final, as `sample` would: never
    more than S rounds, and with tolerance 0 the result is that of `sample`, but for the rounding
    of a network called on another batch. Otherwise steps are final while their defects, in RMS
    over an image and summed from x_T on, are within `tolerance` × the share of τ that is done, for
    every image of the batch. Their sum is reported: an honest measure of the chain that was
    followed, but x_0 itself can be off by more where the later steps amplify.

    A round costs a network call on window × B images. That saves time where it takes less than
    S/rounds times a call on B, as on a GPU that B images leave idle; not on a CPU. Memory: the
    network's for window × B images, and about 5 × window × B states. Pure and not jitted, as
    `sample` is.

    Args:
      denoise, x_T, schedule, tau, eta, key, method, noise: as in `sample`; with a memory too. The
        network is mapped over the window by `jax.vmap`, so that it sees batches of B images, with
        one t each, as from `sample`.
      window: how many steps are computed at once, ≥ 1; more than S are S.
      tolerance: ≥ 0, in units of x, may be traced. Not below about 1e-2 for a network in bfloat16,
        whose own rounding would be iterated on.
      sharding: how (window, B, ...) states are laid over devices while the network is called, such
        as `NamedSharding(mesh, PartitionSpec("window"))`; the window must divide by the devices.

    Returns:
      A `ParallelSample`. A NaN of the network makes NaN images, as in `sample`, after S rounds.

    Raises:
      TypeError, ValueError: as `sample`; window or tolerance is out of range, or the window does
        not divide by the devices.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule, tau = ddim.linear_schedule(1000), ddim.timesteps(1000, 50)
      >>> denoise = ddim.oracle.mixture(schedule, jnp.array([[-1.0], [1.0]]), variance=0.04)
      >>> x_T, key = ddim.initial_noise(jax.random.key(0), 4, (1,)), jax.random.key(1)
      >>> fast = ddim.parallel_sample(denoise, x_T, schedule, tau, 1.0, key)
      >>> x_0 = ddim.sample(denoise, x_T, schedule, tau, 1.0, key)
      >>> bool(jnp.abs(fast.x_0 - x_0).max() < 1e-3), int(fast.rounds) < 25
      (True, True)
    """
    x_T = check_batch(x_T)
    plan = plan_of(method, eta, schedule, tau)
    keys = noise_keys(plan, x_T, key, noise)
    size = _check(plan, x_T, window, tolerance, sharding)
    check_network(denoise, plan)
    c = plan.steps
    linear = c.sqrt_alpha_bar_s * c.sqrt_alpha_bar_t + c.direction * c.sqrt_one_minus_alpha_bar_t
    x, steps = wide(x_T), plan.t.shape[0]
    table = (rows(plan, x.dtype), jnp.asarray(linear).astype(x.dtype), noise)
    allowed = jnp.asarray(tolerance).astype(x.dtype) / steps
    place = jnp.arange(size, dtype=jnp.int32)

    def body(state: _State) -> _State:
        slice_at = lambda v: jax.lax.dynamic_slice_in_dim(v, state.first, size)  # noqa: E731
        now, a, z = jax.tree.map(slice_at, table)
        drawn = _noise(keys, z, now, x)
        # What has just come into the window is guessed: the linear part and the noise alone.
        guess = _times(a, state.x[:-1]) + drawn - state.x[1:]
        unknown = _where(place >= size - state.moved, guess, 0)
        x_n = state.x.at[1:].add(_accumulate(a, unknown))

        begins = x_n[:-1]
        if sharding is not None:
            begins = jax.lax.with_sharding_constraint(begins, sharding)
        ends, seen = _advance(denoise, now, begins, state.past, x_T.dtype)
        ends = ends + drawn
        defect = ends - x_n[1:]
        start = state.done - state.first
        x_n = x_n.at[1:].add(_accumulate(a, _where(place >= start, defect, 0)))
        x_n = x_n.at[1:].set(_where(place == start, ends, x_n[1:]))

        rms = jnp.sqrt(jnp.square(defect).reshape(size, x.shape[0], -1).mean(axis=2))
        total = state.error[None] + jnp.cumsum(_where(place >= start, rms, 0), axis=0)
        good = total.max(axis=1) <= allowed * (state.first + place + 1).astype(x.dtype)
        count = jnp.cumprod(jnp.where(place >= start, good, True)).sum(dtype=jnp.int32)
        done = state.first + jnp.minimum(count + 1, size)
        error = jnp.where(count > start, total[count - 1], state.error)
        first = jnp.minimum(done, steps - size)
        moved = first - state.first
        return _State(
            first, done, moved, _shift(x_n, moved), _shift(seen, moved)[: len(state.past)],
            error, state.rounds + 1,
        )  # fmt: skip

    memory = 0 if plan.weights is None else plan.weights.shape[1] - 1
    start = _State(
        jnp.int32(0), jnp.int32(0), jnp.int32(size),
        jnp.zeros((size + 1, *x.shape), x.dtype).at[0].set(x),
        jnp.zeros((memory, *x.shape), x.dtype), jnp.zeros(x.shape[0], x.dtype), jnp.int32(0),
    )  # fmt: skip
    end = jax.lax.while_loop(lambda state: state.done < steps, body, start)
    return ParallelSample(end.x[-1].astype(x_T.dtype), end.rounds, end.error)


def _advance(
    denoise: Denoiser, now: Plan, x: Array, past: Array, dtype: Any
) -> tuple[Array, Array]:
    """Φ of W steps at once but for their noise, and all predictions known, oldest first."""
    prediction = prediction_of(denoise)

    def predict(row: Plan, x: Array) -> tuple[Array, Array]:
        output = call(denoise, x, jnp.full(x.shape[:1], row.t), dtype)
        x_0, eps = prediction.x0_eps(row.told or row.steps, x, output)
        return (x_0, eps) if row.told is None else to_x0_eps(row.steps, x, eps)

    x_0, eps = jax.vmap(predict)(now, x)
    if now.weights is not None:
        past = jnp.concatenate([past, eps if now.remembers == "eps" else x_0])
        size, memory = now.weights.shape

        def of_the_last(weights: Array) -> Any:
            last = (past[memory - 1 - j : memory - 1 - j + size] for j in range(memory))
            return sum(_times(weights[:, j], prediction) for j, prediction in enumerate(last))

        if (corrects := now.corrects) is not None:
            x = x + of_the_last(corrects)
        again = partial(to_x0_eps, prediction=now.remembers)
        x_0, eps = jax.vmap(again)(now.steps, x, of_the_last(now.weights))
    return jax.vmap(towards)(now.steps, x_0, eps), past


def _noise(keys: Any, z: Any, now: Plan, like: Array) -> Array:
    """σ z of W steps, (W, B, ...), or 0."""
    if now.steps.sigma is None:
        return jnp.zeros((), like.dtype)
    if z is None:
        z = jax.vmap(lambda t: step_noise(keys, t, like))(now.t)
    return _times(now.steps.sigma, z.astype(like.dtype))


def _accumulate(a: Array, change: Array) -> Array:
    """Σ_{j≤n} (Π_{j<i≤n} a_i) change_j: how changes of single steps add up along a window."""
    change = jnp.where(jnp.isfinite(change), change, 0)  # or 0 · NaN would reach earlier steps
    below = jnp.tril(jnp.ones((len(a), len(a)), bool), -1)
    products = jnp.tril(jnp.cumprod(jnp.where(below, a[:, None], 1), axis=0))
    return jnp.einsum("nj,j...->n...", products, change, precision="highest")


def _times(a: Array, x: Array) -> Array:
    """a (W,) times x (W, ...)."""
    return a.reshape(-1, *(1,) * (x.ndim - 1)) * x


def _where(condition: Array, x: Array, other: ArrayLike) -> Array:
    """jnp.where with a (W,) condition over (W, ...) arrays."""
    return jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, other)


def _shift(x: Array, by: Array) -> Array:
    """x[by:], with zeros at the end."""
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, jnp.zeros_like(x)]), by, len(x))


def _check(plan: Plan, x_T: Array, window: int, tolerance: ArrayLike, sharding: Any) -> int:
    """The window's size."""
    known = {"t", "steps", "weights", "told", "remembers", "corrects"}
    names = [f.name for f in dataclasses.fields(plan) if f.name not in known]
    if other := [name for name in names if getattr(plan, name) is not None]:
        raise ValueError(f"parallel_sample knows no methods with {other}; use `sample`")
    if isinstance(window, bool) or not isinstance(window, int | np.integer) or window < 1:
        raise ValueError(f"window must be at least 1 step, an int, got {window!r}")
    if jnp.shape(tolerance) or (is_concrete(tolerance) and not tolerance >= 0):
        raise ValueError(f"tolerance must be >= 0 (0 is exact), one number, got {tolerance}")
    if not len(x_T):
        raise ValueError(f"x_T must hold an image at least, got shape {x_T.shape}")
    size = min(window, plan.t.shape[0])
    if sharding is not None:
        try:
            sharding.shard_shape((size, *x_T.shape))
        except ValueError as error:
            raise ValueError(
                f"a window of {size} steps for {x_T.shape} cannot be laid over {sharding}: choose "
                "a window, not above S, that divides by the devices"
            ) from error
    return size
