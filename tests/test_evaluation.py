import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_jax.evaluation import Moments, frechet_distance, moments


def random_moments(rng, dim, rank=None):
    factor = rng.standard_normal((dim, rank or dim))
    return Moments(101, rng.standard_normal(dim), 100 * factor @ factor.T)


@given(st.integers(1, 12), st.integers(0, 2**31 - 1))
@settings(max_examples=50)
def test_against_scipys_matrix_square_root(dim, seed):
    rng = np.random.default_rng(seed)
    a, b = random_moments(rng, dim, dim + 2), random_moments(rng, dim, dim + 2)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    want = ((a.mean - b.mean) ** 2).sum() + np.trace(
        a.covariance + b.covariance - 2 * np.real(root)
    )
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_closed_form_of_commuting_gaussians():
    """Diagonal covariances: Σ (μ_a − μ_b)² + (√v_a − √v_b)²."""
    a = Moments(11, np.array([1.0, 2.0]), 10 * np.diag([4.0, 9.0]))
    b = Moments(21, np.array([0.0, 2.0]), 20 * np.diag([1.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 1, rel=1e-12)


def test_singular_covariances_are_no_obstacle():
    rng = np.random.default_rng(0)
    a, b = random_moments(rng, 10, 3), random_moments(rng, 10, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_merged_moments_are_one_shot_moments(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((n, 4)) * 3 + 100 for n in sizes]
    merged = moments(parts[0])
    for part in parts[1:]:
        merged = merged.merge(moments(part))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(merged.mean, whole.mean(axis=0), rtol=1e-10)
    if len(whole) > 1:
        np.testing.assert_allclose(merged.covariance, np.cov(whole.T), rtol=1e-10, atol=1e-10)
    assert merged.size == len(whole)


def test_bad_input():
    with pytest.raises(ValueError, match="shape"):
        moments(np.zeros(3))
    with pytest.raises(ValueError, match="1 rows are not, the first is 2"):
        moments(np.array([[0.0], [1.0], [np.nan]]))
    with pytest.raises(ValueError, match="dimension: 2, 3"):
        frechet_distance(moments(np.eye(2)), moments(np.eye(3)))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(moments(np.ones((1, 2))), moments(np.eye(2)))
