"""What the U-Net is made of: embedding of time, GroupNorm, residual block, attention, resampling.

The layers are Flax NNX. All weights are zero at first: `build` of `unet.py` draws them.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.networks.conv import conv

ACTIVATIONS = {
    "swish": nnx.swish,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}
Activation = Callable[[jax.Array], jax.Array]
_zeros = nnx.initializers.zeros_init()
_keyless: Any = SimpleNamespace(params=lambda: None)  # zeros need no key, and keys cost the most


def timestep_embedding(
    index: jax.Array, dim: int, shift: float = 1, cosine_first: bool = False
) -> jax.Array:
    """Sinusoidal embedding: [sin(index·f_k), cos(index·f_k)], f_k = 10000^(−k/(h−shift)).

    k = 0..h−1 with h = dim // 2. Vaswani et al. (2017), §3.5, with sines and cosines in two
    halves and h − 1 for h, as in the code released by Ho et al. (2020).

    Args:
        index: (batch,) the network's 0-based index, t − 1, integer or not; below 0 gives NaN.
        dim: at least 4; of an odd one the last number is 0.
        shift: 1 of Ho et al., 0 of Vaswani et al.
        cosine_first: cosines before sines.

    Returns:
        (batch, dim) float32.

    Example:
        >>> timestep_embedding(jnp.array([0]), 4).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    half = dim // 2
    freq = np.exp(-math.log(10000) / (half - shift) * np.arange(half)).astype(np.float32)
    place = jnp.where(index < 0, jnp.nan, index.astype(jnp.float32))
    angle = place[:, None] * freq[None, :]
    parts = [jnp.sin(angle), jnp.cos(angle)]
    if dim % 2:
        parts.append(jnp.zeros_like(place[:, None]))
    if cosine_first:
        parts[:2] = parts[1::-1]
    return jnp.concatenate(parts, axis=-1)


class GroupNorm(nnx.Module):
    """Group normalisation with float32 statistics (Wu & He, 2018), and what follows each pixel.

    `norm(x)` is (B, H, W, C) as x; `norm(*parts, shift=s, then=f)` is f(norm(x + s)) of x = the
    parts, one after the other along the channels, and s (B, 1, 1, C): neither is put together.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    @jax.named_scope("group_norm")
    def __call__(
        self,
        *parts: jax.Array,
        shift: jax.Array | None = None,
        then: Activation = lambda y: y,
    ) -> jax.Array:
        batch, dtype = parts[0].shape[0], parts[0].dtype
        ends = np.cumsum([part.shape[-1] for part in parts])

        def cut(z: jax.Array) -> list[jax.Array]:  # (B, 1, 1, C) -> one of each part
            return jnp.split(z, ends[:-1], axis=-1)

        def shifted(parts: Sequence[jax.Array], shift: jax.Array | None) -> list[jax.Array]:
            wide = [part.astype(jnp.float32) for part in parts]
            if shift is None:
                return wide
            return [y + s for y, s in zip(wide, cut(shift.astype(jnp.float32)))]

        def group_mean(zs: list[jax.Array]) -> jax.Array:  # of its group, for each channel
            z = jnp.concatenate([z.mean((1, 2)) for z in zs], -1).reshape(batch, self.groups, -1)
            return jnp.broadcast_to(z.mean(-1, keepdims=True), z.shape).reshape(batch, 1, 1, -1)

        # var = E(y − m)² − (E y − m)² for any constant m, so that E and var take one pass. With m
        # the mean of one row of H, (E y − m)² ≤ H var: no more than log₂ H bits are lost. Those of
        # 16 bits have none that float32 could lose, and m = 0.
        each = shifted(parts, shift)
        m = jnp.zeros((1, 1, 1, int(ends[-1])), jnp.float32)
        if dtype == jnp.float32:
            m = jax.lax.stop_gradient(group_mean([y[:, :1] for y in each]))
        mean = group_mean(each)
        square = group_mean([jnp.square(y - n) for y, n in zip(each, cut(m))])
        var = jnp.maximum(square - jnp.square(mean - m), 0)
        scale = jax.lax.rsqrt(var + self.eps) * self.scale[...].reshape(1, 1, 1, -1)
        bias = self.bias[...].reshape(1, 1, 1, -1) - mean * scale

        def apply(
            parts: tuple[jax.Array, ...],
            shift: jax.Array | None,
            scales: list[jax.Array],
            biases: list[jax.Array],
        ) -> jax.Array:
            affine = [y * a + b for y, a, b in zip(shifted(parts, shift), scales, biases)]
            return then(jnp.concatenate([y.astype(dtype) for y in affine], axis=-1))

        if dtype != jnp.float32:  # keep for the gradient what came, not what was made of it
            apply = jax.checkpoint(apply)
        return apply(parts, shift, cut(scale), cut(bias))


def dense(c_in: int, c_out: int, config: UNetConfig) -> nnx.Linear:
    """Over the channels: also Ho et al.'s 1×1 convolutions, which are twice as fast so on a CPU."""
    return nnx.Linear(c_in, c_out, dtype=config.dtype, kernel_init=_zeros, rngs=_keyless)


