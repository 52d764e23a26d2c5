"""Sampling: `lax.scan` of the DDIM step over the pairs (τ_i, τ_{i−1}), down to 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax._types import Array, ArrayLike, Denoiser, is_concrete
from ddim_jax.process import Coefficients, check_signal, coefficients, step
from ddim_jax.schedule import Schedule
from ddim_jax.timesteps import as_timesteps


class Steps(NamedTuple):
    """The inputs of the scan, one row a step, in the order of sampling."""

    t: Any  # (S,) int32, τ_S .. τ₁
    coefficients: Coefficients  # of (S,)


class Trajectory(NamedTuple):
    """What a sampler saw on its way."""

    sample: Array  # (B, ...) the final x_0
    t: np.ndarray  # (K,) int32, decreasing
    x_t: Array  # (K, B, ...) the states
    x_0: Array  # (K, B, ...) the predictions x̂_0 made from them


def initial_noise(
    key: Array, indices: ArrayLike, shape: Sequence[int], dtype: Any = jnp.float32
) -> Array:
    """x_T ~ N(0, I), image i from `fold_in(key, i)` alone.

    Image 5 is the same image in a batch of 1, 7 or 64, on 1 or 8 devices.

    Args:
      key: a JAX random key.
      indices: (B,) non-negative ints, the images' global numbers, or an int n for 0..n − 1.
      shape: the shape of one image, e.g. (32, 32, 3).
      dtype: a floating dtype.

    Returns:
      (B, *shape) standard normal.

    Raises:
      ValueError: indices is not an int or a vector, or holds a negative number.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> x_T = ddim.initial_noise(jax.random.key(0), 7, (8, 8, 1))
      >>> bool((x_T[5] == ddim.initial_noise(jax.random.key(0), [5], (8, 8, 1))[0]).all())
      True
    """
    keys = _image_keys(key, indices)
    return jax.vmap(lambda k: jax.random.normal(k, tuple(shape), dtype))(keys)


def sample(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    indices: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    use_sigma_hat: bool = False,
    final_noise: bool = False,
    prediction: str = "eps",
    x0_fn: Callable[[Array], Array] | None = None,
    rederive_eps: bool = True,
    callback: Callable[[int, int], None] | None = None,
) -> Array:
    """Sample x_0 from x_T by DDIM steps along τ (DDIM Eq. 12, §4.2).

    x_s = √ᾱ_s x̂_0 + √(1 − ᾱ_s − σ²) ε_θ(x_t, t) + σ z for (t, s) = (τ_S, τ_{S−1}), …, (τ₁, 0)

    Pure and not jitted, so that every call compiles anew: jit your own closure with the weights as
    arguments, or see `make_sampler`. The network is traced once whatever S is, and memory does not
    grow with S. With concrete `schedule`, `tau` and η the coefficients are float64 from the host.

    Args:
      denoise: (x (B, ...), t (B,) int32 in 1..T) → (B, ...), the network's prediction.
      x_T: (B, ...) floating; see `initial_noise`.
      schedule: the noise schedule.
      tau: (S,) strictly increasing ints in 1..T; see `timesteps`.
      eta: η ≥ 0 of Eq. 16: 0 is DDIM, 1 is DDPM; a scalar, or (S,) along τ.
      key: a JAX random key, needed when σ may be above 0. At η = 0 it is not used.
      indices: (B,) global numbers of the images, whose noise depends on (key, number, t) alone;
        0..B − 1 by default.
      sigma: (S,) σ along τ, in place of η; sigma[0] is 0, as the last step ends at s = 0.
      use_sigma_hat: scale the noise by σ̂ instead; the direction keeps σ(1) (App. D.3; eta=1).
      final_noise: whether σ̂ also adds noise in the last step, to s = 0. (σ(η) is 0 there.)
      prediction: what the network predicts: `"eps"`, `"x_0"` or `"v"`.
      x0_fn: applied to each x̂_0: `clip_x0(1.0)`, `dynamic_threshold()`; by default nothing.
      rederive_eps: whether ε is recomputed from x̂_0 after x0_fn.
      callback: host function of (number of steps done, t), scalar arrays, called during the run,
        also under jit, in no promised order; `jax.effects_barrier()` waits for the last call.

    Returns:
      x_0, shape and dtype of x_T.

    Raises:
      TypeError: x_T is not floating.
      ValueError: τ, η or σ is out of range, a key is missing, or the network's output has another
        shape than its input.

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
    noisy = _may_be_noisy(eta, sigma, use_sigma_hat, key)
    steps = make_steps(
        schedule, tau, eta, sigma=sigma, use_sigma_hat=use_sigma_hat, final_noise=final_noise
    )
    check_signal(steps.coefficients, prediction)
    options = _Options(prediction, x0_fn, rederive_eps, callback)
    keys = _image_keys(key, x_T.shape[0] if indices is None else indices) if noisy else None
    return run(denoise, x_T, steps, keys, options)[0]


