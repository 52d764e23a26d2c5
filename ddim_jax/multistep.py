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
from ddim_jax.process import check_signal, step, to_x0_eps
from ddim_jax.sampling import Steps, call, check_batch, make_steps
from ddim_jax.schedule import Schedule


def multistep_sample(
    denoise: Denoiser,
    x_T: Array,
    schedule: Schedule,
    tau: ArrayLike | Sequence[int],
    order: int = 2,
    *,
    prediction: str = "eps",
    x0_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Sample x_0 from x_T by Adams–Bashforth steps along τ (DDIM Eq. 13–14 and §7).

    x̄_s = x̄_t + ∫_{σ_t}^{σ_s} P(σ) dσ, where P interpolates the last `order` values of ε_θ

    The weights take the unequal steps in σ into account exactly. Order 1 is `sample` at η = 0.

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
      prediction: what the network predicts: `"eps"`, `"x_0"` or `"v"`.
      x0_fn: applied to each x̂_0, from which ε is then computed anew; by default nothing. It
        makes ε less smooth, and can cost the higher orders.

    Returns:
      x_0, shape and dtype of x_T.

    Raises:
      TypeError: x_T is not floating.
      ValueError: order or τ is out of range, ᾱ is 0 at an element of τ (σ is infinite), or the
        network's output has another shape than its input.

    Example:
      >>> import ddim_jax as ddim, jax
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> x_T = ddim.initial_noise(jax.random.key(0), 4, (2,))
      >>> ddim.multistep_sample(exact, x_T, schedule, ddim.timesteps(1000, 20), order=3).shape
      (4, 2)
    """
    if isinstance(order, bool) or order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, got {order!r}")
    steps = make_steps(schedule, tau)
    sigma = _sigma(steps)
    return _run(denoise, x_T, steps, adams_bashforth_weights(sigma, order), prediction, x0_fn)


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


def adams_bashforth_weights(sigma: Any, order: int) -> Any:
    """The share of each remembered ε in each step: w with x̄_{n+1} = x̄_n + h_n Σ_j w_nj ε_{n−j}.

    w_nj = (1/h_n) ∫_{σ_n}^{σ_{n+1}} L_nj dσ, h_n = σ_{n+1} − σ_n, with L_nj the Lagrange polynomial
    of node σ_{n−j}; in the first `order` steps and the last what `multistep_sample` says.

    Args:
      sigma: (S+1,) strictly decreasing, σ_T first and 0 last.
      order: 1, 2, 3 or 4.

    Returns:
      (S, order) w, newest ε first; float64 on the host where sigma is concrete.

    Example:
      >>> import numpy as np
      >>> from ddim_jax.multistep import adams_bashforth_weights
      >>> adams_bashforth_weights(np.arange(4.0, -1, -1), 2).round(9)  # even steps: 3/2, −1/2
      array([[ 1. ,  0. ],
             [ 2. , -1. ],
             [ 1.5, -0.5],
             [ 1. ,  0. ]])
    """
    xp: Any = np if is_concrete(sigma) else jnp
    n = np.arange(sigma.shape[0] - 1)[:, None]
    k = n - np.arange(order)[None, :]  # slot j of step n holds the ε of call n − j
    known = (k >= 0) & ~((k == 1) & (n >= 3) & (order == 4))
    known &= ~((n >= order) & (n == len(n) - 1) & (k == n - order + 1) & (order > 1))
    node = sigma[np.maximum(k, 0)]
    start = sigma[np.where(n < order, 0, n)]
    total = _integrals(xp, node, known, start, sigma[n + 1])
    already = xp.pad(total, ((1, 0), (1, 0)))[:-1, :-1]  # of step n − 1, its ε's one slot on
    return (total - xp.where((n > 0) & (n < order), already, 0)) / (sigma[n + 1] - sigma[n])


def _integrals(xp: Any, node: Any, known: np.ndarray, start: Any, end: Any) -> Any:
    """(S, p) ∫ from start to end (S, 1) of the Lagrange polynomials of the known nodes (S, p).

    Two Gauss–Legendre points are exact for these cubics at most.
    """
    others = known[:, :, None] & known[:, None, :] & ~np.eye(node.shape[1], dtype=bool)  # m ≠ j
    gap = xp.where(others, node[:, :, None] - node[:, None, :], 1)
    total: Any = 0.0
    for point in (-(3**-0.5), 3**-0.5):
        at = (start + end) / 2 + point * (end - start) / 2
        factor = xp.where(others, (at - node)[:, None, :] / gap, 1)
        total = total + factor.prod(-1) * (end - start) / 2
    return xp.where(known, total, 0.0)


def _sigma(steps: Steps) -> Any:
    """(S+1,) σ = √((1 − ᾱ)/ᾱ) along the steps, ending in 0."""
    check_signal(steps.coefficients, "eps")
    c: Any = steps.coefficients
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
