"""Many images for evaluation: drawn on all devices, written in shards, continued where they end.

A folder holds `settings.json`, all that determines the images, and uint8 arrays (n, H, W, C) named
`images-00000.npy`. A shard is never written twice: a folder that grows gets further shards, and its
settings remember the earlier totals, at which a shard ends too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import operator
import os
import pathlib
import reprlib
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from ddim_jax.arrays import Array, image_keys
from ddim_jax.pictures.images import to_uint8
from ddim_jax.process import Schedule, as_timesteps, predicts, timesteps
from ddim_jax.process.prediction import Predictor
from ddim_jax.sampling import (
    Method,
    classifier_free_labels,
    clip_x0,
    find_method,
    initial_noise,
    make_sampler,
)
from ddim_jax.storage.files import differences, write_whole
from ddim_jax.version import __version__
from ddim_jax.weights.pretrained import Model

FORMAT = 2  # 1 had the number of shards in their names
SETTINGS = "settings.json"
WHOLE, SPLIT = PartitionSpec(), PartitionSpec("images")
Labels = Literal["cycle"] | int | None


def generate(
    model: Model,
    directory: str | os.PathLike[str],
    num_images: int = 50_000,
    steps: int | Sequence[int] | np.ndarray = 50,
    eta: float = 0.0,
    *,
    method: str = "ddim",
    spacing: str = "linear",
    clip: bool = False,
    labels: Labels = None,
    guidance: float | None = None,
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
      steps: S, the number of network calls per image; or τ itself, strictly increasing ints in
        1..T, such as `timesteps(..., exact=False)` or `optimise_timesteps` give.
      eta: η of the method "ddim": 0 is DDIM, 1 is DDPM.
      method: a name in `METHODS`, such as "adams-bashforth-2" or "ddpm-large", or
        "module:function" of your own.
      spacing: of the S steps; see `timesteps`.
      clip: clip each x̂_0 to [−1, 1].
      labels: of a model with K classes. An int is the class of all images, in 0..K, K for none;
        "cycle" gives image k the class k mod K; None draws without a class, with a warning.
      guidance: the scale w of `classifier_free_labels`, for images with labels: 1 is conditional,
        more is guided. None calls the network once a step, any number twice.
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
    labels, guidance = check_condition(model, labels, guidance)
    tau = _tau(model.schedule, steps, spacing)
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("images",))
    draw = make_draw(model, mesh, tau, find_method(method, eta), clip=clip)
    keys = jax.random.split(jax.random.key(seed))

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
        "labels": labels,
        "guidance": guidance,
        "sha256": _digest({"params": model.params, "alpha_bar": model.schedule.alpha_bar}),
        "model": {
            **model.facts,
            "model": dataclasses.asdict(model.config),
            "prediction": model.prediction.kind,
        },
        "versions": {"ddim_jax": __version__, "jax": jax.__version__},
    }
    settings = _claim(directory, settings)
    mine = list(_shards(settings).items())[jax.process_index() :: jax.process_count()]
    missing = []
    for name, which in mine:
        for leftover in directory.glob(f"{name}.*.tmp"):  # of a call that was killed
            leftover.unlink()
        if (directory / name).exists():
            _open(directory / name, (len(which), *model.image_shape))
        else:
            missing.append((name, which))
    if not missing:
        return directory

    numbers = np.concatenate([np.asarray(n, np.uint32) for _, n in missing])
    whole, split = NamedSharding(mesh, WHOLE), NamedSharding(mesh, SPLIT)
    scale = None if guidance is None else np.float32(guidance)
    params, keys, scale = jax.device_put((model.params, keys, scale), whole)
    classes = functools.partial(label_of, model, labels)
    drawn = _batches(
        lambda batch: draw(params, keys, *jax.device_put((batch, classes(batch)), split), scale),
        numbers,
        batch_size,
        mesh.size,
    )
    held = np.empty((0, *model.image_shape), np.uint8)
    total = sum(len(n) for _, n in mine)
    silent = not progress or jax.process_index() > 0
    with tqdm(total=total, initial=total - len(numbers), unit="image", disable=silent) as bar:
        for images in drawn:
            held = np.concatenate([held, images])
            while missing and len(held) >= len(missing[0][1]):
                name, which = missing.pop(0)
                write_whole(directory / name, _npy(held[: len(which)]))
                held = held[len(which) :]
            bar.update(len(images))
    return directory


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
    shards = _shards(settings)
    if missing := [name for name in shards if not (directory / name).exists()]:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of {len(shards)} shards: {reprlib.repr(missing)}; "
            "generate again with the same settings to draw them"
        )
    shapes = {name: (len(n), *settings["image_shape"]) for name, n in shards.items()}
    for name, shape in shapes.items():
        _open(directory / name, shape)
    return (np.array(_open(directory / name, shape)) for name, shape in shapes.items())


def make_draw(
    model: Model,
    mesh: Mesh,
    tau: np.ndarray,
    method: Method,
    *,
    clip: bool = False,
) -> Callable[..., tuple[Array, Array]]:
    """A jitted `(params, keys, numbers, labels, guidance) → (images, finite)`, spread over a mesh.

    Each device draws its own slice of `numbers` from beginning to end: no collective.

    Args:
      model: the network and its schedule; its weights are not used.
      mesh: n devices on one axis, "images".
      tau, method: as in `sample`.
      clip: as in `generate`.

    Returns:
      A function of the weights, keys (2,) for x_T and the noise, numbers (n·b,) uint32, labels
      (n·b,) int32 or None, and the guidance scale or None, returning images (n·b, H, W, C) uint8,
      and whether each was finite (n·b,).

    Raises:
      ValueError: as `sample`.
    """
    sampler = make_sampler(conditioned(model, clip), tau, method=method)
    noisy = method(model.schedule, tau).steps.sigma is not None

    def draw(
        params: Any, keys: Array, numbers: Array, labels: Array | None, guidance: Array | None
    ) -> tuple[Array, Array]:
        x_T = initial_noise(keys[0], numbers, model.image_shape)
        key = image_keys(keys[1], numbers) if noisy else None
        x_0 = sampler(x_T, key, params=params, labels=labels, guidance=guidance)
        return to_uint8(x_0), jnp.isfinite(x_0).all((1, 2, 3))

    specs = (WHOLE, WHOLE, SPLIT, SPLIT, WHOLE)
    spread = jax.shard_map(draw, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)
    return jax.jit(spread, in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))


def conditioned(model: Model, clip: bool = False) -> Model:
    """The model whose apply_fn also takes labels and a guidance scale, both of them traced.

    Args:
      model: see `load_model`.
      clip: clip each x̂_0 to [−1, 1].

    Returns:
      A `Model` with apply_fn (params, x, t, labels=None, guidance=None), for `make_sampler`; labels
      (B,) int32 or None for none, guidance a scale or None for labels alone.

    Example:
      >>> import ddim_jax as ddim
      >>> model = conditioned(ddim.load_model("digits"))
      >>> sampler = ddim.make_sampler(model, [10, 1000])
      >>> sampler(jnp.ones((1, *model.image_shape)), labels=None).shape
      (1, 8, 8, 1)
    """

    def apply_fn(
        params: Any, x: Array, t: Array, labels: Array | None = None, guidance: Any = None
    ) -> Array:
        if labels is None:
            return model.apply_fn(params, x, t)

        def network(x: Array, t: Array, labels: Array) -> Array:
            return model.apply_fn(params, x, t, labels=labels)

        if guidance is None:
            return network(x, t, labels)
        none = jnp.int32(model.config.num_classes)
        return classifier_free_labels(network, labels, none, guidance)(x, t)

    taking = model._replace(apply_fn=Predictor(apply_fn, model.prediction))
    return predicts(taking, x0_fn=clip_x0(1.0)) if clip else taking


def check_condition(
    model: Model, labels: Labels, guidance: float | None
) -> tuple[Labels, float | None]:
    """`labels` and `guidance` as `generate` takes them, checked against the model.

    Raises:
      ValueError: the model has no classes, there is no such class, or there is nothing to guide.
    """
    num_classes = model.config.num_classes
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if num_classes is None and (labels, guidance) != (None, None):
        raise ValueError(
            f"the model has no classes: labels and guidance must be None, got {labels!r} and "
            f"{guidance!r}"
        )
    if num_classes is None:
        return None, None
    if labels is None and guidance is not None:
        raise ValueError("guidance is towards a class: give labels (--label, --cycle-labels) too")
    if labels is None:
        warnings.warn(
            f"the model has {num_classes} classes and draws without any: choose labels=0..."
            f"{num_classes - 1} or 'cycle' (--label, --cycle-labels), or {num_classes}, which "
            "means none",
            stacklevel=3,
        )
    elif labels != "cycle" and labels not in range(num_classes + 1):
        raise ValueError(
            f"labels must be a class in 0..{num_classes - 1}, {num_classes} for none, or 'cycle', "
            f"got {labels!r}"
        )
    else:
        labels = labels if labels == "cycle" else int(labels)
    return labels, None if guidance is None else float(guidance)


def label_of(model: Model, labels: Labels, numbers: np.ndarray) -> np.ndarray | None:
    """The classes (n,) int32 of the images of these numbers, None where labels is None."""
    if labels is None:
        return None
    each = numbers % (model.config.num_classes or 1) if labels == "cycle" else labels
    return np.broadcast_to(each, numbers.shape).astype(np.int32)


def check_sizes(num_images: int, batch_size: int, shard_size: int) -> None:
    """Raises ValueError where `generate` has no use for these."""
    if not 1 <= num_images < 2**31:
        raise ValueError(f"num_images must be in 1..2**31 - 1, got {num_images}")
    if batch_size < 1 or shard_size < 1 or shard_size % batch_size:
        raise ValueError(
            "batch_size must divide shard_size, so that no block is cut, got "
            f"{batch_size} and {shard_size}"
        )


def wait(arrays: Any, bar: tqdm | None = None) -> None:
    """Waits for arrays such that a signal is heard at once, and the bar's clock goes on."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
        time.sleep(0.01)
        if bar is not None and sys.stderr.isatty() and time.time() > bar.last_print_t + 1:
            bar.last_print_t = time.time()
            bar.refresh()


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def _tau(schedule: Schedule, steps: Any, spacing: str) -> np.ndarray:
    if np.ndim(steps) == 0:
        steps = _whole("steps, where it is S and not a list of timesteps,", steps)
        return timesteps(schedule.num_steps, steps, spacing, schedule=schedule)
    if spacing != "linear":
        raise ValueError(f"give steps=S and a spacing, or steps=tau alone, got {spacing!r} and tau")
    return as_timesteps(steps, schedule.num_steps)


