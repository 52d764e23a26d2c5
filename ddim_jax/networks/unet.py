"""The U-Net of Ho et al. (2020), with the module names of the DDIM authors' released weights.

The layers are Flax NNX; at the border there are only a pure function and a dict of arrays.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.networks.conv import conv
from ddim_jax.networks.inputs import check_inputs, check_params

ZERO_INIT = ("conv2", "proj_out", "conv_out")  # every residual branch, and the output, starts at 0
_zeros = nnx.initializers.zeros_init()


def timestep_embedding(index: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding of Ho et al.: [sin(index·f_k), cos(index·f_k)], f_k = 10000^(−k/(h−1)).

    k = 0..h−1 with h = dim // 2. Vaswani et al. (2017), §3.5, with sines and cosines in two
    halves and h − 1 for h, as in the code released by Ho et al. (2020).

    Args:
        index: (batch,) the network's 0-based index, t − 1, integer or not; below 0 gives NaN.
        dim: even, at least 4.

    Returns:
        (batch, dim) float32.

    Example:
        >>> timestep_embedding(jnp.array([0]), 4).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    half = dim // 2
    freq = np.exp(-math.log(10000) / (half - 1) * np.arange(half)).astype(np.float32)
    place = jnp.where(index < 0, jnp.nan, index.astype(jnp.float32))
    angle = place[:, None] * freq[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class GroupNorm(nnx.Module):
    """Group normalisation, ε = 1e-6, with float32 statistics (Wu & He, 2018)."""

    def __init__(self, channels: int, groups: int = 32):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        (b, _, _, c), groups = x.shape, self.groups
        y = x.astype(jnp.float32)

        def group_mean(z: jax.Array) -> jax.Array:  # (b, h, w, c) -> (b, groups, 1)
            return z.mean((1, 2)).reshape(b, groups, -1).mean(-1, keepdims=True)

        def per_channel(z: jax.Array) -> jax.Array:  # (b, groups, 1) -> (b, 1, 1, c)
            return jnp.broadcast_to(z, (b, groups, c // groups)).reshape(b, 1, 1, c)

        # var = E(y − m)² − (E y − m)² for any constant m. With m = E y no digits are lost, and as
        # a constant it keeps a second reduction out of the backward pass.
        mean = group_mean(y)
        m = jax.lax.stop_gradient(mean)
        var = group_mean(jnp.square(y - per_channel(m))) - jnp.square(mean - m)
        scale = per_channel(jax.lax.rsqrt(var + 1e-6)) * self.scale[...].reshape(1, 1, 1, c)
        shift = self.bias[...].reshape(1, 1, 1, c) - per_channel(mean) * scale
        return (y * scale + shift).astype(x.dtype)


def _dense(c_in: int, c_out: int, config: UNetConfig) -> nnx.Linear:
    """Over the channels: also Ho et al.'s 1×1 convolutions, which are twice as fast so on a CPU."""
    return nnx.Linear(c_in, c_out, dtype=config.dtype, kernel_init=_zeros, rngs=nnx.Rngs(0))


def _conv(c_in: int, c_out: int, config: UNetConfig, **kwargs: Any) -> nnx.Conv:
    kwargs |= {"dtype": config.dtype, "kernel_init": _zeros, "conv_general_dilated": conv}
    return nnx.Conv(c_in, c_out, (3, 3), rngs=nnx.Rngs(0), **kwargs)


