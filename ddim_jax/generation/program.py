"""What `jax.export` is given: a sampler as one function of arrays, and what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, image_keys, is_concrete
from ddim_jax.sampling import Plan, initial_noise
from ddim_jax.sampling.plan import run
from ddim_jax.weights import Model
from ddim_jax.weights.model import network_of


def program_of(
    network: Model, plan: Plan, shape: tuple[int, ...], names: list[str]
) -> Callable[..., Array]:
    """(arrays by name, *inputs) → x_0."""
    tree = jax.tree.structure(network.params)
    order = list(named(network.params))
    dtypes = {name: jnp.asarray(leaf).dtype for name, leaf in named(network.params).items()}

    def program(arrays: dict[str, Any], *values: Array) -> Array:
        # Behind the barrier XLA does not spend its time on folding constants of megabytes.
        held = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, arrays))
        params = jax.tree.unflatten(tree, [held[name].astype(dtypes[name]) for name in order])
        given = dict(zip(names, values, strict=True))
        labels, scale = given.get("labels"), given.get("scale")
        params = network.computed(params)
        denoise = partial(network.apply_fn, params, labels=labels, guidance=scale)
        if "seed" in given:
            key, noise_key = jax.random.split(jax.random.key(given["seed"]))
            numbers = given["numbers"]
            x_T = initial_noise(key, numbers, shape)
        else:
            x_T, noise_key = given["x_T"], given.get("key")
            numbers = jnp.arange(x_T.shape[0], dtype=jnp.uint32)
        noisy = plan.steps.sigma is not None
        return run(denoise, x_T, plan, image_keys(noise_key, numbers) if noisy else None)[0]

    return program


def inputs_of(
    plan: Plan, shape: tuple[int, ...], start: str, classes: int | None, guidance: bool
) -> list[dict[str, Any]]:
    """What the program takes besides weights; b is the batch."""
    if start == "seed":
        inputs: list[Any] = [("seed", [], "uint32"), ("numbers", ["b"], "uint32")]
    else:
        inputs = [("x_T", ["b", *shape], "float32")]
        inputs += [("key", [2], "uint32")] if plan.steps.sigma is not None else []
    if classes is not None:
        inputs += [("labels", ["b"], "int32")]
        inputs += [("scale", [], "float32")] if guidance else []
    return [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in inputs]


def as_input(wanted: dict[str, Any], value: Any) -> Any:
    """An input in the dtype that the program takes: a seed may be 3, numbers a range of int64."""
    name, dtype = wanted["name"], np.dtype(wanted["dtype"])
    given = getattr(value, "dtype", None)
    if given == dtype or not is_concrete(value):
        return value
    if name == "key" and given is not None and jax.dtypes.issubdtype(given, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    array = np.asarray(value)
    cast = array.astype(dtype)
    if dtype.kind != "f" and not (np.issubdtype(array.dtype, np.integer) and (cast == array).all()):
        raise ValueError(f"{name} must be {dtype}, got {array.dtype}: {value}")
    return cast


def in_dtype(model: Model, dtype: str) -> Model:
    """The model whose network computes in `dtype`, where that is bfloat16."""
    if dtype != "bfloat16":
        return model
    if model.config is None:
        raise ValueError('dtype="bfloat16" is for our U-Net: this model has no config')
    config = dataclasses.replace(model.config, dtype=dtype)
    apply_fn = network_of(config, model.prediction, model.schedule)
    return model._replace(config=config, apply_fn=apply_fn)


def named(params: Any) -> dict[str, Any]:
    """Leaves by their path, "down/0/conv/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path) or "weight": leaf for path, leaf in leaves}


def rounded(name: str, leaf: Any, dtype: str) -> np.ndarray:
    """The leaf as it is stored."""
    array = np.asarray(jnp.asarray(leaf))
    if array.dtype != np.float32 or dtype == "float32":
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(jnp.dtype(dtype))
    if np.isfinite(array).all() and not np.isfinite(rounded.astype(np.float32)).all():
        raise ValueError(f"params/{name} holds values that {dtype} cannot; use dtype='float32'")
    return rounded


def image_shape_of(model: Model, image_shape: Sequence[int] | None) -> tuple[int, ...]:
    """(H, W, C), which a model without a config must be told."""
    if model.config is None and image_shape is None:
        raise ValueError(
            "a model without a config does not know the shape of its images: pass "
            "image_shape=(H, W, C)"
        )
    if model.config is None and image_shape is not None:
        if not all(isinstance(side, int | np.integer) and side > 0 for side in image_shape):
            raise ValueError(f"image_shape must be whole numbers above 0, got {image_shape}")
        return tuple(map(int, image_shape))
    if image_shape is not None and tuple(image_shape) != model.image_shape:
        raise ValueError(f"the model has images {model.image_shape}, got image_shape {image_shape}")
    return model.image_shape
