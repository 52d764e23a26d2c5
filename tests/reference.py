"""Float64 NumPy written from the paper's page, and a smooth problem solved by it."""

import functools
import itertools

import numpy as np

import ddim_jax as ddim


def alpha_bar_linear(num_steps=1000, beta_start=1e-4, beta_end=0.02):
    beta = np.linspace(beta_start, beta_end, num_steps, dtype=np.float64)
    return np.concatenate([[1.0], np.cumprod(1.0 - beta)])


def eta_sigma(a, t, s, eta):
    """Eq. 16."""
    return eta * np.sqrt((1 - a[s]) / (1 - a[t])) * np.sqrt(1 - a[t] / a[s])


def ddim_loop(eps, x, a, tau, eta=0.0, noise=None):
    """Eq. 12 along reversed(tau), then to 0; noise(t) gives z."""
    x = np.asarray(x, np.float64)
    tau = [0, *[int(t) for t in tau]]
    for i in range(len(tau) - 1, 0, -1):
        t, s = tau[i], tau[i - 1]
        e = eps(x, t)
        sigma = eta_sigma(a, t, s, eta)
        x_0 = (x - np.sqrt(1 - a[t]) * e) / np.sqrt(a[t])
        x = np.sqrt(a[s]) * x_0 + np.sqrt(1 - a[s] - sigma**2) * e
        if sigma > 0:
            x = x + sigma * noise(t)
    return x


@functools.cache
def smooth_problem():
    """A mixture of wide Gaussians, σ from 3 to 0 in graded steps: schedule, denoiser, x_T, x_0.

    Of σ ~ t^2.5 the steps in log σ near the end, which never become small, weigh less than h⁴.
    """
    rng = np.random.default_rng(0)
    num_steps = 128
    sigma = 3 * (np.arange(num_steps + 1) / num_steps) ** 2.5
    schedule = ddim.schedule_from_betas(np.diff(sigma**2) / (1 + sigma[1:] ** 2))
    means, variance = rng.normal(size=(3, 2)), np.array([0.25, 0.4, 0.3])
    denoise = ddim.oracle.mixture(schedule, means, variance, [0.5, 0.3, 0.2])
    x_T = rng.normal(size=(32, 2))
    return schedule, denoise, x_T, _fine_solution(x_T, means, variance)


def _fine_solution(x_T, means, variance):
    """RK4 on dx̄ = ε dσ in float64 NumPy, ε from the mixture's score written out."""

    def eps(x_bar, sigma):
        s = variance + sigma**2  # x̄ | component k ~ N(m_k, s_k I)
        r = x_bar[:, None] - means[None]
        p = np.array([0.5, 0.3, 0.2]) / s * np.exp(-(r**2).sum(-1) / (2 * s))
        return sigma * ((p / p.sum(1, keepdims=True) / s)[..., None] * r).sum(1)

    x_bar, grid = x_T * np.sqrt(10.0), np.linspace(3, 0, 2001)
    for a, b in itertools.pairwise(grid):
        h, mid = b - a, (a + b) / 2
        k1 = eps(x_bar, a)
        k2 = eps(x_bar + h / 2 * k1, mid)
        k3 = eps(x_bar + h / 2 * k2, mid)
        x_bar = x_bar + h / 6 * (k1 + 2 * k2 + 2 * k3 + eps(x_bar + h * k3, b))
    return x_bar
