import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import ddim_jax as ddim
from ddim_jax.process import oracle
from ddim_jax.sampling.latents import same_latent, slerp, spherical_grid

SCHEDULE = ddim.linear_schedule(1000)
EPS = np.finfo(np.float32).eps


def angle(a, b):
    """arccos(a·b/(‖a‖ ‖b‖)) of one image in float64, without arccos's loss near 0 and π."""
    a, b = (np.asarray(v, np.float64) / np.linalg.norm(np.asarray(v, np.float64)) for v in (a, b))
    return 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))


def numpy_slerp(a, b, weight):
    """D.5 for one image, in float64."""
    theta, a, b = angle(a, b), np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (np.sin((1 - weight) * theta) * a + np.sin(weight * theta) * b) / np.sin(theta)


def latents(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(4, 2), (3, 5, 2), (2, 4, 4, 3)]),
    weight=st.floats(0, 1),
)
def test_slerp_is_d5_image_by_image(seed, shape, weight):
    a, b = latents(seed, shape), latents(seed + 1, shape)
    theta = np.array([angle(*pair) for pair in zip(a, b)])
    assume((theta < np.pi - 1e-4).all())  # opposite to float32's eye: refused, tested below
    got = slerp(a, b, weight)
    # d/dθ of sin((1 − w)θ)/sin θ is at most π/sin² θ beyond π/2, and below 1 before.
    condition = np.where(theta < np.pi / 2, 1, 1 / np.sin(theta) ** 2)
    for i in range(shape[0]):
        atol = 8 * EPS * (np.linalg.norm(a[i]) + np.linalg.norm(b[i])) * condition[i]
        np.testing.assert_allclose(got[i], numpy_slerp(a[i], b[i], weight), rtol=0, atol=atol)


def test_slerp_takes_one_weight_per_image():
    a, b, weight = latents(0, (5, 7)), latents(1, (5, 7)), np.linspace(0, 1, 5)
    got = slerp(a, b, weight)
    for i in range(5):
        np.testing.assert_allclose(got[i], numpy_slerp(a[i], b[i], weight[i]), atol=1e-5)
    np.testing.assert_array_equal(got[0], a[0])
    np.testing.assert_array_equal(got[-1], b[-1])


@given(seed=st.integers(0, 10**6), weight=st.floats(0, 1))
def test_slerp_of_equal_norms_keeps_the_norm_and_divides_the_angle(seed, weight):
    a, b = latents(seed, (3, 16)), latents(seed + 1, (3, 16))
    b = b * (jnp.linalg.norm(a, axis=1) / jnp.linalg.norm(b, axis=1))[:, None]
    c = np.asarray(slerp(a, b, weight), np.float64)
    whole, part = (np.array([angle(*pair) for pair in zip(a, v)]) for v in (b, c))
    # On the sphere an error of θ or of a weight, a few EPS, is divided by sin θ.
    tolerance = (16 * EPS / np.sin(whole)).max()
    np.testing.assert_allclose(np.linalg.norm(c, axis=1), np.linalg.norm(a, axis=1), rtol=tolerance)
    np.testing.assert_allclose(part, weight * whole, rtol=0, atol=tolerance)