class ResnetBlock(nnx.Module):
    """x + conv2(dropout(swish(norm2(conv1(swish(norm1(x))) + temb_proj(swish(temb))))))."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        self.dropout = config.dropout
        self.norm1 = GroupNorm(c_in, config.norm_groups)
        self.conv1 = _conv(c_in, c_out, config)
        self.temb_proj = _dense(4 * config.channels, c_out, config)
        self.norm2 = GroupNorm(c_out, config.norm_groups)
        self.conv2 = _conv(c_out, c_out, config)
        if c_in != c_out:
            self.nin_shortcut = _dense(c_in, c_out, config)

    def __call__(self, x: jax.Array, temb: jax.Array, key: jax.Array | None) -> jax.Array:
        h = self.conv1(nnx.swish(self.norm1(x)))
        h = h + self.temb_proj(nnx.swish(temb))[:, None, None]
        h = nnx.swish(self.norm2(h))
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, h.shape)
            h = jnp.where(keep, h / (1 - self.dropout), jnp.zeros_like(h))
        h = self.conv2(h)
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nnx.Module):
    """x + proj_out(softmax(q kᵀ / √C) v), one head over all pixels; softmax in float32."""

    def __init__(self, channels: int, config: UNetConfig):
        self.norm = GroupNorm(channels, config.norm_groups)
        self.q = _dense(channels, channels, config)
        self.k = _dense(channels, channels, config)
        self.v = _dense(channels, channels, config)
        self.proj_out = _dense(channels, channels, config)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).reshape(b, h * w, c) for layer in (self.q, self.k, self.v))
        logits = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * c**-0.5, axis=-1).astype(v.dtype)
        return x + self.proj_out(jnp.einsum("bij,bjc->bic", weights, v).reshape(b, h, w, c))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, ×2: (B, H, W, C) → (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


class UNet(nnx.Module):
    """The network, all weights zero; `down.0.block.1.conv1` and the rest are the authors' names."""

    def __init__(self, config: UNetConfig):
        self.config = config
        widths = list(config.widths)
        temb, bottom = 4 * config.channels, widths[-1]
        skips = [config.channels]  # widths of what the way down leaves for the way up

        def level(inputs: list[int], c: int, resolution: int) -> nnx.Dict:
            attn = inputs if resolution in config.attention_resolutions else []
            return nnx.Dict(
                block=_numbered([ResnetBlock(c_in, c, config) for c_in in inputs]),
                attn=_numbered([AttnBlock(c, config) for _ in attn]),
            )

        first, second = _dense(config.channels, temb, config), _dense(temb, temb, config)
        self.temb = nnx.Dict(dense=_numbered([first, second]))
        if config.num_classes is not None:  # the last row stands for "no label"
            shape = (config.num_classes + 1, temb)
            self.label_embedding = nnx.Param(jnp.zeros(shape, jnp.float32))
        self.conv_in = _conv(config.in_channels, config.channels, config)

        down = []
        for c, resolution in zip(widths, config.resolutions):
            down.append(level([skips[-1]] + [c] * (config.num_blocks - 1), c, resolution))
            skips += [c] * config.num_blocks
            if len(down) < len(widths):
                conv = _conv(c, c, config, strides=2, padding=((0, 1), (0, 1)))
                down[-1].downsample = nnx.Dict(conv=conv)
                skips.append(c)
        self.down = _numbered(down)

        self.mid = nnx.Dict(
            block_1=ResnetBlock(bottom, bottom, config),
            attn_1=AttnBlock(bottom, config),
            block_2=ResnetBlock(bottom, bottom, config),
        )

        up, below = [], bottom
        for c, resolution in zip(reversed(widths), reversed(config.resolutions)):
            inputs = [h + skips.pop() for h in [below] + [c] * config.num_blocks]
            up.append(level(inputs, c, resolution))
            if len(up) < len(widths):
                up[-1].upsample = nnx.Dict(conv=_conv(c, c, config))
            below = c
        self.up = _numbered(up[::-1])

        self.norm_out = GroupNorm(widths[0], config.norm_groups)
        self.conv_out = _conv(widths[0], config.in_channels, config)

    def __call__(
        self,
        x: jax.Array,
        index: jax.Array,
        dropout_key: jax.Array | None,
        labels: jax.Array | None,
    ) -> jax.Array:
        keys = _keys(dropout_key)
        dtype = jnp.dtype(self.config.dtype)

        def residual(block: Any, h: jax.Array) -> jax.Array:
            run = jax.checkpoint(block.__call__) if self.config.remat else block
            return run(h, temb, next(keys))

        temb = timestep_embedding(index, self.config.channels)
        temb = self.temb["dense"]["1"](nnx.swish(self.temb["dense"]["0"](temb)))
        if labels is not None:  # unsigned, so that −1 is out of range too: NaN, no other label
            rows = self.label_embedding[...].at[labels.astype(jnp.uint32)]
            temb = temb + rows.get(mode="fill", fill_value=jnp.nan).astype(temb.dtype)

        skips = [self.conv_in(x.astype(dtype))]
        for level in _in_order(self.down):
            for i, block in enumerate(_in_order(level["block"])):
                h = residual(block, skips[-1])
                skips.append(level["attn"][str(i)](h) if level["attn"] else h)
            if "downsample" in level:
                skips.append(level["downsample"]["conv"](skips[-1]))

        h = residual(self.mid["block_1"], skips[-1])
        h = residual(self.mid["block_2"], self.mid["attn_1"](h))

        for level in reversed(_in_order(self.up)):
            for i, block in enumerate(_in_order(level["block"])):
                h = residual(block, jnp.concatenate([h, skips.pop()], axis=-1))
                h = level["attn"][str(i)](h) if level["attn"] else h
            if "upsample" in level:
                h = level["upsample"]["conv"](upsample(h))

        return self.conv_out(nnx.swish(self.norm_out(h))).astype(jnp.float32)


