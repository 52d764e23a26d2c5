"""The variational bound on the likelihood of the stochastic chain, in nats per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from ddim_jax.arrays import Array, ArrayLike, Denoiser, call, image_keys, is_concrete, wide
from ddim_jax.process.gaussian import Coefficients, coefficients, sigma_hat
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling.learned import LearnedVariance, learned_variance, with_variance
from ddim_jax.sampling.plan import pairs

LEVELS = 256  # grey values of a channel: x = 2k/255 − 1, k = 0..255


class Bound(NamedTuple):
    """−log p(x_0) is at most `nats`, on average over the noise."""

    nats: Array  # (B,) the bound: prior + all terms
    se: Array | None  # (B,) its standard error over the drawn t; None where all t are summed
    prior: Array  # (B,) KL(q(x_τS | x_0) ‖ N(0, I))
    decoder: Array  # (B,) −log p(x_0 | x_τ1), the term of τ_1
    t: Array  # (n, B) int32, further t: τ_2..τ_S, or those drawn
    terms: Array  # (n, B) their KL(q_σ(x_s | x_t, x_0) ‖ p_θ(x_s | x_t))


class _Row(NamedTuple):
    """The numbers of one step t → s, float64 on the host: (S,) of a table, (B,) when used."""

    t: Any
    a: Any  # √ᾱ_t
    b: Any  # √(1 − ᾱ_t)
    lam: Any  # λ/σ of Eq. 7
    kappa: Any  # κ/σ
    log_variance: Any  # log σ²; of the decoder's normal in row 0
    log_ratio: Any  # log of p_θ's variance over σ²
    learned: LearnedVariance | None = None  # what a network chooses it from


def variational_bound(
    denoise: Denoiser,
    x_0: Array,
    schedule: Schedule,
    key: Array,
    tau: ArrayLike | Sequence[int] | None = None,
    *,
    eta: float = 1.0,
    variance: str = "small",
    log_variance: Callable[[Array, Array], Array] | None = None,
    num_terms: int | None = None,
) -> Bound:
    """The variational bound on −log p_θ(x_0) (DDIM Eq. 11, J_σ; at η = 1 DDPM's, Ho et al. Eq. 5).

    KL(q(x_τS|x_0) ‖ N(0, I)) + Σ_i KL(q_σ(x_s|x_t, x_0) ‖ p_θ(x_s|x_t)) − log p_θ(x_0|x_τ1),
    (t, s) = (τ_i, τ_{i−1}), i = 2..S, each expectation over q by one draw of x_t; and
    p_θ(x_0|x_τ1) = Π over pixels of N(x̂_0, σ²)'s mass on x_0 ± 1/255 (Ho et al. 2020, Eq. 13),
    where the outermost bins reach to ±∞, and σ is σ(1) of the step τ_2 → τ_1, as in their code.

    Pure and not jitted; the network is traced once. Image k's noise depends on its key alone.

    Args:
      denoise: the network; ε unless `predicts` says otherwise, with its clipping of x̂_0, if any.
      x_0: (B, ...) floating images at the 256 levels 2k/255 − 1.
      schedule: the noise schedule.
      key: a JAX random key, or one for each image, see `image_keys`.
      tau: the chain whose likelihood is meant; all of 1..T by default.
      eta: η of Eq. 16, above 0: at σ = 0 the bound is infinite.
      variance: p_θ's: `"small"`, σ(η)²; `"large"`, σ̂² (App. D.3); `"learned"`, the network's own,
        v log σ̂² + (1 − v) log σ(1)² (Nichol & Dhariwal 2021, Eq. 15), the decoder's too.
      log_variance: (x_t, t) → (B, ...), the log of p_θ's variance, where it is learned in another
        way. In place of `variance`.
      num_terms: draw so many t for each image, in proportion to the terms that data N(0, I) have,
        in place of the sum over all; unbiased.

    Returns:
      A `Bound`.

    Raises:
      TypeError: x_0 is not floating.
      ValueError: x_0 is not at the 256 levels, η is not in (0, …], a variance is unknown, given
        twice or not learned, τ is out of range, or fewer than two terms are asked for.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.1)
      >>> x_0 = jnp.full((3, 2), 1 / 255)
      >>> bound = ddim.variational_bound(exact, x_0, schedule, jax.random.key(0), num_terms=8)
      >>> bound.nats.shape, bound.terms.shape
      ((3,), (8, 3))
    """
    x_0 = check_levels(x_0)
    table, prior_of = _table(
        schedule, range(1, schedule.num_steps + 1) if tau is None else tau, eta
    )
    ratio = _log_ratio(schedule, table, variance, log_variance is not None)
    learned = table.learned if variance == "learned" else None
    table = table._replace(log_ratio=ratio, learned=learned)
    both = with_variance(denoise) if variance == "learned" else None
    prediction_of(denoise).check(Coefficients(table.a, table.b, table.a, table.b, None))
    steps = len(table.t)
    keys, batch = image_keys(key, x_0.shape[0]), x_0.shape[:1]
    if num_terms is None:
        rows: Any = np.broadcast_to(np.arange(steps)[:, None], (steps, *batch))
    else:
        if not isinstance(num_terms, int | np.integer) or num_terms < 2 or steps < 2:
            raise ValueError(
                "num_terms must be at least 2, an int, of a tau of 2 steps or more, got "
                f"{num_terms} of {steps}; None sums over all"
            )
        # λ²(1 − ᾱ_t)/σ²: the expected squares where the data are N(0, I), and Var[x_0|x_t] 1 − ᾱ_t
        chance = np.append(0.0, (table.lam * table.b)[1:] ** 2)
        chance = chance / chance.sum()
        drawn = _draw_rows(keys, chance, num_terms)
        rows = jnp.concatenate([jnp.zeros((1, *batch), drawn.dtype), drawn])
    table = jax.tree.map(partial(_cast, like=x_0), table)
    body = partial(_term, denoise, both or log_variance, both is not None, x_0, keys, table)
    t, terms = jax.lax.scan(body, None, (jnp.asarray(rows), jnp.arange(len(rows))))[1]
    prior = jax.vmap(lambda x: prior_of(x).sum())(x_0)
    if num_terms is None:
        return Bound(prior + terms.sum(0), None, prior, terms[0], t[1:], terms[1:])
    each = terms[1:] / jnp.asarray(chance, terms.dtype)[rows[1:]]
    se = each.std(0, ddof=1) / np.sqrt(len(each))
    return Bound(prior + terms[0] + each.mean(0), se, prior, terms[0], t[1:], terms[1:])


def check_levels(x_0: Array) -> Array:
    """x_0 in at least float32; refuses what is not at the levels 2k/255 − 1."""
    if not (hasattr(x_0, "dtype") and jnp.issubdtype(x_0.dtype, jnp.floating)):
        raise TypeError(
            f"expected floating images in [-1, 1], got {getattr(x_0, 'dtype', type(x_0).__name__)};"
            " of uint8 ones take x / 127.5 - 1"
        )
    if x_0.ndim < 2 or 0 in x_0.shape:
        raise ValueError(f"expected images (B, ...) and some, got shape {x_0.shape}")
    if is_concrete(x_0):
        level = (np.asarray(x_0, np.float64) + 1) * 127.5
        off = np.abs(level - np.round(level))
        if not (np.all(off < 0.01) and level.min() > -0.5 and level.max() < 255.5):
            raise ValueError(
                "images must be at the 256 levels 2k/255 - 1 in [-1, 1], as k / 127.5 - 1 gives "
                f"them, got values in {np.min(x_0):.4g}..{np.max(x_0):.4g}, up to "
                f"{np.max(off):.2g} of a level away; bits/dim are of whole pixels"
            )
    return wide(jnp.asarray(x_0))


def _table(schedule: Schedule, tau: Any, eta: float) -> tuple[_Row, Callable[[Array], Array]]:
    """The rows (τ_1, 0), (τ_2, τ_1), …, and KL(q(x_τS|x_0) ‖ N(0, I)) per pixel of x_0."""
    if not is_concrete(schedule, tau, eta):
        raise TypeError("schedule, tau and eta must be concrete: the bound's numbers are float64")
    if np.shape(eta) or not eta > 0:
        raise ValueError(
            f"eta must be above 0, got {eta}, one number: at eta = 0 the chain has no density and "
            "the bound is infinite; the ODE's density is ode_density"
        )
    t, s = (v[::-1] for v in pairs(schedule, tau))
    ddpm, c = coefficients(schedule, t, s, 1.0), coefficients(schedule, t, s, eta)
    first = sigma_hat(schedule, t[:1], s[:1]) if len(t) == 1 else np.asarray(ddpm.sigma)[1:2]
    sigma = np.concatenate([np.atleast_1d(first), c.sigma[1:]])
    kappa = c.direction / c.sqrt_one_minus_alpha_bar_t
    lam = c.sqrt_alpha_bar_s - kappa * c.sqrt_alpha_bar_t
    a, b = c.sqrt_alpha_bar_t, c.sqrt_one_minus_alpha_bar_t
    top, width = float(np.asarray(a)[-1] ** 2), float(np.asarray(b)[-1] ** 2)
    log_variance = 2 * np.log(sigma)
    row = _Row(t, a, b, lam / sigma, kappa / sigma, log_variance, np.zeros_like(sigma))
    row = row._replace(learned=_ascending(learned_variance(schedule, t[::-1], s[::-1])))
    return row, lambda x: (top * jnp.square(x) + width - 1 - float(np.log(width))) / 2


def _ascending(learned: LearnedVariance) -> LearnedVariance:
    return LearnedVariance(learned.low[::-1], learned.high[::-1])


def _log_ratio(schedule: Schedule, table: _Row, variance: str, learned: bool) -> Any:
    """log of p_θ's variance over σ(η)², where it is not learned; the decoder keeps its own."""
    if variance not in ("small", "large", "learned"):
        raise ValueError(f'variance must be "small", "large" or "learned", got {variance!r}')
    if variance == "small":
        return table.log_ratio
    if learned:
        raise ValueError(f'give variance="{variance}" or log_variance, not both')
    if variance == "learned":
        return table.log_ratio
    s = np.append(0, table.t[:-1])
    ratio = 2 * np.log(sigma_hat(schedule, table.t, s)) - table.log_variance
    return np.append(0.0, ratio[1:])


