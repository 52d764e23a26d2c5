"""What both classifiers are made of: convolutions with their batch normalisation folded in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

State: TypeAlias = Mapping[str, np.ndarray]  # a PyTorch state dict
Layer: TypeAlias = tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]  # HWIO kernel, (1,1,1,O)
Params: TypeAlias = dict[str, Layer]


def conv(layer: Layer, x: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """An NHWC convolution with bias, in full float32 precision on every device.

    "SAME" pads half an odd kernel on every side (PyTorch's padding = k // 2), "VALID" nothing.
    """
    kernel, bias = layer
    half = [(k // 2, k // 2) for k in kernel.shape[:2]]
    y = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(kernel),
        (stride, stride),
        half if padding == "SAME" else "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return y + jnp.asarray(bias)


def fold_batch_norm(state: State, conv: str, norm: str, eps: float) -> Layer:
    """w γ/√(v + ε) and β − m γ/√(v + ε): a bias-free convolution and its inference-time norm."""
    vectors = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, variance = (state[f"{norm}.{v}"].astype(np.float64) for v in vectors)
    scale = gamma / np.sqrt(variance + eps)
    kernel = (state[f"{conv}.weight"] * scale[:, None, None, None]).transpose(2, 3, 1, 0)
    bias = (beta - mean * scale)[None, None, None]
    return kernel.astype(np.float32), bias.astype(np.float32)


def conv_norm_shapes(
    conv: str, norm: str, shape: tuple[int, int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays that `fold_batch_norm` takes; `shape` is OIHW."""
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{conv}.weight": shape, **{f"{norm}.{v}": shape[:1] for v in vectors}}


def checked_state(
    path: str | os.PathLike[str], state: State, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The arrays of `state` in float32 and in the order of `expected`.

    Batch counters of PyTorch's norms ("num_batches_tracked") are dropped.

    Raises:
      ValueError: an array is missing, unknown, misshapen or not finite; they are named.
    """
    state = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
    wrong = [f"missing {name}" for name in expected if name not in state]
    wrong += [f"unknown {name}" for name in state if name not in expected]
    for name, shape in expected.items():
        if name in state and np.shape(state[name]) != shape:
            wrong.append(f"{name} has shape {np.shape(state[name])}, wanted {shape}")
        elif name in state and not np.isfinite(state[name]).all():
            wrong.append(f"{name} is not finite")
    if wrong:
        rest = f", and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(f"{path} holds another network: {', '.join(wrong[:6])}{rest}")
    return {name: np.asarray(state[name], np.float32) for name in expected}
