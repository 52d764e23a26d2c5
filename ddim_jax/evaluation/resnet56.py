"""The ResNet-56 for CIFAR-10 (He et al. 2016, §4.2) as a feature extractor, in plain JAX.

Three stages of nine blocks with 16, 32 and 64 channels; shortcuts of option A, which drop every
other pixel and pad with zero channels. The known weights are those of akamaster's
pytorch_resnet_cifar10; they score 93.39 % on the test split. They ship, under their own licence
(BSD, beside them), as float32: what they give is to the bit what their file gives.
"""

from __future__ import annotations

import hashlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.evaluation._layers import (
    Params,
    State,
    checked_state,
    conv,
    conv_norm_shapes,
    fold_batch_norm,
)
from ddim_jax.evaluation._npz import read_arrays

SHIPPED = pathlib.Path(__file__).parent / "cifar10" / "resnet56.npz"
DIM = 64
SHA256 = "e93d77851d6b5e074439f05d5a65080be89a962247ab19505d33a4ad32efdd25"  # of `state_digest`
PREPROCESSING = "(v / 255 - mean) / std with ImageNet's mean and std, 32x32"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-5
BLOCKS = [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(9)]


def pooled(params: Params, images: jax.Array) -> jax.Array:
    """The network up to its pooling.

    Args:
      params: from `fold`.
      images: uint8 (n, 32, 32, 3).

    Returns:
      float32 (n, 64), the mean over pixels of the last stage.

    Raises:
      ValueError: images of another shape.
    """
    if images.shape[1:] != (32, 32, 3):
        raise ValueError(f"ResNet-56 takes images of (32, 32, 3), got {images.shape[1:]}")
    x = images.astype(jnp.float32) / 255
    x = (x - np.array([[[MEAN]]], np.float32)) / np.array([[[STD]]], np.float32)
    x = jax.nn.relu(conv(params["conv1"], x))
    for block in BLOCKS:
        stride = 2 if block in ("layer2.0", "layer3.0") else 1
        y = jax.nn.relu(conv(params[f"{block}.conv1"], x, stride))
        y = conv(params[f"{block}.conv2"], y)
        x = jax.nn.relu(y + _shortcut(x, y.shape[-1]))
    return x.mean((1, 2))


def logits(params: Params, features: jax.Array) -> jax.Array:
    """The scores of the ten classes: (n, 64) of `pooled` → (n, 10)."""
    kernel, bias = params["linear"]
    return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias


def _shortcut(x: jax.Array, channels: int) -> jax.Array:
    """Option A: the identity, or every other pixel with zero channels on both sides."""
    if x.shape[-1] == channels:
        return x
    pad = (channels - x.shape[-1]) // 2
    return jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (pad, pad)))


def fold(state: State) -> Params:
    """Parameters for `pooled` and `logits` from PyTorch's arrays."""
    params = {"conv1": fold_batch_norm(state, "conv1", "bn1", EPS)}
    for block in BLOCKS:
        for i in (1, 2):
            name = f"{block}.conv{i}"
            params[name] = fold_batch_norm(state, name, f"{block}.bn{i}", EPS)
    return params | {"linear": (state["linear.weight"].T, state["linear.bias"][None])}


def load_state(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The weights in an `.npz` file, by their PyTorch names.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or holds another network; what is wrong is named.
    """
    return checked_state(path, read_arrays(path, "ResNet-56 weights"), shapes())


def state_digest(state: State) -> str:
    """SHA-256 over names, shapes and float32 values: the same whatever file holds them."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{state[name].shape}".encode())
        digest.update(np.ascontiguousarray(state[name], "<f4").tobytes())
    return digest.hexdigest()


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all arrays of the network."""
    arrays = conv_norm_shapes("conv1", "bn1", (16, 3, 3, 3))
    channels = 16
    for block in BLOCKS:
        out = {"1": 16, "2": 32, "3": 64}[block[5]]
        for i, width in ((1, channels), (2, out)):
            arrays |= conv_norm_shapes(f"{block}.conv{i}", f"{block}.bn{i}", (out, width, 3, 3))
        channels = out
    return arrays | {"linear.weight": (10, 64), "linear.bias": (10,)}
