"""A network in closed form, for JAX, NumPy and torch, and models sampled as diffusers says.

x̂_0 = 1.4 tanh(1.2 √ᾱ x + 0.4 sin(i/150)), i = t − 1, beyond ±1 so that clipping matters; ε and v
follow from it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as ddim
from ddim_jax.weights.diffusers_scheduler import sampling_facts, schedule_config

SHAPE = (3, 2, 4, 1)
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
KEY = jax.random.key(3)


def output(xp, prediction, a, b, i, x):
    """What the network gives at x; a, b and i are (B, 1, 1, 1) or scalars, xp numpy-like."""
    x_0 = 1.4 * xp.tanh(1.2 * a * x + 0.4 * xp.sin(i / 150))
    if prediction == "x_0":
        return x_0
    if prediction == "eps":
        return (x - a * x_0) / b
    return a * (x - a * x_0) / b - b * x_0


def share(xp, i, x):
    """2 v − 1 of a learned variance."""
    return 0.8 * xp.sin(2 * x + i / 100)


def model_of(settings, pipeline=None):
    """A `Model` with the schedule, the prediction and the recipe of a scheduler_config.json."""
    config, prediction = schedule_config(settings)
    schedule, learned = config.build(), settings.get("variance_type") == "learned_range"
    a = jnp.asarray(np.sqrt(schedule.alpha_bar), jnp.float32)
    b = jnp.asarray(np.sqrt(-np.expm1(schedule.log_alpha_bar)), jnp.float32)

    def apply_fn(_, x, t):
        column = lambda v: v.astype(jnp.float32).reshape(-1, 1, 1, 1)  # noqa: E731
        out = output(jnp, prediction, column(a[t]), column(b[t]), column(t - 1), x)
        return jnp.concatenate([out, share(jnp, column(t - 1), x)], -1) if learned else out

    facts = {"sampling": sampling_facts(settings, pipeline)}
    network = ddim.predicts(apply_fn, prediction, learned_variance=learned)
    return ddim.Model(network, None, schedule, None, facts)


@partial(jax.jit, static_argnums=1)
def noise(t, shape=SHAPE):
    """`sample`'s z at t: image i's from fold_in(fold_in(key, i), t)."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, i), t))(
        jnp.arange(shape[0])
    )
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)
