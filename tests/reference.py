"""Float64 NumPy written from the paper's page, sharing no code with the package."""

import numpy as np


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
