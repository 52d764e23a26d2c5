"""What may be fed to a U-Net: all checks, before anything is traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.networks.checks import check_divisible
from ddim_jax.networks.config import Params, UNetConfig


def check_params(params: Params, abstract: Params) -> None:
    """Raises ValueError, naming the first leaf whose shape is not this network's."""

    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}

    got, want = shapes(params), shapes(abstract)
    if got != want:
        name = min(name for name in got | want if got.get(name) != want.get(name))
        raise ValueError(
            f"params are not this network's: at {name} it has {want.get(name, 'nothing')}, got "
            f"{got.get(name, 'nothing')}; build the network with the config the params were made by"
        )


def check_inputs(config: UNetConfig, x: Any, t: Any, labels: Any) -> tuple[Any, Any, Any]:
    """x, t and labels as arrays, "no label" filled in; ValueError or TypeError where unfit."""
    x = jnp.asarray(x)
    if x.ndim != 4 or x.shape[-1] != config.in_channels:
        raise ValueError(f"x must be (batch, height, width, {config.in_channels}), got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, in the scale of x_t, got {x.dtype}: convert it first")
    check_divisible("height of x", x.shape[1], config)
    check_divisible("width of x", x.shape[2], config)
    t = _check_numbers(
        *("t", t, x.shape[0], 1, None, "the paper's 1..T; 1 is subtracted in apply_fn"), real=True
    )
    if config.num_classes is None:
        if labels is not None:
            raise ValueError("labels given to an unconditional network: set config.num_classes")
    elif labels is None:
        labels = jnp.full(x.shape[:1], config.num_classes)
    else:
        meaning = f"0..{config.num_classes}, {config.num_classes} for no label"
        labels = _check_numbers("labels", labels, x.shape[0], 0, config.num_classes, meaning)
    return x, t, labels


def _check_numbers(
    name: str,
    a: Any,
    batch: int,
    low: int,
    high: int | None,
    meaning: str,
    *,
    real: bool = False,
) -> jax.Array:
    a = a if isinstance(a, jax.Array) else np.asarray(a)  # JAX would wrap around what is too large
    if a.shape != (batch,):
        raise ValueError(
            f"{name} must have shape ({batch},), one per image, got {a.shape}: "
            f"use jnp.full({batch}, value) for one value"
        )
    kinds = (jnp.integer, jnp.floating) if real else (jnp.integer,)
    if not any(jnp.issubdtype(a.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must be integer ({meaning}), got {a.dtype}")
    if not isinstance(a, jax.core.Tracer):
        top = np.iinfo(np.int32).max if high is None else high
        if bad := [v.item() for v in np.asarray(a) if not low <= v <= top]:
            raise ValueError(f"{name} must be in {meaning}; got {bad[0]}")
    return jnp.asarray(a)
