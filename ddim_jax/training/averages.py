"""Averages chosen after training (Karras et al. 2024, arXiv:2312.02696, §3.1, §3.2, appendix C).

θ̄_γ(n) = Σ_i p_i θ_i with p ∝ i^γ, kept for two γ and stored now and then; any other γ is then a
weighted sum of what was stored. γ is given by σ_rel, the width of the profile relative to n.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array
from ddim_jax.storage.weights_file import load_weights, save_weights
from ddim_jax.training.step import Params
from ddim_jax.weights import Model, load_model

FOLDER = "averages"
SIGMA_RELS = (0.05, 0.10)  # those kept, which the authors chose
MOST_ERROR = 0.1  # of a profile that may be called that average
NAMES = [f"{sigma:g}" for sigma in SIGMA_RELS]


def exponent(sigma_rel: float) -> float:
    """γ ≥ 0 of a relative width: σ_rel² = (γ + 1)/((γ + 2)² (γ + 3)).

    Args:
      sigma_rel: in (0, 0.28]; 0.10 remembers about the last third, 0.05 the last sixth.

    Returns:
      γ; its profile has mean (γ + 1)/(γ + 2) and this standard deviation.

    Raises:
      ValueError: out of range.

    Example:
      >>> round(exponent(0.10), 2), round(exponent(0.05), 2)
      (6.94, 16.97)
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"sigma_rel must be in (0, 0.28], got {sigma_rel:g}")
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(max(roots.real[abs(roots.imag) < 1e-9]))


def weights_of(sigma_rel: float, step: int, steps: np.ndarray) -> tuple[np.ndarray, float]:
    """How the stored averages add up to another, by least squares on their profiles: A x = b.

    ⟨p_a, p_b⟩ = (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · n_a^γ_b / n_b^(γ_b + 1) for n_a ≤ n_b.

    Args:
      sigma_rel: of the average wanted.
      step: at which it is wanted, n.
      steps: (K,) at which the averages of `SIGMA_RELS` were stored, all ≤ n.

    Returns:
      (K, 2) float64, and ‖Σ x_k p_k − p‖/‖p‖ that is left: 0 for an average that was stored.

    Example:
      >>> weights, error = weights_of(0.10, 8, np.array([4, 8]))
      >>> weights.round(6) + 0.0, round(error, 4)
      (array([[0., 0.],
             [0., 1.]]), 0.0)
    """
    n = np.repeat(np.asarray(steps, np.float64), len(SIGMA_RELS)) / step
    g = np.tile([exponent(sigma) for sigma in SIGMA_RELS], len(steps))

    def inner(n_a: Any, g_a: Any, n_b: Any, g_b: Any) -> np.ndarray:
        first = n_a <= n_b
        low, high = np.minimum(n_a, n_b), np.maximum(n_a, n_b)
        later = np.where(first, g_b, g_a)  # the exponent of the one that ends later
        return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * (low / high) ** later / high

    products = inner(n[:, None], g[:, None], n, g)
    own, gamma = (exponent(sigma_rel) + 1) ** 2, exponent(sigma_rel)
    wanted, norm = inner(n, g, 1.0, gamma), own / (2 * gamma + 1)
    # Of many near neighbours there are many sums; rcond takes one of small weights.
    x = np.linalg.lstsq(products, wanted, rcond=1e-9)[0]
    left = max(1 - (2 * wanted - products @ x) @ x / norm, 0.0)
    return x.reshape(-1, len(SIGMA_RELS)), float(np.sqrt(left))


def begin(directory: pathlib.Path, params: Params, start: int) -> list[Params]:
    """The two averages of a run at its step `start`, as they were stored; zeros of a new run."""
    if not start:
        return [jax.tree.map(jnp.zeros_like, params) for _ in SIGMA_RELS]
    stored, _ = load_weights(directory / FOLDER / f"{start:08d}.safetensors")
    return [jax.tree.map(lambda p, leaf: jax.device_put(leaf, p.sharding), params, stored[name])
            for name in NAMES]  # fmt: skip


def follow(kept: list[Params], params: Params, step: Array) -> list[Params]:
    """θ̄ ← θ̄ + (1 − (1 − 1/n)^(γ + 1)) (θ − θ̄) after step n, for each γ kept."""
    last = jnp.log1p(-1 / step.astype(jnp.float32))  # −inf at the first step, which is all of it
    new = [-jnp.expm1((exponent(sigma) + 1) * last) for sigma in SIGMA_RELS]
    return [jax.tree.map(lambda a, p, w=w: a + w * (p - a), tree, params)
            for tree, w in zip(kept, new)]  # fmt: skip


def leave(kept: Any, params: Params, step: Array) -> Any:
    """`follow` of a run that keeps no averages."""
    return kept


def store(directory: pathlib.Path, kept: list[Params], step: int) -> None:
    """Stores them as averages/STEP.safetensors: twice the size of the parameters."""
    (directory / FOLDER).mkdir(exist_ok=True)
    tree = dict(zip(NAMES, jax.device_get(kept)))
    save_weights(directory / FOLDER / f"{step:08d}.safetensors", tree, {}, overwrite=True)


def average(run: str | os.PathLike[str], sigma_rel: float, step: int | None = None) -> Model:
    """The model of a run with the power-function average of another width.

    Args:
      run: the folder of a run trained with `TrainConfig(post_hoc=True)`.
      sigma_rel: in (0, 0.28]; those kept, 0.05 and 0.10, are exact, those between nearly so.
      step: at which; by default the last stored.

    Returns:
      A `Model`.

    Raises:
      ValueError: sigma_rel is out of range, nothing (of this step) is stored, or too little for
        this width.
    """
    exponent(sigma_rel)
    files = {int(path.stem): path for path in sorted((pathlib.Path(run) / FOLDER).glob("*.saf*"))}
    if not pathlib.Path(run).is_dir():
        raise ValueError(f"{run} is no folder of a run")
    if not files:
        raise ValueError(f"{run} holds no averages: train with --train.post-hoc (post_hoc=True)")
    if step is not None and step not in files:
        raise ValueError(
            f"{run} holds no averages of step {step}; it has {', '.join(map(str, files))}"
        )
    step = max(files) if step is None else step
    steps = np.array([at for at in files if at <= step])
    table, error = weights_of(sigma_rel, step, steps)
    if error > MOST_ERROR:
        raise ValueError(
            f"of the averages of {len(steps)} steps one of sigma_rel = {sigma_rel:g} is not made: "
            f"its profile would be {error:.0%} off. Go nearer to {' or '.join(NAMES)}; more "
            "checkpoints store more"
        )
    total: Any = None
    for at, weights in zip(steps, table):
        stored, _ = load_weights(files[at])
        for weight, tree in zip(weights, map(stored.get, NAMES)):
            part = jax.tree.map(lambda leaf, w=weight: w * leaf.astype(np.float64), tree)
            total = part if total is None else jax.tree.map(np.add, total, part)
    model = load_model(run)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), total)
    facts = {
        **model.facts,
        "average": {"sigma_rel": sigma_rel, "step": step, "profile_error": error},
    }
    return model._replace(params=params, facts=facts)
