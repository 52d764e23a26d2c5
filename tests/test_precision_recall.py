"""k-nearest-neighbour manifolds against brute force and cases known beforehand."""

import numpy as np
import pytest

from ddim_jax.evaluation import precision_recall


def brute_force(real, generated, k):
    """Kynkäänniemi et al., Eq. 1-2, one pair at a time."""

    def coverage(points, centres):
        def radius(i):
            others = [np.linalg.norm(centres[i] - c) for j, c in enumerate(centres) if j != i]
            return sorted(others)[k - 1]

        radii = [radius(i) for i in range(len(centres))]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points]
        return sum(inside) / len(points)

    return coverage(generated, real), coverage(real, generated)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "dim", "shift"), [(40, 30, 2, 0.7), (25, 45, 6, 0.3)])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_against_brute_force(k, n, m, dim, shift, chunk):
    rng = np.random.default_rng(n + k)
    real, generated = rng.standard_normal((n, dim)), rng.standard_normal((m, dim)) * 0.6 + shift
    want = brute_force(real, generated, k)
    assert precision_recall(real, generated, neighbours=k, chunk=chunk) == pytest.approx(want)
    assert 0 < want[1] < want[0] < 1 or want[0] == 1


def test_far_from_the_origin_nothing_is_lost():
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((60, 3)), rng.standard_normal((50, 3)) + 0.5
    want = brute_force(real, generated, 3)
    assert precision_recall(real + 1e8, generated + 1e8) == pytest.approx(want)


def test_known_cases():
    rng = np.random.default_rng(1)
    two = np.concatenate([rng.standard_normal((50, 2)), rng.standard_normal((50, 2)) + 100])
    assert precision_recall(two, two) == (1, 1)
    assert precision_recall(two, two + 1000) == (0, 0)
    one_mode = precision_recall(two, two[:50] * 0.5)  # half the modes, and inside
    assert one_mode.precision > 0.9
    assert one_mode.recall < 0.5
    everywhere = precision_recall(two, rng.uniform(-50, 150, (100, 2)))
    assert everywhere.precision < 0.1


def test_copies_lie_within_balls_of_no_radius():
    """The 5 copies of a point are its neighbours; rounding must not part them."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        points = 10 * rng.standard_normal((rng.integers(5, 40), rng.integers(3, 90)))
        copies = np.tile(points, (5, 1))
        chunk = int(rng.integers(3, 50))
        assert precision_recall(copies, rng.permutation(copies), chunk=chunk) == (1, 1)
        assert precision_recall(copies, copies + 1e-3, chunk=chunk) == (0, 0)


def test_bad_input():
    x = np.zeros((5, 2))
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5, 3\)"):
        precision_recall(x, np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"1\.\.3"):
        precision_recall(x, x[:4], neighbours=4)
    with pytest.raises(ValueError, match="finite"):
        precision_recall(x, np.full((5, 2), np.nan))