def trajectory(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    key: Array | None = None,
    *,
    at: Sequence[int] | None = None,
    indices: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    use_sigma_hat: bool = False,
    final_noise: bool = False,
    prediction: str = "eps",
    x0_fn: Callable[[Array], Array] | None = None,
    rederive_eps: bool = True,
) -> Trajectory:
    """Sample as `sample` does, and keep x_t and x̂_0 at chosen steps (DDIM Eq. 9 and 12).

    Args:
      denoise, x_T, schedule, tau, eta, key and the options: as in `sample`; here τ must be
        concrete.
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
    noisy = _may_be_noisy(eta, sigma, use_sigma_hat, key)
    steps = make_steps(
        schedule, tau, eta, sigma=sigma, use_sigma_hat=use_sigma_hat, final_noise=final_noise
    )
    check_signal(steps.coefficients, prediction)
    visited = np.asarray(steps.t)
    wanted = visited if at is None else np.unique(np.asarray(at))[::-1]
    if wanted.size == 0 or not np.isin(wanted, visited).all():
        raise ValueError(f"at must name steps that tau visits, got {at}; tau visits {visited}")
    keys = _image_keys(key, x_T.shape[0] if indices is None else indices) if noisy else None
    options = _Options(prediction, x0_fn, rederive_eps, None)
    kept = np.isin(visited, wanted)
    slots = np.where(kept, np.cumsum(kept) - 1, len(wanted)).astype(np.int32)
    x_0, states = run(denoise, x_T, steps, keys, options, slots=slots, num_slots=len(wanted))
    return Trajectory(x_0, visited[kept], *states)


def make_sampler(
    apply_fn: Callable[[Any, Array, Array], Array],
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: float = 0.0,
    **options: Any,
) -> Callable[..., Array]:
    """A jitted sampler `(params, x_T, key=None) → x_0` of a network with weights.

    Weights, x_T, keys, and η and τ's values are arguments of one compiled function: changing them
    never recompiles; only another S, shape or dtype does, or going from no key to a key.

    Args:
      apply_fn: (params, x (B, ...), t (B,)) → (B, ...), such as `unet.build` returns.
      schedule: the noise schedule.
      tau: (S,) the default τ.
      eta: the default η.
      **options: the keyword options of `sample`: `prediction`, `x0_fn`, `use_sigma_hat`, ….

    Returns:
      `sampler(params, x_T, key=None, *, eta=eta, tau=tau, indices=None)` → x_0, like `sample`.

    Raises:
      TypeError: an option is unknown.
      ValueError: as `sample`, when the sampler is made or called.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> sampler = ddim.make_sampler(lambda w, x, t: w * x, schedule, ddim.timesteps(1000, 10))
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (8, 8, 1))
      >>> sampler(0.5, x_T).shape, sampler(0.7, x_T, jax.random.key(1), eta=1.0).shape
      ((4, 8, 8, 1), (4, 8, 8, 1))
    """
    names = {"sigma", "use_sigma_hat", "final_noise", *_Options._fields}
    if unknown := set(options) - names:
        raise TypeError(
            f"make_sampler got unknown options {sorted(unknown)}; it takes {sorted(names)}"
        )
    noise_options = {
        k: options.pop(k) for k in ("sigma", "use_sigma_hat", "final_noise") if k in options
    }
    sigma, hat = noise_options.get("sigma"), noise_options.get("use_sigma_hat", False)
    run_options = _Options(**options)
    check_signal(
        make_steps(schedule, tau, eta, **noise_options).coefficients, run_options.prediction
    )

    @jax.jit
    def jitted(params: Any, x_T: Array, steps: Steps, keys: Array | None) -> Array:
        return run(partial(apply_fn, params), x_T, steps, keys, run_options)[0]

    def sampler(
        params: Any,
        x_T: Array,
        key: Array | None = None,
        *,
        eta: ArrayLike = eta,
        tau: ArrayLike | Sequence[int] = tau,
        indices: ArrayLike | None = None,
    ) -> Array:
        x_T = check_batch(x_T)
        steps = make_steps(schedule, tau, eta, **noise_options)
        check_signal(steps.coefficients, run_options.prediction)
        _may_be_noisy(eta, sigma, hat, key)
        keys = None
        if key is not None:
            keys = _image_keys(key, x_T.shape[0] if indices is None else indices)
        return jitted(params, x_T, steps, keys)

    return sampler


class _Options(NamedTuple):
    prediction: str = "eps"
    x0_fn: Callable[[Array], Array] | None = None
    rederive_eps: bool = True
    callback: Callable[[int, int], None] | None = None


def make_steps(
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    eta: ArrayLike = 0.0,
    *,
    sigma: ArrayLike | None = None,
    use_sigma_hat: bool = False,
    final_noise: bool = False,
) -> Steps:
    """The scan inputs of τ: t and the coefficients of every (τ_i, τ_{i−1}), from τ_S down to τ₁.

    Args:
      schedule, tau, eta, sigma, use_sigma_hat, final_noise: as in `sample`.

    Returns:
      `Steps` of (S,) arrays, in float64 where all is concrete, last of τ first.

    Raises:
      ValueError: τ, η or σ is out of range.

    Example:
      >>> import ddim_jax as ddim
      >>> from ddim_jax.sampling import make_steps
      >>> make_steps(ddim.linear_schedule(1000), [1, 10, 100]).t.tolist()
      [100, 10, 1]
    """
    xp: Any = np
    if is_concrete(tau):
        tau = as_timesteps(np.asarray(tau), schedule.num_steps)
    else:
        xp = jnp
        tau = jnp.asarray(tau)
        if tau.ndim != 1 or not jnp.issubdtype(tau.dtype, jnp.integer):
            raise ValueError(f"tau must be an int vector (S,), got {tau.dtype}{tau.shape}")
    if sigma is not None and is_concrete(eta) and np.any(np.asarray(eta) != 0):
        raise ValueError(f"give eta or sigma, not both: got eta = {eta} and a sigma")
    if use_sigma_hat and (sigma is not None or (is_concrete(eta) and np.any(np.asarray(eta) != 1))):
        raise ValueError(
            "use_sigma_hat=True goes with eta=1 and no sigma: the noise is scaled by σ̂ while the "
            f"direction keeps σ(1) (App. D.3); got eta = {eta}"
        )
    if final_noise and not use_sigma_hat:
        raise ValueError("final_noise=True needs use_sigma_hat=True: σ(η) is 0 in the last step")
    for name, value in (("eta", eta), ("sigma", sigma)):
        if value is not None and np.shape(value) not in ((), tau.shape):
            raise ValueError(
                f"{name} must be a scalar or one value per element of tau, {tau.shape}, got shape "
                f"{np.shape(value)}"
            )
    previous = xp.concatenate([xp.zeros(1, tau.dtype), tau[:-1]])
    c = coefficients(schedule, tau, previous, eta, sigma=sigma, use_sigma_hat=use_sigma_hat)
    if use_sigma_hat and not final_noise:
        c = c._replace(sigma=c.sigma * (previous > 0))
    return Steps(tau[::-1], jax.tree.map(lambda v: v[::-1], c))


def run(
    denoise: Denoiser,
    x_T: Array,
    steps: Steps,
    keys: Array | None,
    options: _Options,
    slots: np.ndarray | None = None,
    num_slots: int = 0,
) -> tuple[Array, tuple[Array, Array]]:
    """The scan itself: x_T → (x_0, the kept (x_t, x̂_0)); keys (B,) or None for no noise."""
    x_T = check_batch(x_T)
    if keys is not None and keys.shape != x_T.shape[:1]:
        raise ValueError(f"indices must number the {x_T.shape[0]} images, got shape {keys.shape}")
    batch, num_steps = x_T.shape[0], steps.t.shape[0]
    cast = jax.tree.map(lambda c: jnp.asarray(c).astype(x_T.dtype), steps.coefficients)
    t_all = jnp.asarray(steps.t).astype(jnp.int32)
    i_all = jnp.arange(num_steps, dtype=jnp.int32)
    kept = tuple(jnp.zeros((num_slots, *x_T.shape), x_T.dtype) for _ in range(2))

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        x_t, (states, predictions) = carry
        i, t, c, slot = inputs
        output = call(denoise, x_t, jnp.full((batch,), t))
        noise = None if keys is None else _step_noise(keys, t, x_t)
        x_s, x_0 = step(c, x_t, output, noise, prediction=options.prediction,
                        x0_fn=options.x0_fn, rederive_eps=options.rederive_eps)  # fmt: skip
        if options.callback is not None:
            jax.debug.callback(options.callback, i + 1, t)
        if slots is not None:
            states = states.at[slot].set(x_t, mode="drop")
            predictions = predictions.at[slot].set(x_0, mode="drop")
        return (x_s, (states, predictions)), None

    slot_all = i_all if slots is None else jnp.asarray(slots)
    (x_0, kept), _ = jax.lax.scan(body, (x_T, kept), (i_all, t_all, cast, slot_all))
    return x_0, (kept[0], kept[1])


def check_batch(x: Array) -> Array:
    """Require a floating batch (B, ...)."""
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(
            f"expected a floating array (B, ...), got {getattr(x, 'dtype', type(x).__name__)}; "
            "scale uint8 images to [-1, 1] first (x / 127.5 - 1), and lists by jnp.asarray"
        )
    if x.ndim < 1:
        raise ValueError("expected a batch (B, ...), got a scalar; add a leading axis")
    return jnp.asarray(x)


def call(denoise: Denoiser, x: Array, t: Array) -> Array:
    """denoise(x, t), with the output checked while tracing and cast to x's dtype."""
    output = denoise(x, t)
    if np.shape(output) != x.shape:
        raise ValueError(
            f"the network must return the shape of its input, {x.shape}, got {np.shape(output)}; "
            "wrap one that returns more: lambda x, t: network(x, t)[..., :channels]"
        )
    return output.astype(x.dtype)


