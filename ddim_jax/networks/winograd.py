"""Winograd's minimal filtering F(2×2, 3×3): a 3×3 convolution by 4 products a pixel instead of 9.

Lavin & Gray (2016), "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def pays(y: tuple[int, ...], kernel: tuple[int, ...], strides: Sequence[int]) -> bool:
    batch, height, width = y
    return (*kernel[:2], *strides) == (3, 3, 1, 1) and batch * height * width >= 2048 and min(kernel[2:]) >= 64


@partial(jax.jit, static_argnames="padding")  # traced and lowered once a shape
def winograd(
    x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A of Eq. 8, summed over C_in before Aᵀ…A as in Eq. 12."""
    (top, bottom), (left, right) = padding
    batch, c_in, c_out = x.shape[0], *kernel.shape[2:]
    height, width = x.shape[1] + top + bottom - 2, x.shape[2] + left + right - 2
    rows, columns = -(-height // 2), -(-width // 2)  # of tiles
    below, right = 2 * rows + 2 - x.shape[1] - top, 2 * columns + 2 - x.shape[2] - left

    d = jnp.pad(x, ((0, 0), (top, below), (left, right), (0, 0)))
    d = d.reshape(batch, rows + 1, 2, 2 * (columns + 1), c_in)
    d = jnp.stack(_b(d[:, :-1, 0], d[:, :-1, 1], d[:, 1:, 0], d[:, 1:, 1]))
    d = d.reshape(4, batch, rows, columns + 1, 2, c_in)
    d = jnp.stack(_b(d[..., :-1, 0, :], d[..., :-1, 1, :], d[..., 1:, 0, :], d[..., 1:, 1, :]), 1)

    # Products of matrices, of all channels: XLA:CPU has nothing to compile for them.
    g = np.float32(np.kron(G, G)) @ kernel.reshape(9, -1)
    m = jax.lax.batch_matmul(d.reshape(16, -1, c_in), g.reshape(16, c_in, c_out))
    y = np.float32(np.kron(A, A).T) @ m.reshape(16, -1)
    y = y.reshape(2, 2, batch, rows, columns, c_out).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(batch, 2 * rows, 2 * columns, c_out)[:, :height, :width]


def _b(d0: jax.Array, d1: jax.Array, d2: jax.Array, d3: jax.Array) -> list[jax.Array]:
    """Bᵀd of Eq. 7."""
    return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]
