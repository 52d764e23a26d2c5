"""Our parameters as a PyTorch state dict of Ho et al.'s network, and back.

| ours | the DDIM authors' |
|---|---|
| down/0/block/0/conv1/kernel (3, 3, I, O) | down.0.block.0.conv1.weight (O, I, 3, 3) |
| mid/attn_1/q/kernel (I, O) | mid.attn_1.q.weight (O, I, 1, 1): a 1×1 convolution |
| temb/dense/0/kernel (I, O) | temb.dense.0.weight (O, I) |
| norm_out/scale (C,) | norm_out.weight (C,) |
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.weights.containers import few, leave_out

POINTWISE = ("q", "k", "v", "proj_out", "nin_shortcut")  # 1×1 convolutions in PyTorch
SUFFIX = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


def to_state_dict(params: Params) -> dict[str, np.ndarray]:
    """Parameters under the DDIM authors' names, as PyTorch lays them out.

    Args:
      params: of a `ddim_jax.networks.unet` network.

    Returns:
      A flat dict of NumPy arrays.

    Example:
      >>> params = {"conv_in": {"kernel": np.zeros((3, 3, 1, 32)), "bias": np.zeros(32)}}
      >>> {name: array.shape for name, array in to_state_dict(params).items()}
      {'conv_in.bias': (32,), 'conv_in.weight': (32, 1, 3, 3)}
    """
    state = {}
    for path, name, leaf in _named(params):
        array = np.asarray(leaf)
        array = array.transpose(_axes(path, array.ndim))
        if path[-1] == "kernel" and path[-2] in POINTWISE:
            array = array[..., None, None]
        state[name] = np.ascontiguousarray(array)
    return state


def from_state_dict(
    state: Mapping[str, np.ndarray],
    config: UNetConfig,
    rename: Callable[[str], str] = str,
) -> Params:
    """Parameters from a state dict: `to_state_dict` undone.

    Args:
      state: flat dict of floating arrays. 1×1 convolutions may also be (O, I) or (O, I, 1).
      config: the network.
      rename: from the DDIM authors' names to those of `state`.

    Returns:
      Nested dict of float32 NumPy arrays.

    Raises:
      ValueError: tensors are missing, left over, of another shape, or not finite; by name.

    Example:
      >>> from ddim_jax.networks import unet
      >>> config = UNetConfig(image_size=8, channels=32, multipliers=(1,), attention_resolutions=())
      >>> params = unet.build(config, jax.random.key(0))[1]
      >>> again = from_state_dict(to_state_dict(params), config)
      >>> jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
      True
    """
    if len(config.multipliers) * config.num_blocks > len(state):  # before any list is that long
        raise ValueError(
            f"{len(state)} tensors are too few for {len(config.multipliers)} levels of "
            f"{config.num_blocks} blocks"
        )
    from ddim_jax.networks import unet  # here, as flax takes half a second to import

    return fill(unet.abstract_params(config), state, rename)


def fill(
    abstract: Params, state: Mapping[str, np.ndarray], rename: Callable[[str], str] = str
) -> Params:
    """Parameters of the shapes of `abstract` from a state dict, as `from_state_dict` says."""
    wanted = {rename(name): (path, leaf) for path, name, leaf in _named(abstract)}
    missing = sorted(wanted.keys() - state.keys())
    unused = sorted(state.keys() - wanted.keys())
    misfits: list[str] = []
    broken: list[str] = []
    params: Params = {}
    for name in sorted(wanted.keys() & state.keys()):
        path, leaf = wanted[name]
        axes = _axes(path, len(leaf.shape))  # of PyTorch's layout
        shape, array = tuple(leaf.shape[axis] for axis in axes), state[name]
        if len(shape) == 2 and array.shape == shape + (1,) * (array.ndim - 2):
            array = array.reshape(shape)
        if array.shape != shape:
            misfits.append(f"{name} is {array.shape}, not {shape}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            broken.append(f"{name} ({array.dtype})")
        elif not np.isfinite(array := array.astype(np.float32)).all():
            broken.append(name)
        else:
            _put(params, path, np.ascontiguousarray(array.transpose(np.argsort(axes))))
    problems = {
        "missing": missing,
        "left over": unused,
        "of another shape": misfits,
        "not finite numbers": broken,
    }
    if any(problems.values()):
        lines = [
            f"  {len(names)} {what}: {few(names)}" for what, names in problems.items() if names
        ]
        if unused and not (missing or misfits or broken):
            lines.append(f"  {leave_out(unused)}")
        raise ValueError("\n".join(["the weights are not this network's:", *lines]))
    return params


def infer_config(state: Mapping[str, np.ndarray], image_size: int | tuple[int, int]) -> UNetConfig:
    """The network of a state dict with the DDIM authors' names, from its shapes.

    The shapes tell all but the image size, at which attention resolutions are counted, and dropout,
    which is 0 here.

    Args:
      state: flat dict of arrays.
      image_size: side of the images in pixels, or (H, W).

    Returns:
      `UNetConfig`.

    Raises:
      ValueError: the names are not those of Ho et al.'s network, or a width does not fit it.
    """
    try:
        channels, in_channels = state["conv_in.weight"].shape[:2]
        levels = len(_numbers(r"down\.(\d+)\.", state))
        widths = [state[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"not the names of Ho et al.'s network: no {error}; it has {few(sorted(state))}"
        ) from error
    if not levels or any(not width or width % channels for width in widths):
        raise ValueError(f"the levels' widths {widths} are not multiples of the first, {channels}")
    config = UNetConfig(
        image_size=image_size,
        in_channels=in_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        num_blocks=len(_numbers(r"down\.0\.block\.(\d+)\.", state)),
        attention_resolutions=(),
        dropout=0.0,
    )
    attended = [r for i, r in enumerate(config.resolutions) if f"down.{i}.attn.0.q.weight" in state]
    return dataclasses.replace(config, attention_resolutions=tuple(attended))


def _named(params: Params) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(path, the authors' name, leaf) of every parameter."""
    for entries, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(entry.key for entry in entries)
        name = ".".join(path[:-1]) + SUFFIX[path[-1]] if path[-1] in SUFFIX else ".".join(path)
        yield path, name, leaf


def _axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Our axes in PyTorch's order: kernels have the outputs first there, and last here."""
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return (3, 2, 0, 1) if ndim == 4 else (1, 0)


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _numbers(pattern: str, names: Mapping[str, Any]) -> set[str]:
    return {match[1] for match in (re.match(pattern, name) for name in names) if match}
