"""The Fréchet distance between two sets of feature vectors, in streaming float64.

With Inception features it is called FID; with any other it must be called after them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Number, mean and summed outer products of features; batches and processes are `merge`d."""

    size: int
    mean: np.ndarray  # (d,) float64
    scatter: np.ndarray  # (d, d) float64, Σ (x − mean)(x − mean)ᵀ

    @property
    def covariance(self) -> np.ndarray:
        """(d, d) unbiased covariance."""
        return self.scatter / (self.size - 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub & LeVeque 1983)."""
        size = self.size + other.size
        delta = other.mean - self.mean
        cross = np.outer(delta, delta) * (self.size * other.size / size)
        mean = self.mean + delta * (other.size / size)
        return Moments(size, mean, self.scatter + other.scatter + cross)


def moments(features: np.ndarray) -> Moments:
    """The moments of one batch of features.

    Args:
      features: (n, ...) any numeric dtype; everything after the first axis is flattened.

    Returns:
      `Moments` in float64.

    Raises:
      ValueError: there are no features, or one is not finite.

    Example:
      >>> import numpy as np
      >>> a, b = moments(np.eye(3)), moments(np.ones((2, 3)))
      >>> whole = moments(np.concatenate([np.eye(3), np.ones((2, 3))]))
      >>> bool(np.allclose(a.merge(b).covariance, whole.covariance))
      True
    """
    x = np.asarray(features, np.float64)
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"features must be (n, ...) with n >= 1, got shape {x.shape}")
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        raise ValueError(f"features must be finite; {len(bad)} rows are not, the first is {bad[0]}")
    x = x.reshape(len(x), -1)
    mean = x.mean(axis=0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^½) (Dowson & Landau 1982; Heusel et al. 2017).

    The trace of the root is Σ √eig(C_a^½ C_b C_a^½): symmetric, so nothing complex arises and
    singular covariances need no ε.

    Args:
      a: moments of one set, at least 2 samples.
      b: moments of the other, of the same dimension.

    Returns:
      The distance, ≥ 0, in squared units of the features.

    Raises:
      ValueError: dimensions differ, or a set has fewer than 2 samples.

    Example:
      >>> import numpy as np
      >>> x = np.random.default_rng(0).standard_normal((100, 2))
      >>> round(frechet_distance(moments(x), moments(x + [3.0, 4.0])), 6)
      25.0
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the features differ in dimension: {a.mean.shape[0]}, {b.mean.shape[0]}")
    if min(a.size, b.size) < 2:
        raise ValueError(f"each set needs at least 2 samples, got {a.size} and {b.size}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance)
    return float(max(distance - 2 * trace_root, 0.0))
