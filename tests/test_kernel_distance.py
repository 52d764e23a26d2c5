"""KID's estimator: brute force, closed form, unbiasedness, calibrated errors."""

import numpy as np
import pytest

from ddim_jax.evaluation import KernelDistance, kernel_distance, squared_mmd


def brute_force(x, y):
    """The formula, one pair at a time."""

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(k(a, b) for a in x for b in y) / (m * n)
    return xx + yy - 2 * xy


@pytest.mark.parametrize(("m", "n", "dim"), [(2, 2, 1), (5, 9, 3), (12, 7, 20)])
def test_against_brute_force(m, n, dim):
    rng = np.random.default_rng(m)
    x, y = rng.standard_normal((m, dim)) + 1, rng.standard_normal((n, dim)).astype(np.float32)
    assert squared_mmd(x, y) == pytest.approx(brute_force(x, y), rel=1e-12)


def test_unbiased_where_the_distributions_are_equal():
    rng = np.random.default_rng(0)
    values = [squared_mmd(*rng.standard_normal((2, 12, 3))) for _ in range(3000)]
    assert abs(np.mean(values)) < 3.5 * np.std(values) / np.sqrt(3000)
    assert np.min(values) < 0 < np.max(values)


def test_unbiased_for_the_closed_form():
    """One dimension, x ~ N(0, 1), y ~ N(μ, 1): Σ_p C(3, p) (E y^p − E x^p)², p = 1, 2, 3."""
    mu = 0.5
    moments = [mu, mu**2 + 1, mu**3 + 3 * mu], [0, 1, 0]
    want = sum(c * (a - b) ** 2 for c, a, b in zip((3, 3, 1), *moments))
    rng = np.random.default_rng(1)
    values = [
        squared_mmd(rng.standard_normal((20, 1)), rng.standard_normal((15, 1)) + mu)
        for _ in range(4000)
    ]
    assert abs(np.mean(values) - want) < 3.5 * np.std(values) / np.sqrt(4000)


def test_subsets_are_disjoint_and_their_mean_and_error_plain():
    """Sample i is the number i, so the estimates tell which samples took part."""
    x = np.arange(10.0)[:, None]
    result = kernel_distance(x, x + 100, subset_size=2, seed=3)
    rng = np.random.default_rng(3)
    rows, columns = (rng.permutation(10).reshape(5, 2) for _ in range(2))
    values = [brute_force(x[i], x[j] + 100) for i, j in zip(rows, columns)]
    assert result.value == pytest.approx(np.mean(values), rel=1e-12)
    assert result.se == pytest.approx(np.std(values, ddof=1) / np.sqrt(5), rel=1e-9)
    assert (result.subsets, result.subset_size) == (5, 2)
    assert kernel_distance(x, x + 100, subset_size=4).subsets == 2


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    runs = 600
    covered = 0
    for i in range(runs):
        x, y = rng.standard_normal((2, 120, 2))
        low, high = kernel_distance(x, y, subset_size=15, seed=i).interval(0.9)
        covered += low < 0 < high
    error = np.sqrt(0.9 * 0.1 / runs)
    assert abs(covered / runs - 0.9) < 4 * error


def test_interval_is_students():
    """t of 4 degrees of freedom at 97.5 %: 2.776."""
    low, high = KernelDistance(1.0, 0.5, subsets=5, subset_size=9).interval()
    assert (low, high) == (pytest.approx(1 - 1.388, abs=1e-3), pytest.approx(2.388, abs=1e-3))


def test_bad_input():
    x = np.ones((10, 3))
    with pytest.raises(ValueError, match=r"\(10, 3\) and \(10, 2\)"):
        squared_mmd(x, x[:, :2])
    with pytest.raises(ValueError, match="m, n >= 2"):
        squared_mmd(x, x[:1])
    with pytest.raises(ValueError, match="finite"):
        squared_mmd(x, np.full((2, 3), np.inf))
    with pytest.raises(ValueError, match="subset_size 6 makes 1 of 10 and 10.*2 to 5"):
        kernel_distance(x, x, subset_size=6)
    with pytest.raises(ValueError, match="at least 4 samples of each are needed, got 3 and 9"):
        kernel_distance(np.zeros((3, 2)), np.zeros((9, 2)), subset_size=2)
    with pytest.raises(ValueError, match="at least 2 subsets"):
        kernel_distance(x, x, subset_size=1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        KernelDistance(0.0, 1.0, 5, 9).interval(95)
