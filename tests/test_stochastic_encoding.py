"""Codes of η > 0: the z with which the chain returns an image, and what another denoiser does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling import decode_stochastic, encode_stochastic
from tests import reference

A = reference.alpha_bar_linear()
SCHEDULE = ddim.linear_schedule(1000)
KEY = jax.random.key(5)
TAU = ddim.timesteps(1000, 20, "quadratic")
# Two classes along the first axis; along the second, two groups that either class has.
LEFT = jnp.array([[-1.0, -0.7], [-1.0, 0.7]])
RIGHT = jnp.array([[1.0, -0.5], [0.8, 0.9]])
OF_LEFT = oracle.mixture(SCHEDULE, LEFT, 0.02)
OF_RIGHT = oracle.mixture(SCHEDULE, RIGHT, 0.03)
COUNT = 400
GROUP = jnp.arange(COUNT) % 2
X_0 = LEFT[GROUP] + 0.02**0.5 * ddim.initial_noise(jax.random.key(6), COUNT, (2,))
CHAINS = {
    "0.5": {"eta": 0.5},
    "1": {"eta": 1.0},
    "some": {"eta": np.where(np.arange(20) < 8, 0.7, 0.0)},  # no noise in the steps from above
    "hat": {"method": ddim.ddpm("large")},
    "hat to the end": {"method": ddim.ddpm("large", final_noise=True)},
}
# Rounding of float32 at each of 20 steps of the sampler, itself compiled apart from the encoder.
ROUNDING = 1e-4


@pytest.mark.parametrize("name", CHAINS)
def test_the_image_comes_back(name):
    code = encode_stochastic(OF_LEFT, X_0, SCHEDULE, TAU, key=KEY, **CHAINS[name])
    assert code.noise.shape == (20, *X_0.shape)
    back = decode_stochastic(OF_LEFT, code, SCHEDULE, TAU, **CHAINS[name])
    np.testing.assert_allclose(back, X_0, rtol=0, atol=ROUNDING)
    last = float(jnp.abs(code.residual).max())
    assert (last < 1e-6) == (name == "hat to the end")  # the rest of them have σ = 0 there


def test_the_papers_loop_returns_it_too():
    """Eq. 12 in float64 NumPy with these z; on its way, x_t ~ q(x_t | x_0), drawn apart."""
    code = encode_stochastic(OF_LEFT, X_0, SCHEDULE, TAU, 1.0, KEY)
    z, seen, x_0 = dict(zip(TAU[::-1].tolist(), code.noise, strict=True)), [], np.asarray(X_0)

    def eps(x, t):
        seen.append((x - np.sqrt(A[t]) * x_0) / np.sqrt(1 - A[t]))
        r = x[:, None] - np.sqrt(A[t]) * np.asarray(LEFT, np.float64)
        s = A[t] * 0.02 + 1 - A[t]
        p = np.exp(-(r**2).sum(-1) / (2 * s))
        return np.sqrt(1 - A[t]) / s * ((p / p.sum(1, keepdims=True))[..., None] * r).sum(1)

    end = reference.ddim_loop(eps, code.x_T, A, TAU, 1.0, lambda t: np.asarray(z[t], np.float64))
    np.testing.assert_allclose(end + code.residual, x_0, rtol=0, atol=ROUNDING)
    n = np.stack(seen)  # (20, 400, 2) of n_t: standard normal, each step's its own
    assert abs(np.square(n).mean() - 1) < 4 * np.sqrt(2 / n.size)
    assert abs((n[1:] * n[:-1]).mean()) < 4 / np.sqrt(n[1:].size)
    assert code.noise[5:-1].var() > 1.5  # unlike the chain's own z


def test_an_edit_changes_the_class_and_keeps_the_rest():
    code = encode_stochastic(OF_LEFT, X_0, SCHEDULE, TAU, 1.0, KEY)
    edited = decode_stochastic(OF_RIGHT, code, SCHEDULE, TAU, 1.0)
    fresh = ddim.sample(OF_RIGHT, code.x_T, SCHEDULE, TAU, 1.0, KEY)
    for images in (edited, fresh):
        assert (images[:, 0] > 0).all()  # the class on the right, by 4.6 standard deviations
    kept, by_chance = (np.mean((images[:, 1] > 0.2) == (GROUP == 1)) for images in (edited, fresh))
    assert kept > 0.9
    assert abs(by_chance - 0.5) < 4 * 0.5 / np.sqrt(COUNT)
    within = np.corrcoef(edited[:, 1] - RIGHT[GROUP, 1], X_0[:, 1] - LEFT[GROUP, 1])[0, 1]
    assert within > 0.5  # where it was in its group, too


def test_a_code_does_not_depend_on_its_batch():
    whole = encode_stochastic(OF_LEFT, X_0[:4], SCHEDULE, TAU, 1.0, KEY)
    keys = ddim.image_keys(KEY, [2, 3])
    part = encode_stochastic(OF_LEFT, X_0[2:4], SCHEDULE, TAU, 1.0, keys)
    np.testing.assert_allclose(part.x_T, whole.x_T[2:], atol=1e-6)
    np.testing.assert_allclose(part.noise, whole.noise[:, 2:], atol=1e-2)


def call(**options):
    return encode_stochastic(OF_LEFT, X_0[:2], SCHEDULE, TAU, **{"eta": 1.0, "key": KEY, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"eta": 0.0}, "adds none"),
        ({"key": None}, "needs key"),
        ({"method": ddim.ddpm()}, "not both"),
        ({"eta": 0.0, "method": ddim.adams_bashforth(2)}, "adds none"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(ValueError, match=match):
        call(**options)


def test_a_code_of_another_tau():
    with pytest.raises(ValueError, match=r"noise must be .* \(10, 2, 2\)"):
        decode_stochastic(OF_LEFT, call(), SCHEDULE, TAU[::2], 1.0)
    with pytest.raises(ValueError, match="adds some"):
        decode_stochastic(OF_LEFT, call(), SCHEDULE, TAU)