def _cast(v: Any, like: Array) -> Array:
    return jnp.asarray(v, jnp.int32 if np.issubdtype(v.dtype, np.integer) else like.dtype)


def _draw_rows(keys: Array, chance: np.ndarray, num_terms: int) -> Array:
    """(num_terms, B) rows of the table, independent."""
    with np.errstate(divide="ignore"):
        log = jnp.asarray(np.log(chance), jnp.float32)
    draw = lambda key: jax.random.categorical(jax.random.fold_in(key, 0), log, shape=(num_terms,))  # noqa: E731
    return jax.vmap(draw, out_axes=1)(keys)


def _term(
    denoise: Denoiser,
    variance: Callable[[Array, Array], Any] | None,
    by_share: bool,
    x_0: Array,
    keys: Array,
    table: _Row,
    _: None,
    at: tuple[Array, Array],
) -> tuple[None, tuple[Array, Array]]:
    """(t, the term of one row of the table for each image), each (B,).

    `variance` gives its logarithm, or `by_share` the network's output and the share v.
    """
    row, number = at
    here: Any = jax.tree.map(lambda v: v[row].reshape(row.shape + (1,) * (x_0.ndim - 1)), table)
    t = table.t[row]

    def noise_of(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, number + 1), x_0.shape[1:], x_0.dtype)

    x_t = here.a * x_0 + here.b * jax.vmap(noise_of)(keys)
    c = Coefficients(here.a, here.b, here.a, here.b, None)  # those of s are not used
    width = here.log_variance
    if variance is not None and by_share:
        output, v = variance(x_t, t)
        width = here.learned.log_variance(v)
    else:
        output = call(denoise, x_t, t)
        width = width if variance is None else variance(x_t, t).astype(x_0.dtype)
    predicted, eps = prediction_of(denoise).x0_eps(c, x_t, output)
    # The means of q and p over σ: their difference, λ(x_0 − x̂_0), and what clipping adds to it.
    off = here.lam * (x_0 - predicted) + here.kappa * (x_t - here.a * predicted - here.b * eps)
    ratio = here.log_ratio if variance is None else width - here.log_variance
    kl = (ratio + (1 + jnp.square(off)) * jnp.exp(-ratio) - 1) / 2
    nats = jnp.where(here.t == table.t[0], -log_mass(x_0, predicted, jnp.exp(width / 2)), kl)
    return None, (t, nats.sum(tuple(range(1, x_0.ndim))))


def log_mass(x: Array, mean: Array, sigma: Array) -> Array:
    """log of N(mean, σ²)'s mass on the bin of x, x ± 1/255 (Ho et al. 2020, Eq. 13).

    The bins of −1 and 1 reach to −∞ and ∞, so that the 256 masses add up to 1.

    Example:
      >>> x = jnp.linspace(-1, 1, 256)
      >>> round(float(jnp.exp(log_mass(x, jnp.float32(0.3), jnp.float32(0.1))).sum()), 4)
      1.0
    """
    half = 1 / (LEVELS - 1)
    middle = x - mean
    mirrored = -jnp.abs(middle)  # by symmetry into the lower tail, where differences keep digits
    edge_low, edge_high = x < -1 + half, x > 1 - half
    upper, lower = log_ndtr((mirrored + half) / sigma), log_ndtr((mirrored - half) / sigma)
    inner = upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-30)))
    outer = log_ndtr(jnp.where(edge_low, middle + half, half - middle) / sigma)
    return jnp.where(edge_low | edge_high, outer, inner)
