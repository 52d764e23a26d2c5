"""Floating-point operations of a function, counted from shapes: nothing is compiled or run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from ddim_jax.networks.winograd import conv3, plain


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Two per multiplication and addition of the convolutions and matrix products in a function.

    That is nearly all that a network does. Element-wise operations are left out, and products with
    the padding of a convolution, as XLA's own count leaves them out. A `scan` counts as often as it
    runs, a `while_loop` once, of a `cond` the dearest branch. What a kernel hides (Pallas, cuDNN)
    is not seen.

    Args:
      function: anything that JAX can trace.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      FLOP of one call.

    Example:
      >>> matrix = jnp.zeros((3, 4))
      >>> count_flops(lambda a, b: a @ b, matrix, matrix.T)  # 9 sums of 4 products
      72
    """
    return _flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def flops_per_image(
    apply_fn: Callable[..., Any],
    params: Any,
    shape: tuple[int, ...],
    num_classes: int | None = None,
) -> float:
    """`count_flops` of a network's forward pass, per image; a backward pass takes twice as many.

    Args:
      apply_fn: the network.
      params: its parameters, or their shapes.
      shape: (B, H, W, C) of a batch.
      num_classes: see `make_train_step`.

    Returns:
      FLOP, 0 for a network without convolutions and matrix products.

    Example:
      >>> weight = jnp.zeros((64, 64))
      >>> network = lambda w, x, t, dropout_key=None: (x.reshape(1, 64) @ w).reshape(x.shape)
      >>> flops_per_image(network, weight, (1, 8, 8, 1))
      8192.0
    """
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    t = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    labels = {} if num_classes is None else {"labels": t}
    plain = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    return count_flops(apply_fn, plain, x, t, **labels) / shape[0]


def _flops(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        terms = math.prod(left[axis] for axis in contracted)
        return 2 * terms * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        return 2 * _products(equation)
    if equation.primitive is conv3:  # counted as the convolution that it is
        jaxpr = jax.make_jaxpr(partial(plain, **params))(*(v.aval for v in equation.invars))
        return _flops(jaxpr.jaxpr)
    inner = [_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _products(convolution: Any) -> int:
    """Multiplications of a convolution: those of an axis are pairs of an output and a tap inside.

    Output o and tap k of an axis meet at input o·stride − padding + k·dilation.
    """
    params = convolution.params
    x, kernel = (variable.aval.shape for variable in convolution.invars)
    (y,) = (variable.aval.shape for variable in convolution.outvars)
    numbers = params["dimension_numbers"]
    count = y[numbers.out_spec[0]] * y[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for axis, stride in enumerate(params["window_strides"]):
        size, taps, outputs = (
            shape[spec[2 + axis]]
            for shape, spec in zip(
                (x, kernel, y), (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
            )
        )
        spread = params["lhs_dilation"][axis]
        at = np.arange(outputs)[:, None] * stride - params["padding"][axis][0]
        at = at + np.arange(taps) * params["rhs_dilation"][axis]
        inside = (at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)
        count *= int(inside.sum())
    return count


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    """The programs in a parameter of an equation."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _jaxprs(part)
