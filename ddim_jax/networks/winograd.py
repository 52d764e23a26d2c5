"""Winograd's minimal filtering F(2×2, 3×3): a 3×3 convolution by 4 products a pixel instead of 9.

Lavin & Gray (2016), "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308. Being a
primitive, `conv3` is lowered on a CPU alone as such: every other platform gets XLA's convolution, to
the letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Padding = tuple[tuple[int, int], tuple[int, int]]

A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
PIXELS = 2048  # transformed at once: those of more leave the cache
PRODUCTS = 2**26  # of the plain convolution: fewer are not worth what there is to compile


def pays(
    y: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Sequence[Any]
) -> bool:
    batch, height, width = y
    is_3x3 = (*kernel[:2], *strides) == (3, 3, 1, 1) and 0 <= np.min(padding) <= np.max(padding) <= 2
    products = 9 * batch * height * width * kernel[2] * kernel[3]
    return is_3x3 and height * width >= 144 and min(kernel[2:]) >= 64 and products >= PRODUCTS


@partial(jax.jit, static_argnames="padding")  # traced and lowered once a shape
def winograd(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Y = Aᵀ[Σ_c (G g_c Gᵀ) ⊙ (Bᵀ d_c B)]A of Eq. 12 and 13, d the 4×4 tiles two pixels apart."""
    (top, bottom), (left, right) = padding
    batch, c_in, c_out = x.shape[0], *kernel.shape[2:]
    height, width = x.shape[1] + top + bottom - 2, x.shape[2] + left + right - 2
    rows, columns = -(-height // 2), -(-width // 2)  # of tiles
    below, beside = 2 * rows + 2 - x.shape[1] - top, 2 * columns + 2 - x.shape[2] - left
    # Products of matrices, of all channels: XLA:CPU has nothing to compile for them.
    g = (np.float32(np.kron(G, G)) @ kernel.reshape(9, -1)).reshape(16, c_in, c_out)

    def some(x: jax.Array) -> jax.Array:
        d = jnp.pad(x, ((0, 0), (top, below), (left, beside), (0, 0)))
        d = d.reshape(-1, rows + 1, 2, 2 * (columns + 1), c_in)
        d = jnp.stack(_b(d[:, :-1, 0], d[:, :-1, 1], d[:, 1:, 0], d[:, 1:, 1]))
        d = d.reshape(4, -1, rows, columns + 1, 2, c_in)
        parts = _b(d[..., :-1, 0, :], d[..., :-1, 1, :], d[..., 1:, 0, :], d[..., 1:, 1, :])
        m = jax.lax.batch_matmul(jnp.stack(parts, 1).reshape(16, -1, c_in), g)
        y = np.float32(np.kron(A, A).T) @ m.reshape(16, -1)
        y = y.reshape(2, 2, -1, rows, columns, c_out).transpose(2, 3, 0, 4, 1, 5)
        return y.reshape(-1, 2 * rows, 2 * columns, c_out)[:, :height, :width]

    most = max(PIXELS // (height * width), 1)
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    if images == batch:
        return some(x)
    y = jax.lax.map(some, x.reshape(-1, images, *x.shape[1:]))
    return y.reshape(batch, height, width, c_out)


def _b(d0: jax.Array, d1: jax.Array, d2: jax.Array, d3: jax.Array) -> list[jax.Array]:
    """Bᵀd."""
    return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]


def plain(
    x: jax.Array, kernel: jax.Array, *, padding: Padding, options: tuple[Any, ...], back: bool
) -> jax.Array:
    """XLA's convolution or, `back`, its transpose: from the gradient of y to that of x."""

    def forward(x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, **dict(options))

    if not back:
        return forward(x)
    (top, bottom), (left, right) = padding
    height, width = x.shape[1] + 2 - top - bottom, x.shape[2] + 2 - left - right
    like = jax.ShapeDtypeStruct((x.shape[0], height, width, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(forward, like)(x)[0]


def _fast(x: jax.Array, kernel: jax.Array, *, padding: Padding, options: Any, back: bool) -> Any:
    if not back:
        return winograd(x, kernel, padding)
    (top, bottom), (left, right) = padding
    around = (2 - top, 2 - bottom), (2 - left, 2 - right)
    return winograd(x, kernel[::-1, ::-1].swapaxes(2, 3), around)


def _batched(args: Any, axes: Any, **params: Any) -> Any:
    x, kernel = args
    if axes[1] is not batching.not_mapped:
        return jax.vmap(partial(plain, **params), axes)(x, kernel), 0
    x = jnp.moveaxis(x, axes[0], 0)
    y = conv3.bind(x.reshape(-1, *x.shape[2:]), kernel, **params)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _kernel_bar(y_bar: jax.Array, x: jax.Array, kernel: Any, **params: Any) -> jax.Array:
    return jax.linear_transpose(partial(plain, x, **params), kernel.aval)(y_bar)[0]


def _x_bar(y_bar: jax.Array, x: Any, kernel: jax.Array, **params: Any) -> jax.Array:
    return conv3.bind(y_bar, kernel, **params | {"back": not params["back"]})


def _shape(x: Any, kernel: Any, **params: Any) -> Any:
    y = jax.eval_shape(partial(plain, **params), *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, kernel)))
    return jax.core.ShapedArray(y.shape, y.dtype)


conv3 = Primitive("conv3")
conv3.def_abstract_eval(_shape)
conv3.def_impl(lambda x, kernel, **params: jax.jit(partial(conv3.bind, **params))(x, kernel))
ad.defbilinear(conv3, _x_bar, _kernel_bar)
batching.primitive_batchers[conv3] = _batched
mlir.register_lowering(conv3, mlir.lower_fun(plain, multiple_results=False))
mlir.register_lowering(conv3, mlir.lower_fun(_fast, multiple_results=False), platform="cpu")
