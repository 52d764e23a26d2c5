"""Classifiers of noisy images, as guided-diffusion trained them, for guidance."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array
from ddim_jax.networks.config import Params
from ddim_jax.storage.weights_file import read_safetensors
from ddim_jax.weights.containers import find_state
from ddim_jax.weights.openai_config import MULTIPLIERS, unet_of
from ddim_jax.weights.openai_flags import (
    DEFAULTS,
    HEAD_CHANNELS,
    PASSED_OVER,
    Flags,
    check_flags,
)
from ddim_jax.weights.openai_format import find_flags, openai_name, split_heads
from ddim_jax.weights.openai_published import published
from ddim_jax.weights.state_dict import fill
from ddim_jax.weights.torch_files import is_torch_file, load_torch

CALLED = {  # what the flags of a U-Net are called of a classifier
    **{"num_channels": "classifier_width", "num_res_blocks": "classifier_depth"},
    **{
        name: f"classifier_{name}"
        for name in ("attention_resolutions", "use_scale_shift_norm", "resblock_updown")
    },
}
OF_BOTH = ("image_size", "diffusion_steps", "noise_schedule", "rescale_timesteps", "repository")
HEADS = {  # of each pool: ours and their names
    "attention": {
        **{"norm_out": "out.0", "positions": "out.2.positional_embedding", "q": "out.2.q"},
        **{"k": "out.2.k", "v": "out.2.v", "dense": "out.2.c_proj"},
    },
    "adaptive": {"norm_out": "out.0", "dense": "out.3"},
    "spatial": {"hidden": "out.0", "dense": "out.2"},
    "spatial_v2": {"hidden": "out.0", "norm_hidden": "out.1", "dense": "out.3"},
}


class NoisyClassifier(NamedTuple):
    """A classifier of noisy images.

    Example:
      >>> import ddim_jax as ddim
      >>> from ddim_jax.networks.classifier import ClassifierConfig, make_classifier
      >>> from ddim_jax.networks.classifier import abstract_classifier
      >>> from ddim_jax.networks.config import UNetConfig
      >>> encoder = UNetConfig(8, channels=32, multipliers=(1,), attention_resolutions=())
      >>> config = ClassifierConfig(encoder, num_classes=4, pool="adaptive")
      >>> zeros = jax.tree.map(lambda a: jnp.zeros(a.shape), abstract_classifier(config))
      >>> untrained = NoisyClassifier(make_classifier(config), zeros, config)
      >>> x, t = jnp.ones((2, 8, 8, 3)), jnp.array([1, 500])
      >>> untrained(x, t).round(2)[0].tolist()  # log 1/4
      [-1.3..., -1.3..., -1.3..., -1.3...]
      >>> schedule = ddim.linear_schedule(1000)
      >>> denoise = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.25)
      >>> towards_2 = untrained.log_prob(jnp.array([2, 2]))
      >>> guided = ddim.classifier(denoise, towards_2, schedule, scale=1.0)
      >>> ddim.sample(guided, x, schedule, [1, 1000]).shape
      (2, 8, 8, 3)
    """

    apply_fn: Callable[[Params, Array, Array], Array]  # (params, x, t) → logits (B, K)
    params: Params
    config: Any  # a ClassifierConfig

    def __call__(self, x: Array, t: Array) -> Array:
        """(B, K) log p(y | x_t) of every class."""
        return jax.nn.log_softmax(self.apply_fn(self.params, x, t))

    def log_prob(self, labels: Any) -> Callable[[Array, Array], Array]:
        """(x, t) → (B,) log p(y | x_t) of these classes (B,), for `classifier` of the guidance.

        Raises:
          ValueError: labels are not (B,) integers in 0..K − 1.
        """
        y = labels if isinstance(labels, jax.Array) else np.asarray(labels)
        classes = self.config.num_classes
        if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"labels must be (B,) integers, got {y.dtype}{y.shape}")
        if not isinstance(y, jax.core.Tracer) and y.size and not 0 <= y.min() <= y.max() < classes:
            raise ValueError(f"labels must be in 0..{classes - 1}, got {y.min()}..{y.max()}")

        def chosen(x: Array, t: Array) -> Array:
            if x.shape[:1] != y.shape:
                raise ValueError(f"got labels of {y.shape[0]} images and {x.shape[0]} images")
            return jnp.take_along_axis(self(x, t), jnp.asarray(y)[:, None], axis=1)[:, 0]

        return chosen


def load_classifier(
    source: str | os.PathLike[str], *, flags: Flags | None = None
) -> NoisyClassifier:
    """Load a classifier of noisy images that guided-diffusion trained.

    Args:
      source: a PyTorch checkpoint or a .safetensors file with their names.
      flags: theirs, as `load_model` takes them: those that begin with classifier_, image_size and
        those of the diffusion, whose t it was trained with. Published files need none.

    Returns:
      A `NoisyClassifier`; its `log_prob(labels)` is what `ddim.classifier` guides by.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or no classifier, or flags contradict each other or the shapes.

    Example:
      >>> load_classifier("64x64_classifier.pt")
      Traceback (most recent call last):
      FileNotFoundError: no file 64x64_classifier.pt
    """
    path = pathlib.Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    given = published(path.name) if flags is None else find_flags(flags)
    try:
        if given is None:
            raise ValueError("it is no published classifier: pass flags={...} of its training")
        state, _ = find_state(
            load_torch(path) if is_torch_file(path) else read_safetensors(path)[0]
        )
        return read_classifier(state, given)
    except (ValueError, TypeError, LookupError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_classifier(state: Mapping[str, np.ndarray], given: Mapping[str, Any]) -> NoisyClassifier:
    """The classifier of a state dict with guided-diffusion's names.

    Args:
      state: flat dict of arrays.
      given: flags, see `load_classifier`.

    Raises:
      ValueError: as there.
    """
    from ddim_jax.networks import classifier  # here, as flax takes half a second to import

    flags, pool, classes = _flags(state, given)
    encoder = unet_of(flags, state["input_blocks.0.0.weight"].shape[1])
    config = classifier.ClassifierConfig(encoder, classes, pool)
    split = split_heads(state, encoder, False)
    for name in [name for name in split if name.startswith("out.2.qkv_proj.")]:
        array, end = split.pop(name), name.rpartition(".")[2]
        split |= {f"out.2.{letter}.{end}": a for letter, a in zip("qkv", np.split(array, 3))}
    if "out.2.positional_embedding" in split:
        split["out.2.positional_embedding"] = split["out.2.positional_embedding"].T

    rename = partial(classifier_name, config)
    params = fill(classifier.abstract_classifier(config), split, rename)
    return NoisyClassifier(classifier.make_classifier(config), jax.device_put(params), config)


def classifier_name(config: Any, name: str) -> str:
    """The name of a tensor of a `ClassifierConfig` in theirs, where qkv_proj is q, k and v."""
    head, heads = name.partition(".")[0], HEADS[config.pool]
    if head in heads:
        return heads[head] + name.removeprefix(head)
    return openai_name(name, config.encoder)


def _flags(
    state: Mapping[str, np.ndarray], given: Mapping[str, Any]
) -> tuple[dict[str, Any], str, int]:
    """The flags of its U-Net, the pool, and K; checked against the shapes."""
    if any(name.startswith("output_blocks.") for name in state) or "out.0.weight" not in state:
        raise ValueError(
            "not the names of a classifier of guided-diffusion; their diffusion models are read by "
            "load_model"
        )
    theirs = {ours: given[name] for ours, name in CALLED.items() if name in given}
    unknown = {n: v for n, v in given.items() if n not in DEFAULTS and n not in PASSED_OVER}
    own = {name: given[name] for name in (*OF_BOTH, "classifier_pool") if name in given}
    defaults = {ours: DEFAULTS[name] for ours, name in CALLED.items()}
    asked: dict[str, Any] = {**defaults, "repository": "guided-diffusion", **own, **theirs}
    said = _shapes_say(state, asked["num_res_blocks"])
    try:
        flags = check_flags(
            asked | unknown | {"channel_mult": said["channel_mult"], "num_heads": 1}
        )
        flags |= {"num_head_channels": HEAD_CHANNELS}
    except ValueError as error:
        raise ValueError(_in_their_words(str(error))) from error
    size, multipliers = flags["image_size"], flags["channel_mult"]
    strides = {size // resolution for resolution in flags["attention_resolutions"]}
    told = flags | {
        "attention_resolutions": tuple(i for i in range(len(multipliers)) if 2**i in strides),
        "channel_mult": MULTIPLIERS.get(size, multipliers),
    }
    wrong = [
        f"{name} is {told[name]}, the weights say {value}"
        for name, value in said.items()
        if name in told and told[name] != value
    ]
    pixels = said.pop("pixels", None)
    if pixels is not None and pixels != (size // 2 ** (len(multipliers) - 1)) ** 2:
        wrong.append(
            f"image_size is {size}, the weights say "
            f"{round(max(pixels, 0) ** 0.5) * 2 ** (len(multipliers) - 1)}"
        )
    if wrong:
        lines = ["flags contradict the shapes of the weights:", *map(_in_their_words, wrong)]
        raise ValueError("\n  ".join(lines))
    return flags, said["classifier_pool"], said["classes"]


def _shapes_say(state: Mapping[str, np.ndarray], depth: Any) -> dict[str, Any]:
    """What the shapes say, if a level has `depth` blocks, which they do not."""
    numbers = {int(m[1]) for m in (re.match(r"input_blocks\.(\d+)\.", n) for n in state) if m}
    try:
        per = int(depth) + 1
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"classifier_depth must be a whole number, got {depth!r}") from None
    try:
        levels, rest = divmod(len(numbers), per)
        if rest or per < 2:
            raise ValueError(
                f"classifier_depth {depth} does not go with {len(numbers)} input blocks, a whole "
                "number of levels with one more than that each"
            )
        width = state["time_embed.0.weight"].shape[1]
        widths = [
            state[f"input_blocks.{1 + i * per}.0.out_layers.3.weight"].shape[0]
            for i in range(levels)
        ]
        time = state["middle_block.0.emb_layers.1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"not a classifier of guided-diffusion of classifier_depth {depth}: no tensor {error}"
        ) from error
    place = state.get("out.2.positional_embedding")
    if place is not None:
        pool, last = "attention", "out.2.c_proj.weight"
    elif state.get("out.2.weight") is not None:
        pool, last = "spatial", "out.2.weight"
    else:
        pool = "spatial_v2" if state["out.0.weight"].ndim == 2 else "adaptive"
        last = "out.3.weight"
    if last not in state:
        raise ValueError(f"not a classifier of guided-diffusion: no tensor {last!r}")
    said = {
        "num_channels": width,
        "channel_mult": tuple(w // width if w % width == 0 else w / width for w in widths),
        "attention_resolutions": tuple(
            i for i in range(levels) if f"input_blocks.{1 + i * per}.1.qkv.weight" in state
        ),
        "use_scale_shift_norm": time == 2 * widths[-1],
        "classifier_pool": pool,
        "classes": state[last].shape[0],
    }
    if levels > 1:
        said["resblock_updown"] = f"input_blocks.{per}.0.op.weight" not in state
    return said | ({} if place is None else {"pixels": place.shape[1] - 1})


def _in_their_words(text: str) -> str:
    for ours, name in CALLED.items():
        text = re.sub(rf"(?<!_)\b{ours}\b", name, text)
    return text
