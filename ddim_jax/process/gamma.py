"""γ_t of the objective (DDIM Eq. 5): functions (schedule, prediction) → the weight of each t.

`loss` compares a network on what it predicts. An error δ of the output is one of (∂x̂_0/∂output) δ
of x̂_0, a factor of t alone; so weight w_t on the squared error of x̂_0 is γ_t = w_t (∂x̂_0/∂output)²
on that of the output, and one weighting serves every prediction type:

    |∂x̂_0/∂output|² = 1/SNR for ε, 1 for x_0, 1 − ᾱ_t for v, (1/σ_d² + SNR)⁻¹ for "edm"

with SNR = ᾱ_t/(1 − ᾱ_t). The paper's γ_t, of the error of ε, is thus w_t/SNR.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ddim_jax.arrays import import_name
from ddim_jax.process.gaussian import coefficients, posterior
from ddim_jax.process.prediction import Prediction
from ddim_jax.process.schedule import Schedule

Gamma: TypeAlias = Callable[[Schedule, Prediction], np.ndarray]


def one(schedule: Schedule, prediction: Prediction) -> np.ndarray:
    """γ_t = 1 on the output itself: the paper's choice, and L_simple of Ho et al. (2020), for ε.

    Example:
      >>> import ddim_jax as ddim
      >>> one(ddim.linear_schedule(1000), ddim.Prediction("v")).shape
      (1001,)
    """
    return _from_one(np.ones(schedule.num_steps))


def bound(schedule: Schedule, prediction: Prediction, eta: float = 1.0) -> np.ndarray:
    """The variational bound J_σ of the paper's Theorem 1, σ = σ(η): w_t = λ_t²/(2σ_t²).

    It is KL(q_σ(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)): two normals of variance σ_t² whose means
    differ by λ_t (x_0 − x̂_0), λ_t of Eq. 7. T · `loss` with this γ is the bound in nats a pixel, up
    to a constant. At η = 1, w_t = ½ (SNR_{t−1} − SNR_t). At t = 1, where σ(η) = 0, p_θ(x_0 | x_1)
    is taken as N(x̂_0, (1 − ᾱ_1) I).

    Args:
      schedule: the noise schedule.
      prediction: what the network predicts.
      eta: η > 0 of Eq. 16; at η = 0 there is no bound.

    Returns:
      (T+1,) γ_t, γ_0 = 0.

    Raises:
      ValueError: eta is not positive.

    Example:
      >>> import ddim_jax as ddim
      >>> gamma = bound(ddim.schedule_from_alpha_bar([1.0, 0.8, 0.5]), ddim.Prediction("x_0"))
      >>> gamma.round(6).tolist()  # SNR: 4, then 1
      [0.0, 2.5, 1.5]
    """
    if not eta > 0:
        raise ValueError(f"the bound needs sigma > 0, so eta > 0, got {eta}")
    t = np.arange(2, schedule.num_steps + 1)
    _, lam, sigma = (np.asarray(v) for v in posterior(schedule, t, t - 1, eta))
    first = 0.5 / -math.expm1(float(schedule.log_alpha_bar[1]))
    weight = np.append(first, lam**2 / (2 * sigma**2))
    return _from_one(weight * _x0_error(schedule, prediction))


def min_snr(schedule: Schedule, prediction: Prediction, cap: float = 5.0) -> np.ndarray:
    """min-SNR-γ (Hang et al. 2023, §3.4): w_t = min(SNR_t, cap), their γ being the cap.

    On the output: min(SNR, cap)/SNR for ε, min(SNR, cap) for x_0, min(SNR, cap)/(SNR + 1) for v.

    Args:
      schedule: the noise schedule.
      prediction: what the network predicts.
      cap: > 0.

    Returns:
      (T+1,) γ_t, γ_0 = 0.

    Raises:
      ValueError: cap is not positive.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.9, 0.5])  # SNR: 9, then 1
      >>> min_snr(schedule, ddim.Prediction("v")).round(6).tolist()
      [0.0, 0.5, 0.5]
    """
    if not cap > 0:
        raise ValueError(f"cap must be > 0, got {cap}")
    snr = np.exp(np.asarray(schedule.log_snr, np.float64)[1:])
    return _from_one(np.minimum(snr, cap) * _x0_error(schedule, prediction))


def truncated_snr(schedule: Schedule, prediction: Prediction) -> np.ndarray:
    """w_t = max(SNR_t, 1): the larger of the squared errors of x̂_0 and ε (Salimans & Ho 2022, §4).

    On the output: max(1/SNR, 1) for ε, max(SNR, 1) for x_0, max(ᾱ, 1 − ᾱ) for v.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.9, 0.2])  # SNR: 9, then 1/4
      >>> truncated_snr(schedule, ddim.Prediction("v")).round(6).tolist()
      [0.0, 0.9, 0.8]
    """
    snr = np.exp(np.asarray(schedule.log_snr, np.float64)[1:])
    return _from_one(np.maximum(snr, 1.0) * _x0_error(schedule, prediction))


def snr_plus_one(schedule: Schedule, prediction: Prediction) -> np.ndarray:
    """w_t = SNR_t + 1: the squared error of v, whatever is predicted (Salimans & Ho 2022, §4).

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.schedule_from_alpha_bar([1.0, 0.9, 0.2])
      >>> snr_plus_one(schedule, ddim.Prediction("v")).round(6).tolist()
      [0.0, 1.0, 1.0]
    """
    snr = np.exp(np.asarray(schedule.log_snr, np.float64)[1:])
    return _from_one((snr + 1.0) * _x0_error(schedule, prediction))


def edm(
    schedule: Schedule, prediction: Prediction, mean: float = -1.2, std: float = 1.2
) -> np.ndarray:
    """Training of Karras et al. (2022, §5): weight 1/c_out(σ)², and ln σ ~ N(mean, std²).

    1/c_out² is γ = 1 on F. Here t is uniform, so γ_t is T times the probability that ln σ, σ² =
    (1 − ᾱ)/ᾱ, lies nearest to that of t; of other prediction types the same weight of x̂_0's error.

    Args:
      schedule: the noise schedule.
      prediction: what the network predicts; its sigma_data is σ_d.
      mean: P_mean of ln σ.
      std: P_std of ln σ, > 0.

    Returns:
      (T+1,) γ_t, γ_0 = 0; of mean 1 over 1..T for `"edm"`.

    Raises:
      ValueError: std is not positive.

    Example:
      >>> import ddim_jax as ddim
      >>> gamma = edm(ddim.linear_schedule(1000), ddim.Prediction("edm"))
      >>> round(float(gamma[1:].mean()), 6), int(gamma[10:].argmax()) + 10
      (1.0, 17)
    """
    if not std > 0:
        raise ValueError(f"std must be > 0, got {std}")
    log_sigma = -np.asarray(schedule.log_snr, np.float64)[1:] / 2
    edges = ((log_sigma[1:] + log_sigma[:-1]) / 2 - mean) / std
    below = [0.0, *((1 + math.erf(e / math.sqrt(2))) / 2 for e in edges), 1.0]
    own = _x0_error(schedule, dataclasses.replace(prediction, kind="edm"))
    return _from_one(schedule.num_steps * np.diff(below) * _x0_error(schedule, prediction) / own)


GAMMAS: dict[str, Gamma] = {
    "one": one,
    "bound": bound,
    "min-snr-5": min_snr,
    "truncated-snr": truncated_snr,
    "snr-plus-one": snr_plus_one,
    "edm": edm,
}
"""Name → γ; what `--train.gamma` knows."""


def find_gamma(name: str) -> Gamma:
    """A γ by its name in `GAMMAS`, or as `module:function`.

    Args:
      name: such as `"min-snr-5"`.

    Returns:
      (schedule, prediction) → (T+1,) γ_t on the squared error of the network's output.

    Raises:
      ValueError: the name is unknown.
      ModuleNotFoundError: there is no such module.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.linear_schedule(1000)
      >>> find_gamma("min-snr-5")(schedule, ddim.Prediction("eps"))[[1, 1000]].round(4).tolist()
      [0.0005, 1.0]
    """
    if name in GAMMAS:
        return GAMMAS[name]
    if ":" not in name:
        raise ValueError(f"unknown gamma {name!r}; choose {', '.join(GAMMAS)}, or module:function")
    found: Gamma = import_name(name, "gamma")
    return found


def _x0_error(schedule: Schedule, prediction: Prediction) -> np.ndarray:
    """(T,) (∂x̂_0/∂output)² at 1..T."""
    c = coefficients(schedule, np.arange(1, schedule.num_steps + 1), 0)
    a, b = np.square(c.sqrt_alpha_bar_t), np.square(c.sqrt_one_minus_alpha_bar_t)
    d = prediction.sigma_data**2
    if prediction.kind == "eps":
        prediction.check(c)
        return b / a
    return {"x_0": np.ones_like(a), "v": b, "edm": d * b / (a * d + b)}[prediction.kind]


def _from_one(weights: np.ndarray) -> np.ndarray:
    """γ_1..γ_T with a γ_0, which nothing uses, before them."""
    return np.append(0.0, weights)
