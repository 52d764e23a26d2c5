"""Winograd's minimal filtering F(2×2, 3×3): a 3×3 convolution by 4 products a pixel instead of 9.

Lavin & Gray (2016), "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308. `conv3`
is a primitive so that a CPU alone gets it: other platforms get XLA's convolution, to the letter.
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

A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]], np.float32)
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
PIXELS = 2048  # transformed at once: those of more leave the cache
PRODUCTS = 2**27  # of the plain convolution: fewer are not worth what there is to compile


def pays(
    y: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Sequence[Any]
) -> bool:
    """Whether a CPU is to take Winograd's algorithm, from shapes alone.

    Its time over that of XLA:CPU's convolution, inside a scan where the kernel is transformed once
    before it, and alone (2 busy cores, medians in turns; noise is 0.2 and more: of 64
    channels at batch 16 the scan took 0.61 in another run, and `cifar10-small` gains):

    | H, W; C_in to C_out | batch 1      | batch 8      | batch 16     |
    |---------------------|--------------|--------------|--------------|
    | 32; 128 to 128      | 0.60 and 1.3 | 0.53 and 0.6 | 0.48 and 0.5 |
    | 32; 256 to 128      | 0.62 and 0.8 | 0.53 and 0.5 | 0.58 and 0.5 |
    | 16; 256 to 256      | 0.81 and 1.0 | 0.60 and 0.6 | 0.57 and 0.6 |
    | 16; 512 to 256      | 0.56 and 0.7 | 0.53 and 0.6 | 0.61 and 0.6 |
    | 32; 64 to 64        | 0.73 and 0.8 | 1.14 and 0.7 | 1.17 and 0.7 |
    | 8; 256 to 256       | 0.78 and 1.1 | 0.59 and 0.6 | 0.58 and 0.6 |
    | 4; 256 to 256       | 1.2 and 1.6  | 0.72 and 1.1 | 0.74 and 0.9 |
    | 32; 32 to 32        | 1.1 and 0.9  | 1.1 and 1.2  | 1.0 and 0.9  |

    Each shape costs 0.13 s to compile, so it is not taken where a network has little to gain:
    below 12 × 12 pixels, 64 channels or `PRODUCTS`. F(4×4, 3×3) takes up to a quarter less time,
    but errs by 2e-5 of the largest value where this errs by 1e-6.

    Args:
      y: (B, H', W') of the output.
      kernel: (h, w, C_in, C_out).
      strides: of the two axes.
      padding: (low, high) of the two axes.

    Returns:
      True for 3×3 without strides, padded by at most 2, of 12 × 12 pixels, 64 channels and
      `PRODUCTS` at least.

    Example:
      >>> same = ((1, 1), (1, 1))
      >>> pays((8, 32, 32), (3, 3, 128, 128), (1, 1), same)
      True
      >>> pays((8, 32, 32), (3, 3, 3, 128), (1, 1), same)
      False
    """
    batch, height, width = y
    plain_3x3 = (*kernel[:2], *strides) == (3, 3, 1, 1) and {0, 1, 2}.issuperset(np.ravel(padding))
    products = 9 * batch * height * width * kernel[2] * kernel[3]
    large = height * width >= 144 and min(kernel[2:]) >= 64 and products >= PRODUCTS
    return plain_3x3 and large


@partial(jax.jit, static_argnames="padding")  # traced and lowered once a shape
def winograd(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Y = Aᵀ[Σ_c (G g_c Gᵀ) ⊙ (Bᵀ d_c B)]A of Eq. 12 and 13, d the 4×4 tiles two pixels apart."""
    (top, bottom), (left, right) = padding
    batch, c_in, c_out = x.shape[0], *kernel.shape[2:]
    height, width = x.shape[1] + top + bottom - 2, x.shape[2] + left + right - 2
    rows, columns = -(-height // 2), -(-width // 2)  # of tiles
    below, beside = 2 * rows + 2 - x.shape[1] - top, 2 * columns + 2 - x.shape[2] - left
    # Products of matrices, of all channels: XLA:CPU has nothing to compile for them.
    g = np.einsum("ia,jb->jiab", G, G).reshape(16, 9) @ kernel.reshape(9, -1)
    g = g.reshape(16, c_in, c_out)
    sums = np.einsum("ip,jq->pqji", A, A).reshape(4, 16)

    def some(x: jax.Array) -> jax.Array:
        d = jnp.pad(x, ((0, 0), (top, below), (left, beside), (0, 0)))
        d = _b(d.reshape(-1, rows + 1, 2, 2 * (columns + 1) * c_in))  # (i, images, rows, …)
        d = _b(d.reshape(-1, columns + 1, 2, c_in))  # (j, i · images · rows, columns, c_in)
        m = jax.lax.batch_matmul(d.reshape(16, -1, c_in), g)
        y = (sums @ m.reshape(16, -1)).reshape(2, 2, -1, rows, columns, c_out)
        y = y.transpose(2, 3, 0, 4, 1, 5).reshape(-1, 2 * rows, 2 * columns, c_out)
        return y[:, :height, :width]

    most = max(PIXELS // (height * width), 1)
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    if images == batch:
        return some(x)
    y = jax.lax.map(some, x.reshape(-1, images, *x.shape[1:]))
    return y.reshape(batch, height, width, c_out)


def _b(d: jax.Array) -> jax.Array:
    """Bᵀd along an axis cut in pairs, (N, n + 1, 2, …) → (4, N, n, …)."""
    d0, d1, d2, d3 = d[:, :-1, 0], d[:, :-1, 1], d[:, 1:, 0], d[:, 1:, 1]
    return jnp.stack([d0 - d2, d1 + d2, d2 - d1, d1 - d3])


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


def _on_cpu(context: Any, *args: Any, **params: Any) -> Any:
    """`_fast`, but not where XLA is to spread a program over devices: it would gather the batch."""
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    form = _fast if devices == 1 else plain
    return mlir.lower_fun(form, multiple_results=False)(context, *args, **params)


def _batched(args: Any, axes: Any, **params: Any) -> Any:
    x, kernel = args
    if axes[1] is not None:
        return jax.vmap(lambda x, kernel: plain(x, kernel, **params), axes)(x, kernel), 0
    x = jnp.moveaxis(x, axes[0], 0)
    y = conv3.bind(x.reshape(-1, *x.shape[2:]), kernel, **params)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _kernel_bar(y_bar: jax.Array, x: jax.Array, kernel: Any, **params: Any) -> jax.Array:
    y = lambda kernel: plain(x, kernel, **params)  # noqa: E731
    return jax.linear_transpose(y, kernel.aval)(y_bar)[0]


def _x_bar(y_bar: jax.Array, x: Any, kernel: jax.Array, **params: Any) -> jax.Array:
    return conv3.bind(y_bar, kernel, **params | {"back": not params["back"]})


def _shape(x: Any, kernel: Any, **params: Any) -> Any:
    like = (jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, kernel))
    y = jax.eval_shape(lambda x, kernel: plain(x, kernel, **params), *like)
    return jax.core.ShapedArray(y.shape, y.dtype)


conv3 = Primitive("conv3")
conv3.def_abstract_eval(_shape)
conv3.def_impl(lambda x, kernel, **params: jax.jit(partial(conv3.bind, **params))(x, kernel))
ad.defbilinear(conv3, _x_bar, _kernel_bar)
batching.primitive_batchers[conv3] = _batched
mlir.register_lowering(conv3, mlir.lower_fun(plain, multiple_results=False))
mlir.register_lowering(conv3, _on_cpu, platform="cpu")
