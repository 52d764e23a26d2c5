"""The classifier of noisy images: half a U-Net, and a pool (Dhariwal & Nichol 2021, §4.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ddim_jax.networks.blocks import GroupNorm, attention, dense, split
from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.networks.inputs import check_inputs, check_params
from ddim_jax.networks.unet import UNet

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
HIDDEN = 2048  # width between the two layers of the spatial pools


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Shape of a classifier.

    Attributes:
      encoder: the U-Net whose way down and middle it has.
      num_classes: K.
      pool: "attention", from the mean of the pixels to all of them, in heads of the encoder's;
        "adaptive", the mean alone; "spatial" and "spatial_v2", the means of all layers, through a
        layer of 2048, in the latter with a GroupNorm.

    Raises:
      ValueError: the pool is unknown, there is no class, or the encoder has classes of its own.
    """

    encoder: UNetConfig
    num_classes: int
    pool: str = "attention"

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.encoder.labelled:
            raise ValueError("the encoder of a classifier takes no labels: num_classes=None there")


class Classifier(UNet):
    """(x, index) → logits (B, K)."""

    def __init__(self, config: ClassifierConfig):
        encoder = config.encoder
        super().__init__(encoder)
        del self.up, self.norm_out, self.conv_out
        self.pool, width = config.pool, encoder.widths[-1]
        if not self.pool.startswith("spatial"):
            self.norm_out = GroupNorm(width, encoder.norm_groups, encoder.norm_eps)
        if self.pool == "adaptive":
            self.dense = dense(width, config.num_classes, encoder)
        elif self.pool == "attention":
            height, across = (side // encoder.downsampling for side in encoder.image_shape[:2])
            shape = (height * across + 1, width)
            self.positions = nnx.Param(jnp.zeros(shape, jnp.float32))
            self.q, self.k, self.v = (dense(width, width, encoder) for _ in range(3))
            self.dense = dense(width, config.num_classes, encoder)
        else:
            per, widths = (
                encoder.num_blocks + 1,
                encoder.widths,
            )  # a level's blocks and what ends it
            features = encoder.channels + per * sum(widths)  # and the middle's, for the last level
            self.hidden = dense(features, HIDDEN, encoder)
            if self.pool == "spatial_v2":
                self.norm_hidden = GroupNorm(HIDDEN, encoder.norm_groups, encoder.norm_eps)
            self.dense = dense(HIDDEN, config.num_classes, encoder)

    def __call__(self, x: jax.Array, index: jax.Array, *_: Any) -> jax.Array:
        skips, h = self.way_down(x, self.residual(self.embedding(index, None), None))
        if self.pool.startswith("spatial"):
            h = self.hidden(jnp.concatenate([f.mean((1, 2)) for f in [*skips, h]], axis=-1))
            if self.pool == "spatial":
                return self.dense(nnx.relu(h))
            return self.dense(nnx.swish(self.norm_hidden(h[:, None, None])[:, 0, 0]))
        h = self.norm_out(h, then=nnx.swish)
        pixels = h.reshape(h.shape[0], -1, h.shape[-1])
        if self.pool == "adaptive":
            return self.dense(pixels.mean(1))
        tokens = jnp.concatenate([pixels.mean(1, keepdims=True), pixels], axis=1)
        tokens = tokens + self.positions[...][None].astype(tokens.dtype)
        width = self.config.head_width or pixels.shape[-1] // self.config.num_heads

        def heads(z: jax.Array) -> jax.Array:  # (B, N, C) -> (B, N, heads, width)
            return z.reshape(*z.shape[:2], -1, width)

        q, k, v = heads(self.q(tokens[:, :1])), heads(self.k(tokens)), heads(self.v(tokens))
        pooled = jax.vmap(attention, in_axes=2, out_axes=2)(q, k, v)
        return self.dense(pooled.reshape(pooled.shape[0], -1))


@functools.cache
def _split(config: ClassifierConfig) -> tuple[Any, Params]:
    return split(lambda: Classifier(config))


def abstract_classifier(config: ClassifierConfig) -> Params:
    """Shapes and dtypes of a classifier's parameters.

    Example:
      >>> encoder = UNetConfig(8, channels=32, multipliers=(1,), attention_resolutions=())
      >>> abstract_classifier(ClassifierConfig(encoder, 10))["dense"]["kernel"].shape
      (32, 10)
    """
    return jax.tree.map(lambda leaf: leaf, _split(config)[1])


def make_classifier(config: ClassifierConfig) -> Callable[..., jax.Array]:
    """The classifier as a pure function, without weights.

    Args:
      config: of the network.

    Returns:
      `apply_fn(params, x, t) -> logits`: x (B, H, W, C) of noisy images, t (B,) in 1..T, and
      (B, K) float32.

    Example:
      >>> encoder = UNetConfig(8, channels=32, multipliers=(1,), attention_resolutions=())
      >>> config = ClassifierConfig(encoder, 10, "adaptive")
      >>> x, t = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jnp.array([1, 1000])
      >>> jax.eval_shape(make_classifier(config), abstract_classifier(config), x, t).shape
      (2, 10)
    """
    graphdef, abstract = _split(config)

    def apply_fn(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        check_params(params, abstract)
        x, t, _ = check_inputs(config.encoder, x, t, None)
        if config.pool == "attention" and x.shape[1:] != config.encoder.image_shape:
            raise ValueError(
                f"its pool knows images {config.encoder.image_shape} alone, got {x.shape[1:]}"
            )
        logits = nnx.merge(graphdef, params)(x, t - 1)
        return logits.astype(jnp.float32)

    return apply_fn
