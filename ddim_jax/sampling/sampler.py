"""Sampling: x_T down a τ, by any method, with any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, check_batch, image_keys, is_concrete, normal
from ddim_jax.process.predictor import Predictor, prediction_of, variance_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.methods import ddim
from ddim_jax.sampling.plan import Method, Plan, check_network, noise_keys, run, with_noise


class Trajectory(NamedTuple):
    """What a sampler saw on its way."""

    sample: Array  # (B, ...) the final x_0
    t: np.ndarray  # (K,) int32, decreasing
    x_t: Array  # (K, B, ...) the states
    x_0: Array  # (K, B, ...) the predictions x̂_0 made from them


class Network(Protocol):
    """What `make_sampler` needs of a model: a `Model` of `load_model`, or one of your own."""

    @property
    def apply_fn(self) -> Callable[..., Array]: ...  # (params, x (B, ...), t (B,), **inputs)

    @property
    def params(self) -> Any: ...

    @property
    def schedule(self) -> Schedule: ...


def initial_noise(
    key: Array, indices: ArrayLike, shape: Sequence[int], dtype: Any = jnp.float32
) -> Array:
    """x_T ~ N(0, I), image i from `fold_in(key, i)` alone.

    Image 5 is the same image in a batch of 1, 7 or 64, on 1 or 8 devices, and, rounded, in any
    dtype.

    Args:
      key: a JAX random key, or one for each image, (B,).
      indices: (B,) non-negative ints, the images' global numbers, or an int n for 0..n − 1.
      shape: the shape of one image, e.g. (32, 32, 3).
      dtype: a floating dtype; drawn in float32 (float64 for float64) and rounded to it.

    Returns:
      (B, *shape) standard normal.

    Raises:
      TypeError: key is no JAX key.
      ValueError: indices is not an int or a vector, or holds a negative number.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> x_T = ddim.initial_noise(jax.random.key(0), 7, (8, 8, 1))
      >>> bool((x_T[5] == ddim.initial_noise(jax.random.key(0), [5], (8, 8, 1))[0]).all())
      True
    """
    return jax.vmap(lambda k: normal(k, tuple(shape), dtype))(image_keys(key, indices))


def sample(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    method: Method | None = None,
    noise: Array | None = None,
) -> Array:
    """Sample x_0 from x_T along τ, by DDIM's steps or another method's (DDIM Eq. 12, §4.2).

    x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε_θ(x_t, t) + σ z for (t, s) = (τ_S, τ_{S−1}), …, (τ₁, 0)

    Pure and not jitted, so that every call compiles anew: jit your own closure with the weights as
    arguments, or see `make_sampler`. The network is traced once whatever S is, and memory does not
    grow with S. With concrete `schedule`, `tau` and η the coefficients are float64 from the host;
    the state is float32 whatever the network computes in.

    Args:
      denoise: (x (B, ...), t (B,) int32 in 1..T) → (B, ...), the network; it predicts ε unless
        `predicts` says otherwise.
      x_T: (B, ...) floating; see `initial_noise`.
      schedule: the noise schedule.
      tau: (S,) strictly increasing ints in 1..T; see `timesteps`.
      eta: η ≥ 0 of Eq. 16: 0 is DDIM, 1 is DDPM; a scalar, or (S,) along τ.
      key: a JAX random key, needed when σ may be above 0, or one for each image, see `image_keys`.
        Image k's noise depends on (key, k, t) alone. At η = 0 it is not used.
      method: in place of η: `ddim(sigma=...)`, `ddpm("large")`, `adams_bashforth(2)`, ….
      noise: (S, B, ...) floating, z of each step in the order of sampling, in place of a key.

    Returns:
      x_0, shape and dtype of x_T.

    Raises:
      TypeError: x_T is not floating.
      ValueError: τ, η or σ is out of range, a key is missing, η and a method, or a key and noise,
        are both given, or noise or the network's output has a wrong shape.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule = ddim.linear_schedule(1000)
      >>> root = jnp.sqrt(1 - schedule.alpha_bar)
      >>> exact = lambda x, t: root[t][:, None] * x  # the best ε for data ~ N(0, 1)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> ddim.sample(exact, x_T, schedule, ddim.timesteps(1000, 50)).shape
      (4, 2)
    """
    x_T = check_batch(x_T)
    plan = plan_of(method, eta, schedule, tau)
    keys = noise_keys(plan, x_T, key, noise)
    return run(denoise, x_T, plan, None if plan.steps.sigma is None else keys, noise=noise)[0]


def trajectory(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    method: Method | None = None,
    at: Sequence[int] | None = None,
) -> Trajectory:
    """Sample as `sample` does, and keep x_t and x̂_0 at chosen steps (DDIM Eq. 9 and 12).

    Args:
      denoise, x_T, schedule, tau, eta, key, method: as in `sample`; here τ must be concrete.
      at: the t to keep, some of τ; all of τ by default. Memory grows with their number alone.

    Returns:
      A `Trajectory`: the sample, and t (K,), x_t and x̂_0 (K, B, ...) in the order of sampling.

    Raises:
      ValueError: as `sample`, or `at` holds a step that τ does not visit.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.linear_schedule(1000)
      >>> path = ddim.trajectory(
      ...     lambda x, t: x, jnp.ones((4, 2)), schedule, [1, 500, 1000], at=[1000, 1]
      ... )
      >>> path.t.tolist(), path.x_0.shape
      ([1000, 1], (2, 4, 2))
    """
    if not is_concrete(tau):
        raise TypeError(
            "trajectory needs a concrete tau: the steps to keep are chosen before tracing"
        )
    x_T = check_batch(x_T)
    plan = plan_of(method, eta, schedule, tau)
    visited = np.asarray(plan.t)
    wanted = visited if at is None else np.unique(np.asarray(at))
    if wanted.size == 0 or not np.isin(wanted, visited).all():
        raise ValueError(f"at must name steps that tau visits, got {at}; tau visits {visited}")
    keys, keep = noise_keys(plan, x_T, key), np.isin(visited, wanted)
    x_0, states = run(denoise, x_T, plan, None if plan.steps.sigma is None else keys, keep)
    return Trajectory(x_0, visited[keep], *states)


def make_sampler(
    model: Network,
    tau: ArrayLike | Sequence[int] | None = None,
    eta: ArrayLike = 0.0,
    *,
    method: Method | None = None,
) -> Callable[..., Array]:
    """A jitted sampler `(x_T, key=None) → x_0` of a model.

    Weights, x_T, keys, η, τ's values and the method's table are arguments of one compiled function:
    changing them never recompiles; only another S, shape, dtype or memory length does, or going
    from no key to a key.

    Args:
      model: of `load_model`; or anything with `apply_fn`, `params` and `schedule`, such as
        `Model(apply_fn, params, schedule)`.
      tau: (S,) the default τ; by default `model.tau`, which a distilled model has.
      eta: the default η.
      method: the default method, in place of η.

    Returns:
      `sampler(x_T, key=None, *, eta=…, tau=…, method=…, params=model.params, **inputs)` → x_0, like
      `sample`; `inputs` are further arrays for apply_fn, such as `labels`.

    Raises:
      TypeError: no τ is given, and the model has none.
      ValueError: as `sample`, when the sampler is made or called.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> model = ddim.Model(lambda w, x, t: w * x, 0.5, ddim.linear_schedule(1000))
      >>> sampler = ddim.make_sampler(model, ddim.timesteps(1000, 10))
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (8, 8, 1))
      >>> sampler(x_T).shape, sampler(x_T, jax.random.key(1), eta=1.0, params=0.7).shape
      ((4, 8, 8, 1), (4, 8, 8, 1))
    """
    tau = getattr(model, "tau", None) if tau is None else tau
    if tau is None:
        raise TypeError("give tau, such as timesteps(1000, 50): only a distilled model has its own")
    apply_fn, schedule, default = model.apply_fn, model.schedule, (tau, eta, method)
    computed = getattr(model, "computed", lambda params: params)
    check_network(apply_fn, plan_of(method, eta, schedule, tau))

    @jax.jit
    def jitted(params: Any, inputs: Any, x_T: Array, plan: Plan, keys: Array | None) -> Array:
        return run(partial(apply_fn, computed(params), **inputs), x_T, plan, keys)[0]

    def sampler(
        x_T: Array,
        key: Array | None = None,
        *,
        eta: ArrayLike | None = None,
        tau: ArrayLike | Sequence[int] | None = None,
        method: Method | None = None,
        params: Any = None,
        **inputs: Any,
    ) -> Array:
        x_T = check_batch(x_T)
        if eta is None and method is None:
            eta, method = default[1:]
        plan = plan_of(
            method, 0.0 if eta is None else eta, schedule, default[0] if tau is None else tau
        )
        check_network(apply_fn, plan)
        keys = noise_keys(plan, x_T, key)
        if keys is not None:  # the program of every η
            plan = with_noise(plan)
        return jitted(model.params if params is None else params, inputs, x_T, plan, keys)

    return sampler


def watch(network: Any, callback: Callable[[Any], None]) -> Any:
    """A map of networks: the same, and the host is told t at every call.

    Args:
      network: a `Denoiser`, an apply_fn, or a `Model`.
      callback: host function of t, a scalar array, called during the run, also under jit, in no
        promised order; `jax.effects_barrier()` waits for the last call.

    Returns:
      What was given, of the same signature.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> seen = []
      >>> denoise = ddim.watch(lambda x, t: x, lambda t: seen.append(int(t)))
      >>> _ = ddim.sample(denoise, jnp.ones((1, 2)), ddim.linear_schedule(1000), [1, 10])
      >>> jax.effects_barrier()
      >>> sorted(seen)
      [1, 10]
    """
    if hasattr(network, "apply_fn") and hasattr(network, "_replace"):  # a model
        return network._replace(apply_fn=watch(network.apply_fn, callback))

    def watched(function: Any, *args: Any, **inputs: Any) -> Any:
        jax.debug.callback(callback, args[-1][0])
        return function(*args, **inputs)

    both = variance_of(network)
    return Predictor(
        partial(watched, network),
        prediction_of(network),
        None if both is None else partial(watched, both),
    )


def plan_of(
    method: Method | None,
    eta: ArrayLike,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
) -> Plan:
    """Of the method, or of DDIM with η; not both."""
    if method is None:
        return ddim(eta)(schedule, tau)
    if not is_concrete(eta) or np.any(np.asarray(eta) != 0):
        raise ValueError(f"give eta or a method, not both: got eta = {eta}; ddim(eta) is a method")
    return method(schedule, tau)