def test_slerp_does_not_depend_on_the_rest_of_the_batch():
    a, b = latents(0, (6, 8)), latents(1, (6, 8))
    scale = jnp.array([1.0, 10, 100, 1, 1, 1000])[:, None]
    whole = slerp(a * scale, b, 0.3)
    for i in range(6):
        np.testing.assert_allclose(
            slerp((a * scale)[i : i + 1], b[i : i + 1], 0.3)[0], whole[i], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_slerp_end_points_are_exact(weight):
    a, b = latents(2, (4, 9)), 3 * latents(3, (4, 9))
    np.testing.assert_array_equal(slerp(a, b, weight), a if weight == 0 else b)


@pytest.mark.parametrize("tilt", [0.0, 1e-7, 1e-4, 1e-2])
def test_slerp_of_nearly_parallel_latents_is_linear(tilt):
    a = latents(4, (2, 5))
    b = 2 * a + tilt * latents(5, (2, 5))
    np.testing.assert_allclose(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=1e-4, atol=1e-5)


def test_slerp_of_opposite_or_zero_latents():
    a = latents(6, (3, 5))
    opposite, zero = a.at[1].multiply(-1), a.at[1].set(0)
    for other in (opposite, zero):
        with pytest.raises(ValueError, match="image 1"):
            slerp(a, other, 0.5)
        traced = jax.jit(slerp)(a, other, 0.5)
        assert np.isnan(traced[1]).all()
        assert np.isfinite(traced[jnp.array([0, 2])]).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("factor", [-1, -3, -0.7])
def test_slerp_of_latents_opposite_but_for_rounding(dtype, factor):
    """Products by −3 and −0.7 are rounded to the dtype: what angle is left has no meaning."""
    a = latents(6, (2, 5)).astype(dtype)
    with pytest.raises(ValueError, match="image 0 are opposite"):
        slerp(a, a * jnp.asarray(factor, dtype), 0.5)


def test_spherical_grid():
    corners = latents(7, (4, 3, 3, 1))
    grid = spherical_grid(corners, 5, 7)
    assert grid.shape == (5, 7, 3, 3, 1)
    for (i, j), corner in zip([(0, 0), (0, -1), (-1, 0), (-1, -1)], corners):
        np.testing.assert_array_equal(grid[i, j], corner)
    left, right = (numpy_slerp(corners[k], corners[k + 2], 1 / 4) for k in (0, 1))
    np.testing.assert_allclose(grid[1, 2], numpy_slerp(left, right, 2 / 6), atol=1e-5)


def test_same_latent_images_are_those_of_sample_and_come_together():
    denoise = oracle.gaussian(SCHEDULE, 0.3, 0.2)
    x_T = ddim.initial_noise(jax.random.key(0), 16, (3,))
    taus = [ddim.timesteps(1000, s) for s in (200, 10, 50)]
    result = same_latent(denoise, x_T, SCHEDULE, taus)
    for tau, images in zip(taus, result.images):
        np.testing.assert_array_equal(images, ddim.sample(denoise, x_T, SCHEDULE, tau))
    rms = np.sqrt(np.mean(np.square(result.images[1] - result.images[0]), axis=1))
    np.testing.assert_allclose(result.distance[1], rms, rtol=1e-5)
    longest, ten, fifty = np.asarray(result.distance).mean(axis=1)
    assert longest == 0
    assert fifty < ten / 3


def test_same_latent_in_a_feature_space():
    denoise, x_T = oracle.gaussian(SCHEDULE, 0.0, 0.5), latents(8, (4, 3))
    taus = [ddim.timesteps(1000, 5), ddim.timesteps(1000, 20)]
    plain = same_latent(denoise, x_T, SCHEDULE, taus)
    doubled = same_latent(denoise, x_T, SCHEDULE, taus, feature=lambda x: 2 * x)
    np.testing.assert_allclose(doubled.distance, 2 * plain.distance, rtol=1e-5)


A = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: slerp(A, A[:1], 0.5), ValueError, "one shape"),
        (lambda: slerp(A[0], A[0], 0.5), ValueError, "leading axis"),
        (lambda: slerp(A, 2 * A, 1.5), ValueError, r"\[0, 1\]"),
        (lambda: slerp(A, 2 * A, float("nan")), ValueError, r"\[0, 1\]"),
        (lambda: slerp(A, 2 * A, jnp.ones(3)), ValueError, "per image"),
        (lambda: slerp(A.astype(int), A, 0.5), TypeError, "floating"),
        (lambda: spherical_grid(jnp.ones((3, 2)), 3, 3), ValueError, "four"),
        (lambda: spherical_grid(jnp.ones((4, 2)), 1, 3), ValueError, "rows"),
        (lambda: same_latent(lambda x, t: x, A, SCHEDULE, []), ValueError, "at least one"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_slerp_of_large_low_precision_latents(dtype):
    """‖x‖² of 256×256×3 numbers is 2e5, beyond float16."""
    a, b = (latents(seed, (2, 256, 256, 3)).astype(dtype) for seed in (0, 1))
    wide = slerp(a.astype(jnp.float32), b.astype(jnp.float32), 0.3)
    for f in (slerp, jax.jit(slerp)):
        got = f(a, b, 0.3)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), wide, rtol=8e-3, atol=1e-3)
    grid = spherical_grid(jnp.concatenate([a, b])[:, :8], 2, 3)
    assert grid.dtype == dtype
    assert np.isfinite(np.asarray(grid, np.float32)).all()


def test_slerp_has_the_derivative_of_a_straight_line_at_equal_latents():
    a, v = latents(0, (2, 5)), latents(1, (2, 5))
    for weight in (0.0, 0.25, 1.0):
        _, tangent = jax.jvp(lambda b, w=weight: slerp(a, b, w), (a,), (v,))
        np.testing.assert_allclose(tangent, weight * v, atol=1e-6)
        assert np.isfinite(jax.grad(lambda b, w=weight: slerp(a, b, w).sum())(a)).all()
    path = jax.jvp(lambda w: slerp(a, v, w), (0.0,), (1.0,))[1]
    np.testing.assert_allclose(path, (slerp(a, v, 1e-2) - a) / 1e-2, atol=0.05)


def test_dynamic_threshold_in_low_precision_and_at_its_bound():
    x = latents(2, (2, 64)).astype(jnp.bfloat16)
    threshold = ddim.dynamic_threshold(0.9)
    wide = threshold(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(threshold(x), wide)
    at_bound = jnp.array([[1.0, -1.0, 0.0]])
    for f in (threshold, ddim.clip_x0(1.0)):
        assert np.isfinite(jax.grad(lambda x, f=f: f(x).sum())(at_bound)).all()


@pytest.mark.parametrize("tilt", [1e-5, 3e-7, 1e-7])
def test_slerp_has_the_derivative_of_a_straight_line_near_parallel_latents(tilt):
    """To the order of the angle θ; the quotient sin θ/θ loses EPS/θ in its derivative."""
    a, v = latents(0, (2, 12)), latents(1, (2, 12))
    b = 1.5 * a + tilt * latents(2, (2, 12))
    _, tangent = jax.jvp(lambda b: slerp(a, b, 0.3), (b,), (v,))
    np.testing.assert_allclose(tangent, 0.3 * v, rtol=0, atol=10 * tilt + 10 * EPS)
