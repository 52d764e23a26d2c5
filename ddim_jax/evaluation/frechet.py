"""The Fréchet distance between two sets of feature vectors, in streaming float64.

With Inception features it is called FID; with any other it must be called after them.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ddim_jax.evaluation._npz import load_npz, save_npz
from ddim_jax.storage.files import differences

KIND = "moments"
Shard = TypeVar("Shard")


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
        _check_dimensions(self, other)
        size = self.size + other.size
        delta = other.mean - self.mean
        cross = np.outer(delta, delta) * (self.size * other.size / size)
        mean = self.mean + delta * (other.size / size)
        return Moments(size, mean, self.scatter + other.scatter + cross)

    def remove(self, part: Moments) -> Moments:
        """The moments of what is left without `part`, which was merged in: `merge` undone."""
        _check_dimensions(self, part)
        if part.size >= self.size:
            raise ValueError(f"cannot remove {part.size} samples from {self.size}")
        size = self.size - part.size
        mean = self.mean - (part.mean - self.mean) * (part.size / size)
        delta = part.mean - mean
        cross = np.outer(delta, delta) * (size * part.size / self.size)
        return Moments(size, mean, self.scatter - part.scatter - cross)


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


def save_moments(
    path: str | os.PathLike[str],
    moments: Moments,
    facts: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes moments to an `.npz` file that holds no pickle; it appears whole or not at all.

    Several processes save a file each; whoever loads them all merges them.

    Args:
      path: the file; its directory must exist.
      moments: what to write.
      facts: JSON-able: where they come from.
      overwrite: replace an existing file.

    Raises:
      FileExistsError: the file exists and `overwrite` is False.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/a.npz"
      >>> save_moments(path, moments(np.eye(2)), {"process": 0})
      >>> loaded, facts = load_moments(path)
      >>> loaded.size, loaded.mean.tolist(), facts
      (2, [0.5, 0.5], {'process': 0})
    """
    header = {"size": int(moments.size), "facts": dict(facts or {})}
    arrays = {"mean": moments.mean, "scatter": moments.scatter}
    save_npz(path, KIND, header, arrays, overwrite=overwrite)


def load_moments(path: str | os.PathLike[str]) -> tuple[Moments, dict[str, Any]]:
    """Reads what `save_moments` wrote: (moments, facts).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, holds something else, or is of a newer format.
    """
    header, arrays = load_npz(path, KIND)
    return unpack(path, header, arrays), header["facts"]


def unpack(
    path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Moments:
    """The checked moments among the contents of the file `path`.

    Raises:
      ValueError: an array or the size is missing, of the wrong shape or dtype, or not finite.
    """
    try:
        size, mean, scatter = header["size"], arrays["mean"], arrays["scatter"]
    except KeyError as error:
        raise ValueError(f"{path} lacks the entry {error} of saved moments") from error
    if not (
        isinstance(size, int)
        and size >= 1
        and mean.ndim == 1
        and scatter.shape == 2 * mean.shape
        and mean.dtype == scatter.dtype == np.float64
        and np.isfinite(mean).all()
        and np.isfinite(scatter).all()
    ):
        raise ValueError(
            f"{path} holds no valid moments: size {size!r}, mean {mean.dtype} {mean.shape}, "
            f"scatter {scatter.dtype} {scatter.shape}; wanted finite float64 (d,) and (d, d)"
        )
    return Moments(size, mean, scatter)


def resumable_moments(
    shards: Sequence[Shard],
    features: Callable[[Shard], np.ndarray],
    path: str | os.PathLike[str],
    facts: Mapping[str, Any] | None = None,
) -> Moments:
    """The moments of `features(shard)` over all shards; killed and called again, it continues.

    After every shard the moments so far are saved; the result is the same to the last bit as
    without an interruption.

    Args:
      shards: anything, in a fixed order: file names, ranges of indices, arrays.
      features: shard → (n, ...) features; not called for shards already done.
      path: the `.npz` file of the moments so far, and of all in the end.
      facts: JSON-able; what tells these shards and features from others.

    Returns:
      `Moments` of all shards.

    Raises:
      ValueError: there are no shards, or the file belongs to other facts or shards.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/moments.npz"
      >>> resumable_moments([0, 1, 2], lambda i: np.eye(4)[i : i + 2], path).size
      6
    """
    if not shards:
        raise ValueError("there are no shards to take the moments of")
    wanted = {**(facts or {}), "shards": len(shards)}
    total: Moments | None = None
    done = 0
    if pathlib.Path(path).exists():
        total, found = load_moments(path)
        done = found.pop("done", 0)
        if differ := differences(found, wanted):
            raise ValueError("\n".join([f"{path} belongs to another computation:", *differ]))
    for i in range(done, len(shards)):
        part = moments(features(shards[i]))
        total = part if total is None else total.merge(part)
        save_moments(path, total, {**wanted, "done": i + 1}, overwrite=True)
    assert total is not None
    return total


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
    _check_dimensions(a, b)
    if min(a.size, b.size) < 2:
        raise ValueError(f"each set needs at least 2 samples, got {a.size} and {b.size}")
    return _distance(a, _root(a.covariance), b)


def frechet_jackknife(
    features: np.ndarray,
    reference: Moments,
    blocks: int = 20,
    tick: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """The Fréchet distance of features to a fixed reference, and its standard error.

    Delete-a-group jackknife: with F_b the distance when the b-th of `blocks` groups is left out,
    and F̄ their mean, se² = (B − 1)/B Σ_b (F_b − F̄)² (Efron & Tibshirani 1993, §11). The groups are
    drawn, always alike, so that samples may come class by class or with their classes in turn.
    It is what independent samples of the same number would scatter by; it knows nothing of the
    bias that few samples bring, nor of the reference's own sampling.

    Args:
      features: (n, d), n ≥ 2B, independent samples.
      reference: moments to compare with.
      blocks: B ≥ 2; the error is itself uncertain by about 1/√(2(B − 1)).
      tick: called after each block.

    Returns:
      (distance, standard error); the distance is `frechet_distance` of all features.

    Raises:
      ValueError: too few features or blocks, or dimensions differ.

    Example:
      >>> x = np.random.default_rng(0).standard_normal((1000, 1))
      >>> standard = Moments(1001, np.zeros(1), 1000 * np.eye(1))
      >>> value, se = frechet_jackknife(x + 3, standard)  # (μ + 3)², so se ≈ 6 / √1000 = 0.19
      >>> round(value, 1), round(se, 1)
      (8.7, 0.2)
    """
    if blocks < 2 or len(features) < 2 * blocks:
        raise ValueError(
            f"the jackknife needs blocks >= 2 and twice as many samples, got {blocks} blocks and "
            f"{len(features)} samples"
        )
    total = moments(features)
    distance = frechet_distance(reference, total)
    root = _root(reference.covariance)
    left_out, order = np.empty(blocks), np.random.default_rng(0).permutation(len(features))
    for b in range(blocks):
        group = features[np.sort(order[b::blocks])]
        left_out[b] = _distance(reference, root, total.remove(moments(group)))
        tick()
    spread = (left_out - left_out.mean()) ** 2
    return distance, float(np.sqrt((blocks - 1) / blocks * spread.sum()))


def _distance(a: Moments, root_a: np.ndarray, b: Moments) -> float:
    eigenvalues = np.linalg.eigvalsh(root_a @ b.covariance @ root_a)
    trace_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance)
    return float(max(distance - 2 * trace_root, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _check_dimensions(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the features differ in dimension: {a.mean.shape[0]}, {b.mean.shape[0]}")