def _may_be_noisy(
    eta: ArrayLike, sigma: ArrayLike | None, use_sigma_hat: bool, key: Array | None
) -> bool:
    scale = eta if sigma is None else sigma
    noisy = use_sigma_hat or not is_concrete(scale) or bool(np.any(np.asarray(scale) != 0))
    if noisy and key is None:
        raise ValueError(
            f"this sampler adds noise (eta = {eta}, sigma = {sigma}, use_sigma_hat = "
            f"{use_sigma_hat}) and needs key=jax.random.key(...)"
        )
    return noisy


def _image_keys(key: Any, indices: ArrayLike) -> Array:
    """One key per image: fold_in(key, the image's global number)."""
    dtype = getattr(key, "dtype", None)
    if dtype == jnp.uint32 and key.shape == (2,):
        key = jax.random.wrap_key_data(key)  # as jax.random.PRNGKey makes them
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or key.shape != ():
        raise TypeError(f"key must be one JAX key, such as jax.random.key(0), got {key!r}")
    if isinstance(indices, int | np.integer):
        if indices < 1:
            raise ValueError(f"indices must be a number of images >= 1 or a vector, got {indices}")
        indices = np.arange(indices)
    numbers: Any = np.asarray(indices) if is_concrete(indices) else indices
    if numbers.ndim != 1 or not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise ValueError(f"indices must be an int or a vector of ints, got {indices}")
    if is_concrete(numbers) and numbers.size and not 0 <= numbers.min() <= numbers.max() < 2**32:
        raise ValueError(
            f"indices must lie in 0..2**32 - 1, got {numbers.min()}..{numbers.max()}; for more "
            "images take another key"
        )
    if is_concrete(numbers):
        numbers = numbers.astype(np.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(numbers))


def _step_noise(keys: Array, t: Array, like: Array) -> Array:
    def one(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, t), like.shape[1:], like.dtype)

    return jax.vmap(one)(keys)