def two_layers(c_in: int, c: int, config: UNetConfig) -> nnx.Dict:
    """Those that an embedding goes through."""
    return nnx.Dict(dense=numbered([dense(c_in, c, config), dense(c, c, config)]))


def conv3(c_in: int, c_out: int, config: UNetConfig, **kwargs: Any) -> nnx.Conv:
    """The 3×3 convolution."""
    kwargs |= {"dtype": config.dtype, "kernel_init": _zeros, "conv_general_dilated": conv}
    return nnx.Conv(c_in, c_out, (3, 3), rngs=_keyless, **kwargs)


class ResnetBlock(nnx.Module):
    """x + conv2(dropout(a(norm2(conv1(r(a(norm1(x)))) + temb_proj(a(temb)))))), a the activation.

    With `scale_shift`, y = norm2(conv1(…)) becomes y (1 + s) + b instead, [s, b] = temb_proj(…).
    x comes in parts along its channels. r, of x too, is `upsample` or `average` in a block that
    resamples; the sum is over `divisor`.
    """

    def __init__(
        self, c_in: int, c_out: int, config: UNetConfig, resample: str = "", divisor: float = 1
    ):
        self.dropout, self.activation = config.dropout, config.activation
        self.scale_shift, self.resample, self.divisor = config.scale_shift, resample, divisor
        self.norm1 = GroupNorm(c_in, config.norm_groups, config.norm_eps)
        self.conv1 = conv3(c_in, c_out, config)
        width = 2 * c_out if config.scale_shift else c_out
        self.temb_proj = dense(config.embedding_width, width, config)
        self.norm2 = GroupNorm(c_out, config.norm_groups, config.norm_eps)
        self.conv2 = conv3(c_out, c_out, config)
        if c_in != c_out:
            self.nin_shortcut = dense(c_in, c_out, config)

    def __call__(
        self, parts: tuple[jax.Array, ...], temb: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        h = self.norm1(*parts, then=activation)
        if self.resample:
            resample = {"up": upsample, "down": average}[self.resample]
            h, parts = resample(h), tuple(map(resample, parts))
        h = self.conv1(h)
        time = self.temb_proj(activation(temb))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = self.norm2(h, then=lambda y: activation(y * (1 + scale) + shift))
        else:
            h = self.norm2(h, shift=time, then=activation)
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, h.shape)
            h = jnp.where(keep, h / (1 - self.dropout), jnp.zeros_like(h))
        h = self.conv2(h)
        y = h + self.shortcut(parts)
        return y if self.divisor == 1 else y / self.divisor

    def shortcut(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """The parts side by side, through a dense layer where the number of channels changes."""
        layer: Any = getattr(self, "nin_shortcut", lambda x: x)
        if len(parts) == 1 or not hasattr(self, "nin_shortcut"):
            return layer(jnp.concatenate(parts, axis=-1))
        ends = np.cumsum([part.shape[-1] for part in parts])
        kernels = jnp.split(layer.kernel[...].astype(parts[0].dtype), ends[:-1])
        bias = layer.bias[...].astype(parts[0].dtype).reshape(1, 1, 1, -1)
        return sum((x @ kernel for x, kernel in zip(parts, kernels)), bias)


class AttnBlock(nnx.Module):
    """x + proj_out(softmax(q kᵀ / √d) v) over all pixels, in heads of width d; softmax in float32.

    Without groups it has no norm; the sum is over `divisor`.
    """

    def __init__(
        self, channels: int, config: UNetConfig, heads: int, groups: int, divisor: float = 1
    ):
        width = config.head_width or channels // heads
        self.heads, self.divisor = channels // width, divisor
        if groups:
            self.norm = GroupNorm(channels, groups, config.norm_eps)
        self.q = dense(channels, self.heads * width, config)
        self.k = dense(channels, self.heads * width, config)
        self.v = dense(channels, self.heads * width, config)
        self.proj_out = dense(self.heads * width, channels, config)

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, _ = x.shape
        y = self.norm(x) if hasattr(self, "norm") else x
        q, k, v = (layer(y).reshape(b, h * w, -1) for layer in (self.q, self.k, self.v))
        if self.heads == 1:
            y = attention(q, k, v)
        else:
            q, k, v = (z.reshape(b, h * w, self.heads, -1) for z in (q, k, v))
            y = jax.vmap(attention, in_axes=2, out_axes=2)(q, k, v)
        y = x + self.proj_out(y.reshape(b, h, w, -1))
        return y if self.divisor == 1 else y / self.divisor


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √d) v of (B, N, d) each."""
    logits = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("bij,bjc->bic", weights, v)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, ×2: (B, H, W, C) → (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def average(x: jax.Array) -> jax.Array:
    """Mean of 2×2 pixels: (B, 2H, 2W, C) → (B, H, W, C)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class Resample(nnx.Module):
    """From one level to the next, "down" or "up": by convolution, residual block or no layer."""

    def __init__(self, direction: str, way: str, c: int, config: UNetConfig):
        self.direction = direction
        padding = (config.downsample_padding,) * 2
        halving = {"strides": 2, "padding": padding} if direction == "down" else {}
        if way == "block":
            self.block = ResnetBlock(c, c, config, direction)
        elif way == "conv":
            self.conv = conv3(c, c, config, **halving)

    def __call__(self, x: jax.Array, residual: Callable[..., jax.Array]) -> jax.Array:
        if hasattr(self, "block"):
            return residual(self.block, x)
        if self.direction == "up":
            x = upsample(x)
        elif not hasattr(self, "conv"):
            x = average(x)
        return self.conv(x) if hasattr(self, "conv") else x


