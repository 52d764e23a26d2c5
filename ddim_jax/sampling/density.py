"""The density of the η = 0 sampler: log p(x_0) along the ODE of Eq. 14."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, Denoiser, call, check_batch, image_keys, is_concrete, wide
from ddim_jax.process.continuous import log_sigma, time_at
from ddim_jax.process.gaussian import Coefficients
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule

MAX_STEPS = 4096


class Density(NamedTuple):
    """The density at x_0 and the latent that the ODE takes it to."""

    log_density: Array  # (B,) log p(x_0), nats; NaN where the solver did not reach the end
    se: Array | None  # (B,) its standard error over the probes; None of one probe; 0 if exact
    x_T: Array  # (B, ...) the latent
    num_calls: Array  # () int32 network calls (each with its derivatives), of the whole batch


def ode_density(
    denoise: Denoiser,
    x_0: Array,
    schedule: Schedule,
    key: Array | None = None,
    *,
    probes: int | Literal["exact"] = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Density:
    """log p(x_0) where x_0 is drawn by the ODE dx̄ = ε_θ(x, t) dσ from x_T ~ N(0, I) (DDIM Eq. 14).

    log p(x_0) = log N(x_T; 0, I) + d/2 log ᾱ_T + ∫ tr(∂ε_θ/∂x̄) dσ over σ from 0 to σ_T, with
    x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ): the change of variables of Chen et al. (2018), as Song et al.
    (2021, App. D) use it. The trace is exact, one derivative a pixel, or Hutchinson's: vᵀJv with
    v of ±1, the same along the whole path, unbiased.

    The time told is real, log σ_t being linear between whole t (`process.continuous`). Below σ_1
    nothing was trained, and the field stays that of t = 1: the last step of `ddim` is Euler's step
    of that flow. The solver is diffrax's Dopri5 in log(1 + σ/σ_1), one step size for the
    whole batch, so that an image's value depends on its neighbours within the tolerance.

    Pure and not jitted. `denoise` must take floating t: our U-Net and the oracles do.

    Args:
      denoise: the network; ε unless `predicts` says otherwise.
      x_0: (B, ...) floating. Pixels have no density: add noise first (`dequantise`).
      schedule: the noise schedule, ᾱ_T > 0.
      key: a JAX random key for the probes, or one for each image, see `image_keys`; None if exact.
      probes: how many v an image; two or more give a standard error. "exact" for few pixels.
      rtol, atol: of x̄ and of the log-density.

    Returns:
      A `Density`.

    Raises:
      TypeError: x_0 is not floating, or the network takes no floating t.
      ValueError: a number is out of range, a key is missing, or ᾱ_T = 0.
      ModuleNotFoundError: diffrax is not installed.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=1.0)
      >>> density = ddim.ode_density(exact, jnp.zeros((1, 1)), schedule, probes="exact")
      >>> round(density.log_density.item(), 3)  # −log √2π
      -0.919
    """
    x_0 = check_batch(x_0)
    if not x_0.size:
        raise ValueError(f"x_0 must hold an image at least, got shape {x_0.shape}")
    vectors = _probes(x_0, key, probes, rtol, atol)
    table = jnp.asarray(log_sigma(schedule))  # refuses ᾱ_T = 0
    _check_takes_real_t(denoise, x_0)
    diffrax = _diffrax()
    x = wide(x_0)
    first, last = jnp.exp(table[0]).astype(x.dtype), jnp.exp(table[-1]).astype(x.dtype)
    prediction = prediction_of(denoise)

    def field(s: Array, state: tuple[Array, Array], _: Any) -> tuple[Array, Array]:
        x_bar = state[0]
        held = jnp.maximum(first * jnp.expm1(s), first)  # σ, and σ_1 below it
        a = 1 / jnp.sqrt(1 + jnp.square(held))
        c = Coefficients(a, held * a, a, held * a, None)
        t = jnp.full(x.shape[:1], time_at(schedule, jnp.log(held)))

        def eps(x_bar: Array) -> Array:
            return prediction.x0_eps(c, a * x_bar, call(denoise, a * x_bar, t, x_0.dtype))[1]

        def along(v: Array) -> tuple[Array, Array]:
            value, slope = jax.jvp(eps, (x_bar,), (v,))
            return value, (v * slope).sum(tuple(range(1, x.ndim)))

        value, traces = jax.vmap(along, out_axes=(None, 0))(vectors)
        if probes == "exact":
            traces = traces.sum(0, keepdims=True)
        speed = first * jnp.exp(s)  # dσ/ds
        return value * speed, traces * speed

    start = (x, jnp.zeros((1 if probes == "exact" else probes, x.shape[0]), x.dtype))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            jnp.zeros((), x.dtype),
            jnp.log1p(last / first),
            None,
            start,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=MAX_STEPS,
            throw=False,
        )
    x_bar, integral = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    a = 1 / jnp.sqrt(1 + jnp.square(last))
    x_T, size = a * x_bar, np.prod(x.shape[1:], dtype=float)
    prior = -jnp.square(x_T).reshape(len(x), -1).sum(1) / 2 - size / 2 * np.log(2 * np.pi)
    reached = solution.result == diffrax.RESULTS.successful
    log_density = jnp.where(reached, prior + size * jnp.log(a) + integral.mean(0), jnp.nan)
    count = len(integral)
    se = integral.std(0, ddof=1) / np.sqrt(count) if count > 1 else None
    if probes == "exact":
        se = jnp.zeros_like(log_density)
    calls = 1 + 6 * solution.stats["num_steps"]  # the last slope of a step is the next one's first
    return Density(log_density, se, x_T.astype(x_0.dtype), calls)


def dequantise(x_0: Array, key: Array) -> Array:
    """Images at the 256 levels 2k/255 − 1, each pixel spread uniformly over its bin, x ± 1/255.

    Where p is a density, the mean over the noise of −log p, plus log 127.5 a pixel for the bin's
    width, is above −log of p's mass on the pixels' bins, by Jensen (Theis et al. 2016, §3.1).

    Args:
      x_0: (B, ...) floating.
      key: a JAX random key, or one for each image, see `image_keys`.

    Returns:
      (B, ...) of x_0's dtype, at least float32.

    Example:
      >>> x = dequantise(jnp.full((1, 4), 1 / 255), jax.random.key(0))
      >>> bool(((x > 0) & (x < 2 / 255)).all())
      True
    """
    x = wide(check_batch(x_0))
    draw = lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1 / 255, 1 / 255)  # noqa: E731
    return x + jax.vmap(draw)(image_keys(key, x.shape[0]))


def _probes(x: Array, key: Array | None, probes: Any, rtol: float, atol: float) -> Array:
    """(n, B, ...) of ±1; or (d, 1, ...), every pixel's unit vector."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if is_concrete(value) and not 0 < value < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {value}")
    shape, dtype = x.shape[1:], wide(x).dtype
    if probes == "exact":
        size = int(np.prod(shape))
        unit = jnp.eye(size, dtype=dtype).reshape(size, 1, *shape)
        return jnp.broadcast_to(unit, (size, *x.shape))
    if isinstance(probes, bool) or not isinstance(probes, int | np.integer) or probes < 1:
        raise ValueError(f'probes must be an int >= 1, or "exact", got {probes!r}')
    if key is None:
        raise ValueError('random probes need key=jax.random.key(...); probes="exact" does not')
    draw = lambda k: jax.random.rademacher(k, (int(probes), *shape), dtype)  # noqa: E731
    return jax.vmap(draw, out_axes=1)(image_keys(key, x.shape[0]))


def _check_takes_real_t(denoise: Denoiser, x: Array) -> None:
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    try:
        jax.eval_shape(denoise, like, jax.ShapeDtypeStruct(x.shape[:1], jnp.float32))
    except (TypeError, IndexError) as error:
        raise TypeError(
            "the ODE is solved in real time, and this network does not take floating t (B,) "
            f"between 1 and T: {error}"
        ) from error


def _diffrax() -> Any:
    try:
        import diffrax
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "diffrax":
            raise
        raise ModuleNotFoundError(
            "the ODE's density needs diffrax: pip install diffrax", name=error.name
        ) from error
    return diffrax
