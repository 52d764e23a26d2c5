"""The Inception-v3 by which FID is defined, in plain JAX, with the weights of pytorch-fid.

TensorFlow's graph of 2015-12-05 (Szegedy et al. 2016; Heusel et al. 2017) differs from the common
Inception-v3 in three ways, followed here: average pooling in the A, C and first E blocks does not
count the padding; the last E block pools by the maximum; there are 1008 classes.

The reference is pytorch-fid: pixels v/255 are resized to 299 × 299 bilinearly with half-pixel
centres and no antialiasing (`torch.nn.functional.interpolate`, align_corners=False), nothing is
rounded, and the network gets 2x − 1. Others resize differently, which moves the figure:
"clean-fid" uses Pillow's antialiased bicubic filter, TensorFlow 1 and torch-fidelity the bilinear
one without the half pixel (sample i at i·H/299).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.evaluation._layers import Params, conv

DIM = 2048
SIDE = 299
PREPROCESSING = "v / 255, bilinear to 299x299 (half-pixel centres, no antialiasing), 2 x - 1"


def pooled(params: Params, images: jax.Array) -> jax.Array:
    """The network up to its pooling.

    Args:
      params: from `inception_weights.fold`.
      images: uint8 (n, H, W, 3), or (n, H, W, 1), whose one channel is taken three times.

    Returns:
      float32 (n, 2048), the mean over pixels of Mixed_7c.

    Raises:
      ValueError: images of another shape.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"Inception takes images (n, H, W, 1 or 3), got {images.shape}")
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    return network(params, 2 * resize(images.astype(jnp.float32) / 255) - 1)


def resize(images: jax.Array) -> jax.Array:
    """Bilinear to 299 × 299: output i lies at (i + ½) H/299 − ½ of the input, held to its range.

    Args:
      images: floating (n, H, W, C).

    Returns:
      (n, 299, 299, C) of the same dtype.
    """

    def weights(size: int) -> jax.Array:
        at = np.clip((np.arange(SIDE) + 0.5) * size / SIDE - 0.5, 0, size - 1)
        hats = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
        return jnp.asarray(hats, images.dtype)

    rows, columns = map(weights, images.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,nhwc,jw->nijc", rows, images, columns, precision=highest)


def network(params: Params, x: jax.Array) -> jax.Array:
    """float32 (n, 299, 299, 3) in [−1, 1] → (n, 2048); any size of 75 or more will do."""
    layer = _layers(params)
    x = layer(x, "Conv2d_1a_3x3", stride=2)
    x = layer(x, "Conv2d_2a_3x3", padding="VALID")
    x = layer(x, "Conv2d_2b_3x3")
    x = _max_pool(x, 2, "VALID")
    x = layer(x, "Conv2d_3b_1x1")
    x = layer(x, "Conv2d_4a_3x3", padding="VALID")
    x = _max_pool(x, 2, "VALID")
    for name, block in BLOCKS.items():
        x = block(_layers(params, name + "."), x)
    return x.mean((1, 2))


def _layers(params: Params, prefix: str = "") -> Callable[..., jax.Array]:
    """(x, *names, stride, padding) → x after these convolutions and ReLUs, one after another.

    `stride` and `padding` are the last one's; a stride of 2 comes with no padding.
    """

    def apply(x: jax.Array, *names: str, stride: int = 1, padding: str = "SAME") -> jax.Array:
        *first, last = names
        for name in first:
            x = jax.nn.relu(conv(params[prefix + name], x))
        padding = "VALID" if stride == 2 else padding
        return jax.nn.relu(conv(params[prefix + last], x, stride, padding))

    return apply


def _block_a(layer: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return _concat(
        layer(x, "branch1x1"),
        layer(x, "branch5x5_1", "branch5x5_2"),
        layer(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        layer(_average_pool(x), "branch_pool"),
    )


def _block_b(layer: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return _concat(
        layer(x, "branch3x3", stride=2),
        layer(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3", stride=2),
        _max_pool(x, 2, "VALID"),
    )


def _block_c(layer: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return _concat(
        layer(x, "branch1x1"),
        layer(x, *(f"branch7x7_{i}" for i in (1, 2, 3))),
        layer(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
        layer(_average_pool(x), "branch_pool"),
    )


def _block_d(layer: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return _concat(
        layer(x, "branch3x3_1", "branch3x3_2", stride=2),
        layer(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)), stride=2),
        _max_pool(x, 2, "VALID"),
    )


def _block_e(
    layer: Callable[..., jax.Array], x: jax.Array, pool: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    y = layer(x, "branch3x3_1")
    z = layer(x, "branch3x3dbl_1", "branch3x3dbl_2")
    return _concat(
        layer(x, "branch1x1"),
        layer(y, "branch3x3_2a"),
        layer(y, "branch3x3_2b"),
        layer(z, "branch3x3dbl_3a"),
        layer(z, "branch3x3dbl_3b"),
        layer(pool(x), "branch_pool"),
    )


def _concat(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def _max_pool(x: jax.Array, stride: int, padding: str) -> jax.Array:
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


def _average_pool(x: jax.Array) -> jax.Array:
    """The mean of 3 × 3 neighbours at stride 1; at the border, of those within the image."""

    def total(y: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


BLOCKS: dict[str, Callable[[Callable[..., jax.Array], jax.Array], jax.Array]] = {
    "Mixed_5b": _block_a,
    "Mixed_5c": _block_a,
    "Mixed_5d": _block_a,
    "Mixed_6a": _block_b,
    "Mixed_6b": _block_c,
    "Mixed_6c": _block_c,
    "Mixed_6d": _block_c,
    "Mixed_6e": _block_c,
    "Mixed_7a": _block_d,
    "Mixed_7b": lambda layer, x: _block_e(layer, x, _average_pool),
    "Mixed_7c": lambda layer, x: _block_e(layer, x, lambda y: _max_pool(y, 1, "SAME")),
}