def _numbered(modules: list[Any]) -> nnx.Dict:
    """A list of modules under the keys "0", "1", …: parameter paths are strings throughout."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def _in_order(modules: nnx.Dict) -> list[Any]:
    return [modules[str(i)] for i in range(len(modules))]


def _keys(key: jax.Array | None) -> Iterator[jax.Array | None]:
    return (None if key is None else jax.random.fold_in(key, i) for i in itertools.count())


@functools.cache
def _split(config: UNetConfig) -> tuple[Any, Params]:
    graphdef, state = jax.eval_shape(lambda: nnx.split(UNet(config), nnx.Param))
    return graphdef, nnx.to_pure_dict(state)


def abstract_params(config: UNetConfig) -> Params:
    """Shapes and dtypes of `build(config, key)[1]`, without its memory.

    Args:
        config: the network.

    Returns:
        Nested dict of `jax.ShapeDtypeStruct`.

    Example:
        >>> count_params(abstract_params(UNetConfig()))
        35746307
    """
    return jax.tree.map(lambda leaf: leaf, _split(config)[1])


def count_params(params: Params) -> int:
    """Number of parameters, from arrays or from `abstract_params`.

    Args:
        params: nested dict of arrays of any shape.

    Returns:
        The sum of their sizes.

    Example:
        >>> count_params({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
        9
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _init(abstract: Params, key: jax.Array) -> Params:
    """U(−b, b), b² = 3 / fan_avg, as Ho et al.'s `nn.py`, with 0 for their scale of 1e-10."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)]
    # One draw, cut up on the host: else each shape is compiled, 12 s for the CIFAR-10 network.
    draw = np.asarray(jax.random.uniform(key, (sum(sizes),), jnp.float32, -1, 1))
    pieces = iter(np.split(draw, np.cumsum(sizes)[:-1]))

    def initial(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        module, name = ("", *(entry.key for entry in path))[-2:]
        uniform = next(pieces).reshape(like.shape)
        if name == "scale":
            return jnp.asarray(np.ones_like(uniform))
        if name == "bias" or module in ZERO_INIT:
            return jnp.asarray(np.zeros_like(uniform))
        fan_avg = math.prod(like.shape[:-2]) * (like.shape[-2] + like.shape[-1]) / 2
        variance = 1 if name == "label_embedding" else 1 / fan_avg
        return jnp.asarray(uniform * np.float32(math.sqrt(3 * variance)))

    return jax.tree_util.tree_map_with_path(initial, abstract)


def make_apply(config: UNetConfig) -> Callable[..., jax.Array]:
    """The network as a pure function, without weights: `apply_fn` of `build`.

    Args:
        config: the network.

    Returns:
        `apply_fn(params, x, t, dropout_key=None, labels=None) -> eps`, see `build`.

    Example:
        >>> config = UNetConfig(channels=32, multipliers=(1,), attention_resolutions=())
        >>> x, t = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jnp.array([1, 1000])
        >>> jax.eval_shape(make_apply(config), abstract_params(config), x, t).shape
        (2, 8, 8, 3)
    """
    graphdef, abstract = _split(config)

    def apply_fn(
        params: Params,
        x: jax.Array,
        t: jax.Array,
        dropout_key: jax.Array | None = None,
        labels: jax.Array | None = None,
    ) -> jax.Array:
        check_params(params, abstract)
        x, t, labels = check_inputs(config, x, t, labels)
        if jnp.issubdtype(t.dtype, jnp.integer):
            t = t.astype(jnp.int32)
        return nnx.merge(graphdef, params)(x, t - 1, dropout_key, labels)

    return apply_fn


def build(config: UNetConfig, key: jax.Array) -> tuple[Callable[..., jax.Array], Params]:
    """The network as a pure function, and its initial weights: (apply_fn, params).

    `apply_fn(params, x, t, dropout_key=None, labels=None) -> eps`, to be jitted by the caller with
    the weights as an argument:

    - params: as returned, or any dict of the same structure and shapes;
    - x: (B, H, W, in_channels) floating; H and W multiples of `config.downsampling`;
    - t: (B,) the paper's 1..T, integer, or floating between them, for which the sinusoids are
      defined too though none was trained. Ho et al.'s networks take t − 1, subtracted here, once;
      t below 1 gives NaN where it is traced;
    - dropout_key: a JAX random key in training; None: no dropout;
    - labels: (B,) integer in 0..num_classes, where num_classes means "no label" (as None does);
      a label out of range gives NaN where it is traced;
    - eps: (B, H, W, in_channels) float32.

    apply_fn raises ValueError or TypeError before tracing when an argument is none of that.

    The initial weights are Ho et al.'s: kernels U(−b, b) with b² = 3 / fan_avg, biases 0, and 0 for
    the last convolution of every residual branch and of the network, so that eps = 0 at first.

    Args:
        config: the network.
        key: a JAX random key for the weights.

    Returns:
        apply_fn and params, a nested dict of float32 arrays with string keys.

    Example:
        >>> config = UNetConfig(
        ...     image_size=8, channels=32, multipliers=(1,), attention_resolutions=()
        ... )
        >>> apply_fn, params = build(config, jax.random.key(0))
        >>> eps = jax.jit(apply_fn)(params, jnp.ones((2, 8, 8, 3)), jnp.array([1, 1000]))
        >>> eps.shape, float(abs(eps).max())
        ((2, 8, 8, 3), 0.0)
    """
    return make_apply(config), _init(_split(config)[1], key)
