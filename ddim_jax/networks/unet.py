"""The U-Net of Ho et al. (2020) and those after it, with the module names of the DDIM authors.

The layers are Flax NNX; at the border there are only a pure function and a dict of arrays.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddim_jax.networks.blocks import (
    AttnBlock,
    GroupNorm,
    Resample,
    ResnetBlock,
    conv3,
    in_order,
    middle,
    numbered,
    rows,
    split,
    timestep_embedding,
    two_layers,
)
from ddim_jax.networks.config import Params, UNetConfig
from ddim_jax.networks.inputs import check_inputs, check_params

ZERO_INIT = ("conv2", "proj_out", "conv_out")  # every residual branch, and the output, starts at 0
TABLES = ("label_embedding", "time_table")  # rows of unit variance


class UNet(nnx.Module):
    """The network, all weights zero; `down.0.block.1.conv1` and the rest are the authors' names."""

    def __init__(self, config: UNetConfig):
        self.config = config
        temb, widths = config.embedding_width, config.widths
        (down_attn, up_attn), (down_ways, up_ways) = config.attended, config.resampling
        skips = [config.channels]  # widths of what the way down leaves for the way up

        def level(inputs: list[int], c: int, attended: bool, heads: int) -> nnx.Dict:
            attn = inputs if attended else []
            return nnx.Dict(
                block=numbered([ResnetBlock(c_in, c, config) for c_in in inputs]),
                attn=numbered([AttnBlock(c, config, heads, config.norm_groups) for _ in attn]),
            )

        self._embeddings(temb)
        self.conv_in = conv3(config.in_channels, config.channels, config)

        down = []
        for i, c in enumerate(widths):
            inputs = [skips[-1]] + [c] * (config.num_blocks - 1)
            down.append(level(inputs, c, down_attn[i], config.num_heads))
            skips += [c] * config.num_blocks
            if i < len(down_ways):
                down[-1].downsample = Resample("down", down_ways[i], c, config)
                skips.append(c)
        self.down = numbered(down)

        self.mid = middle(widths[-1], config)

        up, below = [], widths[-1]
        for i, c in reversed([*enumerate(widths)]):
            inputs = [h + skips.pop() for h in [below] + [c] * config.num_blocks]
            up.append(level(inputs, c, up_attn[i], config.num_heads_up or config.num_heads))
            if i > 0:
                up[-1].upsample = Resample("up", up_ways[i - 1], c, config)
            below = c
        self.up = numbered(up[::-1])

        self.norm_out = GroupNorm(widths[0], config.norm_groups, config.norm_eps)
        self.conv_out = conv3(widths[0], config.out_channels or config.in_channels, config)

    def _embeddings(self, temb: int) -> None:
        """The layers of time and label, all weights of the same width `temb`."""
        config = self.config
        sinusoids = config.sinusoids or config.channels
        self.temb = two_layers(sinusoids, temb, config)
        if config.time_table is not None:
            self.time_table = nnx.Param(jnp.zeros((config.time_table, sinusoids), jnp.float32))
        if config.num_classes is not None:  # the last row stands for "no label"
            shape = (config.num_classes + config.null_label, temb)
            self.label_embedding = nnx.Param(jnp.zeros(shape, jnp.float32))
        if config.class_embedding == "timestep":
            self.label = two_layers(sinusoids, temb, config)

    def embedding(self, index: jax.Array, labels: jax.Array | None) -> jax.Array:
        """(B, embedding_width), of time and label."""
        config = self.config
        if config.time_scale != 1:
            index = index.astype(jnp.float32) * config.time_scale

        def embedded(layers: nnx.Dict, index: jax.Array) -> jax.Array:
            if config.time_table is None:
                dim = config.sinusoids or config.channels
                h = timestep_embedding(index, dim, config.frequency_shift, config.cosine_first)
            else:
                h = rows(self.time_table, index)
            first, second = in_order(layers["dense"])
            return second(nnx.swish(first(h)))

        temb = embedded(self.temb, index)
        if labels is None:
            return temb
        if config.class_embedding == "timestep":
            return temb + embedded(self.label, labels)
        if config.class_embedding == "table":
            labels = rows(self.label_embedding, labels)
        return temb + labels.astype(temb.dtype)

    def __call__(
        self,
        x: jax.Array,
        index: jax.Array,
        dropout_key: jax.Array | None,
        labels: jax.Array | None,
    ) -> jax.Array:
        residual = self.residual(self.embedding(index, labels), dropout_key)
        skips, h = self.way_down(x, residual)

        for level in reversed(in_order(self.up)):
            for i, block in enumerate(in_order(level["block"])):
                h = residual(block, h, skips.pop())
                h = level["attn"][str(i)](h) if level["attn"] else h
            if "upsample" in level:
                h = level["upsample"](h, residual)

        return self.conv_out(self.norm_out(h, then=nnx.swish)).astype(jnp.float32)

    def residual(self, temb: jax.Array, dropout_key: jax.Array | None) -> Callable[..., jax.Array]:
        """What runs the residual blocks, each with a key of its own."""
        fold, numbers = jax.random.fold_in, itertools.count()
        keys = (None if dropout_key is None else fold(dropout_key, i) for i in numbers)

        def run(block: Any, *parts: jax.Array) -> jax.Array:
            called = jax.checkpoint(_block) if self.config.remat else _block
            return called(block, parts, temb, next(keys))

        return run

    def way_down(
        self, x: jax.Array, residual: Callable[..., jax.Array]
    ) -> tuple[list[jax.Array], jax.Array]:
        """What is left for the way up, and what the middle makes of the last of it."""
        x = 2 * x - 1 if self.config.centre_input else x
        skips = [self.conv_in(x.astype(jnp.dtype(self.config.dtype)))]
        for level in in_order(self.down):
            for i, block in enumerate(in_order(level["block"])):
                h = residual(block, skips[-1])
                skips.append(level["attn"][str(i)](h) if level["attn"] else h)
            if "downsample" in level:
                skips.append(level["downsample"](skips[-1], residual))

        h = skips[-1]
        if "block_1" in self.mid:
            h = residual(self.mid["block_1"], h)
            h = self.mid["attn_1"](h) if "attn_1" in self.mid else h
            h = residual(self.mid["block_2"], h)
        return skips, h