def _batches(
    draw: Callable[[np.ndarray], tuple[Array, Array]], numbers: np.ndarray, size: int, devices: int
) -> Iterator[np.ndarray]:
    """The images of `numbers`, which ascend; each batch is fetched while the next is computed.

    A batch is a block of `size` consecutive numbers for each device, whole blocks always: image k
    has the same neighbours whatever was drawn before. What is not among `numbers` is dropped.
    """
    computing: deque[tuple[np.ndarray, Any]] = deque()

    def fetch() -> np.ndarray:
        batch, result = computing.popleft()
        wait(result)
        images, finite = jax.device_get(result)
        wanted = np.isin(batch, numbers)
        _check_finite(batch[wanted & ~finite])
        return images[wanted]

    blocks = np.unique(numbers // np.uint32(size))
    padding = blocks[-1] + np.arange(1, 1 + -len(blocks) % devices, dtype=np.uint32)
    blocks = np.concatenate([blocks, padding]).reshape(-1, devices, 1)
    for batch in (blocks * np.uint32(size) + np.arange(size, dtype=np.uint32)).reshape(
        -1, devices * size
    ):
        computing.append((batch, draw(batch)))
        if len(computing) > 1:
            yield fetch()
    yield fetch()


def _shards(settings: dict[str, Any]) -> dict[str, range]:
    """File name → the numbers of its images."""
    total, size = settings["num_images"], settings["shard_size"]
    ends = sorted({*range(size, total, size), *settings.get("earlier", []), total})
    of = f"-of-{len(ends):05d}" if settings["format"] == 1 else ""
    return {
        f"images-{i:05d}{of}.npy": range(start, end)
        for i, (start, end) in enumerate(zip([0, *ends], ends))
    }


def _digest(arrays: Any) -> str:
    """SHA-256 of a tree's names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _claim(directory: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes the folder and its settings, or checks that they are the same, or lets it grow."""
    settings = json.loads(json.dumps(settings, allow_nan=False))  # as they will be read
    path = directory / SETTINGS
    directory.mkdir(parents=True, exist_ok=True)
    # Listed before looking for settings, which another process may be writing just now.
    names = {p.name for p in directory.iterdir() if p.suffix != ".tmp"}
    there = read_settings(directory) if path.exists() else None
    allowed = set() if there is None else {SETTINGS, *_shards(there)}
    if there is not None:
        settings = _grown(directory, there, settings)
        allowed |= set(_shards(settings))  # another process may have begun to let it grow
    if foreign := sorted(names - allowed):
        raise ValueError(
            f"{directory} holds files that are not of these images: {reprlib.repr(foreign)}; "
            "choose an empty folder"
        )
    if there != settings:
        write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())
    return settings


