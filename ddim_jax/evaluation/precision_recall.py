"""Improved precision and recall: how much of each set lies within the other's neighbourhoods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-12  # of |x|² in float64: what tells copies of a point apart


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]."""

    precision: float  # of the generated samples that lie on the real manifold: quality
    recall: float  # of the real samples that lie on the generated manifold: coverage


def precision_recall(
    real: np.ndarray, generated: np.ndarray, *, neighbours: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Precision and recall of k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019, Eq. 1-2).

    A set's manifold is the union of the balls around its points that reach to their k-th nearest
    neighbour in the set; a point on a ball's surface is within. Both figures depend on the sizes
    of the sets: compare only figures of equal sizes.

    Args:
      real: (n, d) features, n > k.
      generated: (m, d) features, m > k.
      neighbours: k ≥ 1.
      chunk: rows of a distance matrix held at a time.

    Returns:
      `PrecisionRecall`.

    Raises:
      ValueError: shapes that do not fit, too few samples, or features that are not finite.

    Example:
      >>> import numpy as np
      >>> real = np.arange(8.0)[:, None]
      >>> precision_recall(real, real[:4] + 0.25, neighbours=1)
      PrecisionRecall(precision=1.0, recall=0.625)
    """
    x, y = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be (n, d) and (m, d), got {x.shape} and {y.shape}")
    if neighbours < 1 or chunk < 1 or min(len(x), len(y)) <= neighbours:
        raise ValueError(
            f"neighbours must be in 1..{min(len(x), len(y)) - 1}, one less than the smaller set, "
            f"and chunk >= 1, got {neighbours} and {chunk}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features must be finite")
    middle = x.mean(axis=0)  # nearer to 0, less is lost in |x|² + |y|² − 2 x·y
    x, y = x - middle, y - middle
    x_radii, y_radii = (_radii(z, neighbours, chunk) for z in (x, y))
    y_within, x_within = np.zeros(len(y), bool), []
    for start, squared in _squared_distances(x, y, chunk):
        x_within.append((squared <= y_radii).any(axis=1))
        y_within |= (squared <= x_radii[start : start + chunk, None]).any(axis=0)
    return PrecisionRecall(float(y_within.mean()), float(np.concatenate(x_within).mean()))


def _radii(x: np.ndarray, neighbours: int, chunk: int) -> np.ndarray:
    """(n,) squared distance of each point to its k-th nearest other one, and a rounding more."""
    radii = []
    for start, squared in _squared_distances(x, x, chunk):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = -np.inf  # the point itself comes first
        radii.append(np.partition(squared, neighbours, axis=1)[:, neighbours])
    return np.concatenate(radii) + ROUNDING * (x**2).sum(axis=1)


def _squared_distances(
    x: np.ndarray, y: np.ndarray, chunk: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (≤ chunk, m) squared distances, to rounding) for all rows of x."""
    x_squared, y_squared = (x**2).sum(axis=1), (y**2).sum(axis=1)
    for start in range(0, len(x), chunk):
        squared = x[start : start + chunk] @ (-2 * y.T)
        squared += x_squared[start : start + chunk, None]
        squared += y_squared
        yield start, squared
