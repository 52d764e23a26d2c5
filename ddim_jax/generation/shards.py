"""Many images for evaluation: drawn on all devices, written in shards, continued where they end.

A folder holds `settings.json`, all that determines the images, and uint8 arrays (n, H, W, C) named
`images-00000.npy`. A shard is never written twice: a folder that grows gets further shards, and its
settings remember the earlier totals, at which a shard ends too.
"""

from __future__ import annotations

import hashlib
import io
import operator
import os
import pathlib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddim_jax.generation.condition import Labels, condition
from ddim_jax.generation.drawing import batches_of, make_drawer
from ddim_jax.generation.settings import FORMAT, claim, read_settings, shards_of
from ddim_jax.process import as_timesteps, timesteps
from ddim_jax.sampling import find_method
from ddim_jax.storage.files import write_whole
from ddim_jax.version import __version__
from ddim_jax.weights import Model
from ddim_jax.weights.model import Stored, own_tau, stored

AS_STORED = "as-stored"  # the method of `model.sampler`


def generate(
    model: Model,
    directory: str | os.PathLike[str],
    num_images: int = 50_000,
    steps: int | Sequence[int] | np.ndarray | None = None,
    eta: float = 0.0,
    *,
    method: str = "ddim",
    spacing: str = "linear",
    clip: bool = False,
    labels: Labels = None,
    guidance: float | None = None,
    guidance_interval: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 100,
    shard_size: int = 1000,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> pathlib.Path:
    """Draw `num_images` images into a folder of shards; called again, it goes on.

    Image k depends on (weights, settings, seed, k) alone: every device draws blocks of `batch_size`
    consecutive images, and each block is one program on one input whatever the number of devices
    and processes. Another `batch_size` changes float32 rounding, so a pixel by 1 at times.

    A shard appears whole or not at all; finished ones are skipped. With several processes, p of P
    writes the shards p, p + P, … on its own devices, and none waits for another.

    Args:
      model: see `load_model`.
      directory: a new or empty folder, or one that an earlier call with the same settings began.
      num_images: ≥ 1. More than the folder has make it grow: those that are there stay, and the
        further ones are what one call would have drawn.
      steps: S, the number of network calls per image, 50 by default, or what a distilled model
        says; or τ itself, strictly increasing ints in
        1..T, such as `timesteps(..., exact=False)` or `optimise_timesteps` give.
      eta: η of the methods "ddim" and "dpm-solver-2": 0 adds no noise, 1 is DDPM's.
      method: a name in `METHODS`, such as "dpm-solver-2" or "ddpm-large", or
        "module:function" of your own; or "as-stored", which is how `model.sampler(steps)` draws.
      spacing: of the S steps; see `timesteps`.
      clip: clip each x̂_0 to [−1, 1].
      labels: of a model with K classes: a class by number or name, or a list of them, such that
        image k has the k-th in turn; "all" for all K in turn; "none", K or None for none.
      guidance: the scale w of `classifier_free_labels`, for images with labels: 1 is conditional,
        more is guided. None calls the network once a step, any number twice.
      guidance_interval: (lo, hi): guide where lo ≤ t ≤ hi only; t is in 1..T.
      seed: of x_T and of the noise; image k is image k of `ddim-jax sample` with this seed.
      batch_size: images at a time on each device; must divide `shard_size`.
      shard_size: images in a file.
      devices: to draw on; all of this process by default.
      progress: whether to show a bar with images/s (needs tqdm).

    Returns:
      The folder; `iter_shards` reads it.

    Raises:
      ValueError: an argument is out of range, or the folder holds other settings, more images,
        other files or a damaged shard. No image is overwritten.
      FloatingPointError: images are not finite; the message numbers them.

    Example:
      >>> import ddim_jax as ddim, tempfile
      >>> model = ddim.load_model("digits")
      >>> folder = generate(
      ...     model, tempfile.mkdtemp(), 3, steps=2, batch_size=2, shard_size=2, progress=False
      ... )
      >>> [shard.shape for shard in iter_shards(folder)]
      [(2, 8, 8, 1), (1, 8, 8, 1)]
    """
    num_images, batch_size, shard_size, seed = (
        _whole(name, value)
        for name, value in (("num_images", num_images), ("batch_size", batch_size),
                            ("shard_size", shard_size), ("seed", seed))
    )  # fmt: skip
    eta, clip = float(eta), bool(clip)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1, got {seed}")
    check_sizes(num_images, batch_size, shard_size)
    steps = 50 if steps is None and model.tau is None else steps
    asked = condition(model, labels, guidance, guidance_interval)
    if method == AS_STORED:
        told, tau, chosen = _as_stored(model, steps, eta, spacing, clip)
    else:
        told, chosen = model, find_method(method, eta)
        tau = _tau(model, steps, spacing, method == "ddim" and not eta)
    draw, spread = make_drawer(told, tau, chosen, asked, seed, clip=clip, devices=devices)

    directory = pathlib.Path(directory)
    settings = {
        "format": FORMAT,
        "num_images": num_images,
        "earlier": [],  # smaller num_images that the folder has had
        "shard_size": shard_size,
        "image_shape": list(model.image_shape),
        "seed": seed,
        "eta": eta,
        "tau": tau.tolist(),
        "method": method,
        "clip": clip,
        "labels": asked.labels[0] if asked.labels and len(asked.labels) == 1 else asked.labels,
        "guidance": asked.guidance,
        **({"guidance_interval": asked.interval} if asked.interval else {}),
        "sha256": _digest({"params": model.params, "alpha_bar": model.schedule.alpha_bar}),
        "model": {
            **model.facts,
            "model": model.config.facts(),
            **model.prediction.facts(),
        },
        "versions": {"ddim_jax": __version__, "jax": jax.__version__},
    }
    settings = claim(directory, settings)
    mine = list(shards_of(settings).items())[jax.process_index() :: jax.process_count()]
    missing = _missing(directory, mine, model.image_shape)
    if not missing:
        return directory

    numbers = np.concatenate([np.asarray(n, np.uint32) for _, n in missing])
    drawn = batches_of(draw, numbers, batch_size, spread)
    held = np.empty((0, *model.image_shape), np.uint8)
    total = sum(len(n) for _, n in mine)
    silent = not progress or jax.process_index() > 0
    with tqdm(total=total, initial=total - len(numbers), unit="image", disable=silent) as bar:
        for images, *_ in drawn:
            held = np.concatenate([held, images])
            while missing and len(held) >= len(missing[0][1]):
                name, which = missing.pop(0)
                write_whole(directory / name, _npy(held[: len(which)]))
                held = held[len(which) :]
            bar.update(len(images))
    return directory


def _as_stored(
    model: Model,
    steps: int | Sequence[int] | np.ndarray | None,
    eta: float,
    spacing: str,
    clip: bool,
) -> Stored:
    """How the model says that it is drawn, with τ as an array."""
    if (spacing, clip) != ("linear", False):
        raise ValueError(f"{AS_STORED!r} takes spacing and clip from the model: leave them out")
    given: dict[str, Any] = {"steps" if steps is None or np.ndim(steps) == 0 else "tau": steps}
    told = stored(model, **given, eta=eta or None)
    return told._replace(tau=as_timesteps(told.tau, model.schedule.num_steps))


def iter_shards(directory: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The images of a finished folder, one shard at a time.

    Args:
      directory: a folder of `generate`.

    Returns:
      An iterator of uint8 arrays (n, H, W, C), in the order of the images' numbers.

    Raises:
      FileNotFoundError: it is no such folder, or shards are missing; the message names them.
      ValueError: a shard or `settings.json` is damaged, or from a newer version.
    """
    directory = pathlib.Path(directory)
    settings = read_settings(directory)
    shards = shards_of(settings)
    if missing := [name for name in shards if not (directory / name).exists()]:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of {len(shards)} shards: {reprlib.repr(missing)}; "
            "generate again with the same settings to draw them"
        )
    shapes = {name: (len(n), *settings["image_shape"]) for name, n in shards.items()}
    for name, shape in shapes.items():
        _open(directory / name, shape)
    return (np.array(_open(directory / name, shape)) for name, shape in shapes.items())


def check_sizes(num_images: int, batch_size: int, shard_size: int) -> None:
    """Raises ValueError where `generate` has no use for these."""
    if not 1 <= num_images < 2**31:
        raise ValueError(f"num_images must be in 1..2**31 - 1, got {num_images}")
    if batch_size < 1 or shard_size < 1 or shard_size % batch_size:
        raise ValueError(
            "batch_size must divide shard_size, so that no block is cut, got "
            f"{batch_size} and {shard_size}"
        )


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def _tau(model: Model, steps: Any, spacing: str, usual: bool) -> np.ndarray:
    schedule = model.schedule
    if np.ndim(steps) == 0:
        own = own_tau(model, steps, usual and spacing == "linear")
        if own is not None:
            return own
        steps = _whole("steps, where it is S and not a list of timesteps,", steps)
        return timesteps(schedule.num_steps, steps, spacing, schedule=schedule)
    if spacing != "linear":
        raise ValueError(f"give steps=S and a spacing, or steps=tau alone, got {spacing!r} and tau")
    return as_timesteps(steps, schedule.num_steps)


def _missing(
    directory: pathlib.Path, shards: list[tuple[str, range]], shape: tuple[int, ...]
) -> list[tuple[str, range]]:
    """The shards that are yet to be drawn; ValueError where one that is there is damaged."""
    missing = []
    for name, which in shards:
        for leftover in directory.glob(f"{name}.*.tmp"):  # of a call that was killed
            leftover.unlink()
        if (directory / name).exists():
            _open(directory / name, (len(which), *shape))
        else:
            missing.append((name, which))
    return missing


def _digest(arrays: Any) -> str:
    """SHA-256 of a tree's names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _open(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """A shard, mapped into memory; ValueError if it is not whole."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError(f"it is {array.dtype}{array.shape}, wanted uint8{shape}")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; move it away, and generate again to draw it anew"
        ) from error
    return array


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
