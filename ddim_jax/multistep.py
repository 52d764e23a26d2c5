"""Fewer steps: Adams–Bashforth on the ODE behind DDIM, and the paper's Eq. 15 for comparison.

In x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ), sampling at η = 0 is Euler's method on dx̄ = ε_θ dσ (DDIM
Eq. 13–14). A method that remembers earlier ε integrates the same ODE to higher order with the same
number of network calls. Every method here is the DDIM step of Eq. 12 with a weighted sum of
ε's in the place of ε, and differs from the others in the table of weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax._types import Array, ArrayLike, Denoiser, is_concrete
from ddim_jax.process import step, to_x0_eps
from ddim_jax.sampling import Steps, call, check_batch, make_steps
from ddim_jax.schedule import Schedule


def multistep_sample(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    order: int = 2,
    *,
    variable: str = "angle",
    prediction: str = "eps",
    x0_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Sample x_0 from x_T by Adams–Bashforth steps along τ (DDIM Eq. 13–14 and §7).

    x̄_s = x̄_t + ∫_{σ_t}^{σ_s} P dσ, where P interpolates the last `order` values of ε_θ

    P is a polynomial in the angle φ = arctan σ (so √ᾱ = cos φ, √(1 − ᾱ) = sin φ) unless
    `variable` says in σ itself. Both have the order; but at large σ ε_θ changes like 1/σ, which
    is linear in φ, and steps there are so long in σ that a polynomial in σ does much worse.
    The integral is over σ in either case, exact for unequal steps. Order 1 is `sample` at η = 0.

    Start-up: fewer ε's are known in the first `order` steps, and Euler's first one errs by O(h²),
    which would leave the whole run at order 2. So these steps do not add to x̄_t but integrate
    anew from x̄_T, through all ε's known so far: x̄_s = x̄_T + ∫_{σ_T}^{σ_s} P dσ. That repairs
    the earlier steps when better ε's are known; at order 4 the second ε, the only one too
    inaccurate, is dropped once four are known. The order is kept at exactly one call per element
    of τ. The last step, to σ = 0, extrapolates farthest and is taken one order lower, which
    keeps the order too, and helps when S is small.

    The network is traced once whatever S is; memory holds `order` arrays of ε.

    Args:
      denoise: (x (B, ...), t (B,) int32 in 1..T) → (B, ...), the network's prediction.
      x_T: (B, ...) floating; see `initial_noise`.
      schedule: the noise schedule, ᾱ_T > 0.
      tau: (S,) strictly increasing ints in 1..T; see `timesteps`.
      order: 1, 2, 3 or 4.
      variable: what P is a polynomial in: `"angle"` or `"sigma"`.
      prediction: what the network predicts: `"eps"`, `"x_0"` or `"v"`.
      x0_fn: applied to each x̂_0, from which ε is then computed anew; by default nothing. It
        makes ε less smooth, and can cost the higher orders.

    Returns:
      x_0, shape and dtype of x_T.

    Raises:
      TypeError: x_T is not floating.
      ValueError: order, variable or τ is out of range, ᾱ is 0 at an element of τ (σ is
        infinite), or the network's output has another shape than its input.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> ddim.multistep_sample(exact, x_T, schedule, ddim.timesteps(1000, 20), order=3).shape
      (4, 2)
    """
    steps = make_steps(schedule, tau)
    weights = adams_bashforth_weights(_sigma(steps), order, variable)
    return _run(denoise, x_T, steps, weights, prediction, x0_fn)


