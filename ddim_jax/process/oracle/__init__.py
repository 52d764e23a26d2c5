"""Exact denoisers: the optimal ε for data whose noisy marginals are known in closed form.

ε*(x, t) = E[ε | x_t = x] = (x − √ᾱ_t E[x_0 | x_t = x])/√(1 − ᾱ_t) = −√(1 − ᾱ_t) ∇ log q_t(x)

It minimises the loss of Eq. 5 over all functions, so that every claim about samplers can be
checked with no training. Each is computed as √(1 − ᾱ_t) times an average of (x − √ᾱ_t m)/(…),
from log ᾱ and from differences x − √ᾱ_t m, never from ‖x‖² − 2 x·m + ‖m‖²: in float32 at t = 1
that expansion is wrong by about 10⁻⁷ ‖x‖²/(1 − ᾱ₁), several units in the exponent.
"""

from ddim_jax.process.oracle.mixtures import empirical, mixture, mixture_log_density
from ddim_jax.process.oracle.normal import gaussian, gaussian_marginal
