"""The kernel distance: squared maximum mean discrepancy with a cubic kernel.

With Inception features it is called KID; with any other it must be called after them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class KernelDistance(NamedTuple):
    """The mean of independent unbiased estimates, and how well it is known."""

    value: float  # may be negative: it is unbiased, and the truth may be 0
    se: float  # standard error of `value`
    subsets: int
    subset_size: int

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """value ± t·se with Student's t of subsets − 1 degrees of freedom.

        Example:
          >>> KernelDistance(1.0, 0.1, subsets=11, subset_size=50).interval()
          (0.777..., 1.222...)
        """
        from scipy.special import stdtrit

        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
        t = float(stdtrit(self.subsets - 1, (1 + confidence) / 2))
        return self.value - t * self.se, self.value + t * self.se


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of MMD² with k(a, b) = (a·b/d + 1)³ (Bińkowski et al. 2018, Eq. 4).

    Σ_{i≠j} k(x_i, x_j)/(m(m−1)) + Σ_{i≠j} k(y_i, y_j)/(n(n−1)) − 2 Σ_{ij} k(x_i, y_j)/(mn).

    Args:
      x: (m, d), m ≥ 2.
      y: (n, d), n ≥ 2.

    Returns:
      The estimate; negative ones occur where the distributions are close.

    Raises:
      ValueError: shapes that do not fit, or features that are not finite.

    Example:
      >>> import numpy as np
      >>> zeros, ones = np.zeros((2, 1)), np.ones((2, 1))
      >>> squared_mmd(zeros, ones)  # 1 + 2³ − 2·1
      7.0
    """
    x, y = _checked(x, y)
    within = _off_diagonal_mean(_cubic(x, x)) + _off_diagonal_mean(_cubic(y, y))
    return float(within - 2 * _cubic(x, y).mean())


def kernel_distance(
    x: np.ndarray, y: np.ndarray, *, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Mean and standard error of `squared_mmd` over disjoint random subsets.

    The subsets share no sample, so that their estimates are independent and their standard
    deviation over the root of their number is the standard error of the mean. (Overlapping
    subsets, as often published, give the same mean but no standard error.)

    Args:
      x: (m, d) features of one set.
      y: (n, d) features of the other.
      subset_size: samples of each set in a subset; at most min(m, n)/2.
      seed: of the division into subsets.

    Returns:
      `KernelDistance`.

    Raises:
      ValueError: fewer than 2 subsets fit, shapes do not fit, features are not finite.

    Example:
      >>> import numpy as np
      >>> a, b = np.random.default_rng(0).standard_normal((2, 1000, 4))
      >>> same, far = (kernel_distance(a, b + shift, subset_size=100) for shift in (0, 1))
      >>> same.interval()[0] < 0 < same.interval()[1] < far.interval()[0]
      True
    """
    x, y = _checked(x, y)
    if min(len(x), len(y)) < 4:
        raise ValueError(f"at least 4 samples of each are needed, got {len(x)} and {len(y)}")
    subsets = min(len(x), len(y)) // subset_size if subset_size >= 2 else 0
    if subsets < 2:
        raise ValueError(
            f"at least 2 subsets of 2 or more samples are needed; subset_size {subset_size} makes "
            f"{subsets} of {len(x)} and {len(y)} samples: give a size of 2 to "
            f"{min(len(x), len(y)) // 2}"
        )
    rng = np.random.default_rng(seed)
    rows, columns = (
        rng.permutation(len(z))[: subsets * subset_size].reshape(subsets, -1) for z in (x, y)
    )
    values = np.array([squared_mmd(x[i], y[j]) for i, j in zip(rows, columns)])
    se = float(values.std(ddof=1) / np.sqrt(subsets))
    return KernelDistance(float(values.mean()), se, subsets, subset_size)


def _off_diagonal_mean(kernel: np.ndarray) -> float:
    """The mean of k(a, b) over pairs of different samples."""
    return (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x @ y.T / x.shape[1] + 1) ** 3


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"features must be (m, d) and (n, d) with m, n >= 2, got {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features must be finite")
    return x, y
