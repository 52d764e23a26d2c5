"""Progressive distillation: a step that lands where two of the teacher's land.

Divide DDIM's step at η = 0 (Eq. 12) by √(1 − ᾱ_s). With r = √ᾱ/√(1 − ᾱ) = √SNR,

    x_s/√(1 − ᾱ_s) = x_t/√(1 − ᾱ_t) + (r_s − r_t) x̂_0

since ε = (x_t − √ᾱ_t x̂_0)/√(1 − ᾱ_t): DDIM is Euler's rule in r, with x̂_0 for a slope (as it is in
√(1 − ᾱ)/√ᾱ with ε for a slope, Eq. 13). So two steps t → t' → t'' are one step whose slope is the
mean of both, each weighted with its length in r:

    x̃ = w x̂_0(x_t, t) + (1 − w) x̂_0(x_t', t'),   w = (r_t' − r_t)/(r_t'' − r_t).

This is the target of Salimans & Ho (2022), Alg. 2, x̃ = (z_t'' − κ z_t)/(α_t'' − κ α_t) with κ =
σ_t''/σ_t, α = √ᾱ, σ = √(1 − ᾱ) (derived in their App. G), without its difference of nearly equal
numbers. At t'' = 0, where SNR is infinite, w = 0: the target is the teacher's last x̂_0 itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, ArrayLike, Denoiser, call, check_batch, per_image, wide
from ddim_jax.process.gaussian import coefficients, forward_marginal
from ddim_jax.process.objective import draws, weighted_error
from ddim_jax.process.prediction import Prediction, from_x0_eps
from ddim_jax.process.predictor import prediction_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps
from ddim_jax.process.stepping import step


def halve_timesteps(tau: Sequence[int] | np.ndarray, num_steps: int) -> np.ndarray:
    """τ of the student: τ₂, τ₄, …, τ_S, every second one from the end that sampling starts at.

    Args:
      tau: (S,) the teacher's τ, S even.
      num_steps: T.

    Returns:
      (S/2,) int32.

    Raises:
      ValueError: S is odd, or τ is not strictly increasing in 1..T.

    Example:
      >>> halve_timesteps([250, 500, 750, 1000], 1000).tolist()
      [500, 1000]
    """
    tau = as_timesteps(tau, num_steps)
    if len(tau) % 2:
        raise ValueError(
            f"a student takes its teacher's steps by twos, so their number must be even, got "
            f"S = {len(tau)}"
        )
    return tau[1::2]


def distillation_target(
    teacher: Denoiser, schedule: Schedule, x_t: Array, t: Array, mid: Array, s: Array
) -> Array:
    """x̃, the x̂_0 by which one DDIM step t → s is the teacher's two, t → mid → s, η = 0.

    x̃ = w x̂_0(x_t, t) + (1 − w) x̂_0(x_mid, mid), w = (r_mid − r_t)/(r_s − r_t), r = √SNR
    (Salimans & Ho 2022, Alg. 2; derived at the top of this file). The teacher's predictions are
    taken as they are: where ε is predicted near ᾱ_t = 0, x̂_0 has its error times 1/√ᾱ_t.

    Args:
      teacher: (x (B, ...), t (B,)) → (B, ...), with what it predicts.
      schedule: the noise schedule.
      x_t: (B, ...) floating.
      t: int (B,) in 1..T.
      mid: int (B,) in 1..t − 1.
      s: int (B,) in 0..mid − 1.

    Returns:
      x̃, shape and dtype of x_t.

    Raises:
      ValueError: t, mid or s is out of range; the teacher predicts ε where ᾱ_t = 0; or keeps its
        own ε beside a changed x̂_0, so that its two steps are no one step.

    Example:
      >>> import ddim_jax as ddim, jax.numpy as jnp
      >>> teacher = ddim.predicts(lambda x, t: 0.5 * x, "x_0")
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.64, 0.36])
      >>> t, mid, s = jnp.array([[2], [1], [0]])
      >>> x_0 = distillation_target(teacher, schedule, jnp.ones((1, 1)), t, mid, s)
      >>> x_2 = ddim.ddim_step(schedule, jnp.ones((1, 1)), x_0, 2, 0, prediction="x_0")
      >>> float(x_2[0, 0]) == float(ddim.sample(teacher, jnp.ones((1, 1)), schedule, [1, 2])[0, 0])
      True
    """
    prediction, x = prediction_of(teacher), wide(check_batch(x_t))
    if prediction.x0_fn is not None and not prediction.rederive_eps:
        raise ValueError(
            "with rederive_eps=False ε does not belong to x̂_0, and no single step is two such "
            "steps: distil with rederive_eps=True, or without x0_fn"
        )
    first, second = coefficients(schedule, t, mid), coefficients(schedule, mid, s)
    prediction.check(first)
    x_mid, x_0 = step(first, x, call(teacher, x, t, x_t.dtype), prediction=prediction)
    output = call(teacher, x_mid, mid, x_t.dtype)
    _, x_0_mid = step(second, x_mid, output, prediction=prediction)
    r_t, r_mid = (c.sqrt_alpha_bar_t / c.sqrt_one_minus_alpha_bar_t for c in (first, second))
    a, b = second.sqrt_alpha_bar_s, second.direction  # r_s = a/b, infinite at s = 0
    w = per_image(b * (r_mid - r_t) / (a - b * r_t), x)
    return (w * x_0 + (1 - w) * x_0_mid).astype(x_t.dtype)


def distillation_loss(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    tau: Sequence[int] | np.ndarray,
    x_0: Array,
    key: Array,
    gamma: ArrayLike | None = None,
    *,
    indices: ArrayLike | None = None,
) -> Array:
    """`loss`, but t is one of the student's and the target is two of the teacher's steps.

    mean_k γ_{t_k} ‖student(x_t, t) − target‖²/dim, t uniform in `halve_timesteps(tau)`, x_t of
    Eq. 4, target what the student's output would be for x̃ of `distillation_target` (Salimans & Ho
    2022, Alg. 2). Their weight of x̂_0's error, max(SNR, 1), is γ `"truncated-snr"`; SNR + 1 is
    `"snr-plus-one"`, of v γ = 1 (their §4). Student and teacher may predict different things. No
    gradient flows into the teacher.

    Args:
      student: (x (B, ...), t (B,)) → (B, ...), with what it predicts.
      teacher: the same of the teacher.
      schedule: the noise schedule.
      tau: (S,) the teacher's τ, S even.
      x_0: (B, ...) floating data, scaled to [−1, 1].
      key: a JAX random key; a new one each step.
      gamma: (T+1,) weights of the squared error of the student's output; None for 1.
      indices: (B,) as in `loss`.

    Returns:
      A float32 scalar.

    Raises:
      TypeError, ValueError: as `loss`, `halve_timesteps` and `distillation_target`.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> schedule = ddim.linear_schedule(1000)
      >>> sure = ddim.predicts(lambda x, t: jnp.ones_like(x), "x_0")  # of one image: no error
      >>> x_0, key = jnp.zeros((4, 2)), jax.random.key(0)
      >>> float(ddim.distillation_loss(sure, sure, schedule, [500, 1000], x_0, key))
      0.0
    """
    x_0 = check_batch(x_0)
    table = jnp.asarray(two_steps(tau, schedule.num_steps))
    return loss_of_steps(student, teacher, schedule, table, x_0, key, gamma, indices=indices)


def two_steps(tau: Sequence[int] | np.ndarray, num_steps: int) -> np.ndarray:
    """(3, S/2) int32: t, t' and t'' of the two teacher's steps that each of the student's is.

    Raises:
      ValueError: as `halve_timesteps`.

    Example:
      >>> two_steps([250, 500, 750, 1000], 1000).tolist()
      [[500, 1000], [250, 750], [0, 500]]
    """
    t = halve_timesteps(tau, num_steps)
    return np.stack([t, np.asarray(tau)[::2], np.append(0, t[:-1])]).astype(np.int32)


def loss_of_steps(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    table: Array,
    x_0: Array,
    key: Array,
    gamma: ArrayLike | None = None,
    *,
    indices: ArrayLike | None = None,
) -> Array:
    """`distillation_loss` of the columns of `two_steps`, which may be traced: each equally often.

    A table repeated as a whole has the same loss, to the bit: the column is a random number modulo
    their count.

    Args:
      table: (3, n) int t, t', t'', see `two_steps`; not checked.
      student, teacher, schedule, x_0, key, gamma, indices: as in `distillation_loss`.

    Returns:
      A float32 scalar.

    Example:
      >>> import ddim_jax as ddim, jax, jax.numpy as jnp
      >>> given = [ddim.predicts(lambda x, t, w=w: w * x, "v") for w in (0.1, 0.2)]
      >>> rest = (jnp.ones((4, 2)), jax.random.key(0))
      >>> table = two_steps([250, 500, 750, 1000], 1000)
      >>> once = loss_of_steps(*given, ddim.linear_schedule(1000), jnp.asarray(table), *rest)
      >>> table = jnp.asarray(np.tile(table, 3))
      >>> bool(once == loss_of_steps(*given, ddim.linear_schedule(1000), table, *rest))
      True
    """
    i, noise = draws(x_0, key, table.shape[1], indices)
    t, mid, s = table[:, i - 1]
    x_t = forward_marginal(schedule, wide(x_0), t, noise)
    target = jax.lax.stop_gradient(distillation_target(teacher, schedule, x_t, t, mid, s))
    prediction, c = prediction_of(student), coefficients(schedule, t, s)
    target = from_x0_eps(c, *Prediction("x_0").x0_eps(c, x_t, target), prediction)
    return weighted_error(schedule, call(student, x_t, t, x_0.dtype), target, t, gamma)