@jax.jit
def _block(block: Any, *args: Any) -> jax.Array:
    """Traced and written down once for all blocks of the same shapes, in whatever program."""
    return block(*args)


@functools.cache
def _split(config: UNetConfig) -> tuple[Any, Params]:
    return split(lambda: UNet(config))


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


def computed(params: Params, config: UNetConfig) -> Params:
    """The weights as the network computes with them: those of a product in `config.dtype`.

    What comes out is the same, but a loop that is given these converts nothing in its body. A
    gradient through such a loop is summed over its steps in `config.dtype`.

    Args:
        params: of the network.
        config: the network.

    Returns:
        Such a tree. Norms and tables stay as they are.

    Example:
        >>> config = UNetConfig(dtype="bfloat16")
        >>> params = jax.eval_shape(lambda p: computed(p, config), abstract_params(config))
        >>> params["conv_in"]["bias"].dtype, params["norm_out"]["bias"].dtype
        (dtype(bfloat16), dtype('float32'))
    """
    if "kernel" in params:
        return {name: jnp.asarray(leaf, config.dtype) for name, leaf in params.items()}
    return {
        name: computed(part, config) if isinstance(part, dict) else part
        for name, part in params.items()
    }


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
        variance = 1 if name in TABLES else 1 / fan_avg
        return jnp.asarray(uniform * np.float32(math.sqrt(3 * variance)))

    return jax.tree_util.tree_map_with_path(initial, abstract)


@functools.cache
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

    @jax.jit  # traced once for all programs that it is part of
    def network(params: Params, *args: Any) -> jax.Array:
        return nnx.merge(graphdef, params)(*args)

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
        return network(params, x, t - 1, dropout_key, labels)

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
