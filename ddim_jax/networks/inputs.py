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
    meaning = "the paper's 1..T; 1 is subtracted in apply_fn"
    if config.time_table is not None:
        meaning = f"1..{config.time_table}, the rows of its table"
    real = config.time_table is None
    t = _check_numbers("t", t, x.shape[0], 1, config.time_table, meaning, real=real)
    return x, t, _check_labels(config, labels, x.shape[0])


def _check_labels(config: UNetConfig, labels: Any, batch: int) -> Any:
    classes, kind = config.num_classes, config.class_embedding
    if not config.labelled:
        if labels is not None:
            raise ValueError("labels given to an unconditional network: set config.num_classes")
        return None
    if labels is None:
        if classes is not None and config.null_label:
            return jnp.full(batch, classes)
        what = {
            "table": f"(B,) in 0..{(classes or 0) - 1}, as its table has no row for 'no label'",
            "timestep": "(B,) numbers >= 0, embedded as time is",
            "identity": f"(B, {config.embedding_width}) embeddings",
        }
        raise ValueError(f"this network does not work without labels: give {what[kind]}")
    if kind == "identity":
        shape = jnp.shape(labels)
        if shape != (batch, config.embedding_width):
            wanted = f"({batch}, {config.embedding_width})"
            raise ValueError(f"labels must be embeddings {wanted}, got {shape}")
        return jnp.asarray(labels)
    if kind == "timestep":
        top = None if config.time_table is None else config.time_table - 1
        meaning = "numbers >= 0, embedded as time is" if top is None else f"0..{top}"
        return _check_numbers("labels", labels, batch, 0, top, meaning, real=top is None)
    assert classes is not None
    if config.null_label:
        meaning = f"0..{classes}, {classes} for no label"
        return _check_numbers("labels", labels, batch, 0, classes, meaning)
    meaning = f"0..{classes - 1}, of which none means no label"
    return _check_numbers("labels", labels, batch, 0, classes - 1, meaning)


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