def pf_euler_sample(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    *,
    prediction: str = "eps",
    x0_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Sample x_0 from x_T by Euler's method on the probability-flow ODE in dt (DDIM Eq. 15).

    x̄_s = x̄_t + ½ (σ_s² − σ_t²)/σ_t · ε_θ(x_t, t), with σ² = (1 − ᾱ)/ᾱ

    The same ODE as DDIM's, another variable: Euler in dσ² and not in dσ. The two agree for small
    steps only, and DDIM is the better one for few.

    Args:
      denoise, x_T, schedule, tau, prediction, x0_fn: as in `multistep_sample`.

    Returns:
      x_0, shape and dtype of x_T.

    Raises:
      TypeError, ValueError: as `multistep_sample`.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> ddim.pf_euler_sample(exact, x_T, schedule, ddim.timesteps(1000, 20)).shape
      (4, 2)
    """
    steps = make_steps(schedule, tau)
    sigma = _sigma(steps)
    weights = (sigma[1:] + sigma[:-1]) / (2 * sigma[:-1])  # ½(σ_s² − σ_t²)/σ_t over σ_s − σ_t
    return _run(denoise, x_T, steps, weights[:, None], prediction, x0_fn)


def adams_bashforth_weights(sigma: Any, order: int, variable: str = "angle") -> Any:
    """The share of each remembered ε in each step: w with x̄_{n+1} = x̄_n + h_n Σ_j w_nj ε_{n−j}.

    w_nj = (1/h_n) ∫_{σ_n}^{σ_{n+1}} L_nj dσ, h_n = σ_{n+1} − σ_n, with L_nj the Lagrange polynomial
    of node σ_{n−j}; in the first `order` steps and the last what `multistep_sample` says.

    Args:
      sigma: (S+1,) strictly decreasing, σ_T first and 0 last.
      order: 1, 2, 3 or 4.
      variable: what L_nj is a polynomial in: `"angle"` or `"sigma"`.

    Returns:
      (S, order) w, newest ε first; float64 on the host where sigma is concrete.

    Raises:
      ValueError: order or variable is unknown.

    Example:
      >>> import numpy as np
      >>> from ddim_jax.multistep import adams_bashforth_weights
      >>> (adams_bashforth_weights(np.arange(4.0, -1, -1), 2, "sigma") + 0).round(9)
      array([[ 1. ,  0. ],
             [ 2. , -1. ],
             [ 1.5, -0.5],
             [ 1. ,  0. ]])
    """
    if isinstance(order, bool) or order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order!r}")
    if variable not in ("angle", "sigma"):
        raise ValueError(f'variable must be "angle" or "sigma", got {variable!r}')
    xp: Any = np if is_concrete(sigma) else jnp
    n = np.arange(sigma.shape[0] - 1)[:, None]
    k = n - np.arange(order)[None, :]  # slot j of step n holds the ε of call n − j
    last = (n == len(n) - 1) & (n >= order) & (order > 1)
    known = (k >= 0) & ~(last & (k == n - order + 1)) & ~((k == 1) & (n >= 3) & (order == 4))
    start = sigma[np.where(n < order, 0, n)]
    total = _integrals(xp, sigma[np.maximum(k, 0)], known, start, sigma[n + 1], variable)
    already = xp.pad(total, ((1, 0), (1, 0)))[:-1, :-1]  # of step n − 1, its ε's one slot on
    return (total - xp.where((n > 0) & (n < order), already, 0)) / (sigma[n + 1] - sigma[n])


def _integrals(xp: Any, node: Any, known: np.ndarray, start: Any, end: Any, variable: str) -> Any:
    """(S, p) ∫ dσ from start to end (S, 1) of the Lagrange polynomials of the known nodes (S, p).

    By Gauss–Legendre quadrature in asinh σ, in which 32 points give all digits of float64.
    """
    points, weights = (xp.asarray(v, node.dtype) for v in np.polynomial.legendre.leggauss(32))
    low, high = xp.arcsinh(start), xp.arcsinh(end)
    v = (low + high) / 2 + points[None] * (high - low) / 2  # (S, 32)
    d_sigma = xp.cosh(v) * weights[None] * (high - low) / 2
    u: Any = xp.arctan if variable == "angle" else lambda sigma: sigma
    at, node = u(xp.sinh(v)), u(node)
    others = known[:, :, None] & known[:, None, :] & ~np.eye(node.shape[1], dtype=bool)[None]
    gap = xp.where(others, node[:, :, None] - node[:, None, :], 1)  # [n, j, m], m ≠ j
    factor = (at[:, None, None] - node[:, None, :, None]) / gap[..., None]
    lagrange = xp.where(others[..., None], factor, 1).prod(2)
    return xp.where(known, (lagrange * d_sigma[:, None]).sum(-1), 0)


def _sigma(steps: Steps) -> Any:
    """(S+1,) σ = √((1 − ᾱ)/ᾱ) along the steps, ending in 0."""
    c: Any = steps.coefficients
    if is_concrete(c) and not np.all(np.asarray(c.sqrt_alpha_bar_t) > 0):
        raise ValueError(
            "alpha_bar[t] = 0 (zero terminal SNR) at the first step: sigma is infinite there, and "
            "a multistep method cannot start; use `sample`, or a tau that stops before T"
        )
    xp: Any = np if is_concrete(c) else jnp
    sigma = c.sqrt_one_minus_alpha_bar_t / c.sqrt_alpha_bar_t
    return xp.concatenate([sigma, xp.zeros_like(sigma[:1])])


def _run(
    denoise: Denoiser,
    x_T: Array,
    steps: Steps,
    weights: Any,
    prediction: str,
    x0_fn: Callable[[Array], Array] | None,
) -> Array:
    """The DDIM step along `steps`, with Σ_j weights[:, j] · (the ε of j calls ago) for ε."""
    x_T = check_batch(x_T)
    inputs = (jnp.asarray(steps.t).astype(jnp.int32), *jax.tree.map(
        lambda v: jnp.asarray(v).astype(x_T.dtype), (steps.coefficients, weights)
    ))  # fmt: skip

    def body(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], None]:
        (x_t, past), (t, c, w) = carry, inputs
        output = call(denoise, x_t, jnp.full(x_t.shape[:1], t))
        x_0, eps = to_x0_eps(c, x_t, output, prediction)
        if x0_fn is not None:
            eps = to_x0_eps(c, x_t, x0_fn(x_0), "x_0")[1]
        past = jnp.concatenate([eps[None], past[:-1]])
        return (step(c, x_t, jnp.einsum("j,j...->...", w, past))[0], past), None

    past = jnp.zeros((weights.shape[1], *x_T.shape), x_T.dtype)
    return jax.lax.scan(body, (x_T, past), inputs)[0][0]