def _grown(directory: pathlib.Path, there: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of the folder with as many images as are asked for now."""
    had, wanted = there["num_images"], now["num_images"]
    earlier = [*there.get("earlier", []), *([had] if had < wanted else [])]
    if differ := differences(
        {**there, "num_images": max(had, wanted), "earlier": earlier}, {**now, "earlier": earlier}
    ):
        more = [f"(no image is removed: ask for {had} or more)"] if had > wanted else []
        raise ValueError(
            "\n".join(
                [f"{directory} holds images of other settings; choose another:", *differ, *more]
            )
        )
    return {**now, "earlier": earlier}


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a folder of `generate`: "num_images", "image_shape", "tau", "model", ….

    Raises:
      FileNotFoundError: it is no such folder.
      ValueError: `settings.json` is damaged, or from a newer version.
    """
    path = pathlib.Path(directory) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no folder of generated images: no {SETTINGS}")
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
        newer = settings["format"] > FORMAT
        if not newer:
            _shards(settings)
            tuple(settings["image_shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not of ddim_jax: {error!r}") from error
    if newer:
        raise ValueError(
            f"{path} has format {settings['format']}, this version reads up to {FORMAT}: "
            "update ddim_jax"
        )
    return settings


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


def _check_finite(bad: np.ndarray) -> None:
    if len(bad):
        raise FloatingPointError(
            f"{len(bad)} images of the batch are not finite, numbers {reprlib.repr(bad.tolist())}: "
            "the model may be damaged; try clip=True, smaller eta or more steps"
        )


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
