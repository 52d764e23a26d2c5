"""The convolution of the U-Net, in forms that are not slow on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from ddim_jax.networks.winograd import conv3, pays

PIXELS = 2048  # of the output in a strip: as many as XLA:CPU still does at full speed


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of images, (B, H, W, C_in) and (h, w, C_in, C_out).

    XLA:CPU takes the gradient with respect to the kernel as one convolution over all B·H·W pixels
    and, beyond some thousands of them, at a quarter of its speed. There the gradient is a sum over
    strips of rows instead. Large 3×3 convolutions there, and their gradients with respect to x, are
    Winograd's (see `winograd.py`). Other dtypes and platforms stay as they are, and so do the
    symbolic sizes of `jax.export`.

    Args:
      x: (B, H, W, C_in).
      kernel: (h, w, C_in, C_out).
      strides: of the two axes.
      padding: "SAME", "VALID" or (low, high) of the two axes.
      **kwargs: passed on; they must not dilate.

    Returns:
      (B, H', W', C_out).

    Example:
      >>> x, kernel = jax.numpy.ones((8, 32, 32, 1)), jax.numpy.ones((3, 3, 1, 1))
      >>> numbers = ("NHWC", "HWIO", "NHWC")
      >>> float(conv(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)[0, 1, 1, 0])
      9.0
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (low, high), columns = padding

    def plain(x: jax.Array, kernel: jax.Array, rows: tuple[int, int] = (low, high)) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, (rows, columns), **kwargs)

    batch, height, width, _ = jax.eval_shape(plain, x, kernel).shape
    symbolic = not all(isinstance(size, int) for size in (batch, height, width))
    if symbolic or x.dtype != jax.numpy.float32:
        return plain(x, kernel)
    value, shape = plain, (batch, height, width)
    whole = x.shape[3] == kernel.shape[2] and not _is_laid_out(x) and not _is_laid_out(kernel)
    if whole and pays(shape, kernel.shape, strides, padding):
        fixed = {"padding": ((low, high), tuple(columns)), "options": tuple(kwargs.items())}
        value = partial(conv3.bind, **fixed, back=False)
    step = max(PIXELS // (batch * width), 2)
    if step >= height:
        return value(x, kernel)

    def by_strips(x: jax.Array, kernel: jax.Array) -> jax.Array:
        strips = []
        for top in range(0, height, step):  # rows of the output; start and stop of the input
            start = top * strides[0] - low
            stop = (min(top + step, height) - 1) * strides[0] - low + kernel.shape[0]
            outside = max(-start, 0), max(stop - x.shape[1], 0)
            strips.append(plain(x[:, max(start, 0) : stop], kernel, outside))
        return jax.numpy.concatenate(strips, axis=1)

    f = jax.custom_jvp(lambda x, kernel: value(x, kernel))

    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (x, kernel), (x_dot, kernel_dot) = primals, tangents
        if isinstance(kernel_dot, jax.custom_derivatives.SymbolicZero):
            return f(x, kernel), value(x_dot, kernel)
        y_dot = jax.lax.platform_dependent(
            x, kernel_dot, cpu=jax.checkpoint(by_strips, prevent_cse=False), default=plain
        )
        if not isinstance(x_dot, jax.custom_derivatives.SymbolicZero):
            y_dot = y_dot + value(x_dot, kernel)
        return f(x, kernel), y_dot

    f.defjvp(jvp, symbolic_zeros=True)
    return f(x, kernel)


def _is_laid_out(x: jax.Array) -> bool:
    """Whether its type says that it is spread over devices, of which `conv3` knows nothing."""
    type_ = jax.typeof(x)
    return any(type_.sharding.spec) or bool(getattr(type_, "vma", ()))