def middle(c: int, config: UNetConfig) -> nnx.Dict:
    """Two residual blocks, attention between them, or less."""
    layers: dict[str, nnx.Module] = {}
    if config.middle != "none":
        for name in ("block_1", "block_2"):
            layers[name] = ResnetBlock(c, c, config, divisor=config.middle_scale)
    if config.middle == "attention":
        own = config.middle_norm_groups
        groups = config.norm_groups if own is None else own
        layers["attn_1"] = AttnBlock(c, config, config.num_heads, groups, config.middle_scale)
    return nnx.Dict(layers)


def rows(table: nnx.Param, index: jax.Array) -> jax.Array:
    """Unsigned, so that −1 is out of range too: NaN, no other row."""
    return table[...].at[index.astype(jnp.uint32)].get(mode="fill", fill_value=jnp.nan)


def split(make: Callable[[], nnx.Module]) -> tuple[Any, Params]:
    """(graph, abstract parameters) of a network, without its memory: `nnx.merge` undoes it."""
    graphdef, state = jax.eval_shape(lambda: nnx.split(make(), nnx.Param))
    return graphdef, nnx.to_pure_dict(state)


def numbered(modules: list[Any]) -> nnx.Dict:
    """A list of modules under the keys "0", "1", …: parameter paths are strings throughout."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def in_order(modules: nnx.Dict) -> list[Any]:
    return [modules[str(i)] for i in range(len(modules))]
