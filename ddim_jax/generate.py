"""Many images for evaluation: drawn on all devices, written in shards, continued where they end.

A folder holds `settings.json`, all that determines the images, and uint8 arrays (n, H, W, C) named
`images-00000-of-00050.npy`. The name carries the total, so the folder says itself what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import operator
import os
import pathlib
import reprlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import ddim_jax
from ddim_jax._files import differences, write_whole
from ddim_jax.arrays import Array
from ddim_jax.sampling.clipping import clip_x0
from ddim_jax.images import to_uint8
from ddim_jax.pretrained import Model
from ddim_jax.sampling import initial_noise, make_sampler
from ddim_jax.process.schedule import Schedule
from ddim_jax.process.spacing import as_timesteps, timesteps

FORMAT = 1
SETTINGS = "settings.json"
WHOLE, SPLIT = PartitionSpec(), PartitionSpec("images")


def generate(
    model: Model,
    directory: str | os.PathLike[str],
    num_images: int = 50_000,
    steps: int | Sequence[int] | np.ndarray = 50,
    eta: float = 0.0,
    *,
    spacing: str = "linear",
    use_sigma_hat: bool = False,
    clip: bool = False,
    labels: str | None = None,
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
      num_images: ≥ 1. It is one of the settings: a finished folder does not grow.
      steps: S, the number of network calls per image; or τ itself, strictly increasing ints in
        1..T, such as `timesteps(..., exact=False)` or `optimise_timesteps` give.
      eta: η, 0 is DDIM, 1 is DDPM.
      spacing: of the S steps; see `timesteps`.
      use_sigma_hat: the larger noise of DDPM; takes eta = 1.
      clip: clip each x̂_0 to [−1, 1].
      labels: "cycle" gives image k the class k mod `num_classes`; None draws without a class.
      seed: of x_T and of the noise; image k is image k of `ddim-jax sample` with this seed.
      batch_size: images at a time on each device; must divide `shard_size`.
      shard_size: images in a file.
      devices: to draw on; all of this process by default.
      progress: whether to show a bar with images/s (needs tqdm).

    Returns:
      The folder; `iter_shards` reads it.

    Raises:
      ValueError: an argument is out of range, or the folder holds other settings, other files or a
        damaged shard. Nothing is overwritten.
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
    if not 1 <= num_images < 2**31:
        raise ValueError(f"num_images must be in 1..2**31 - 1, got {num_images}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1, got {seed}")
    if batch_size < 1 or shard_size < 1 or shard_size % batch_size:
        raise ValueError(
            "batch_size must divide shard_size, so that no block is cut, got "
            f"{batch_size} and {shard_size}"
        )
    tau = _tau(model.schedule, steps, spacing)
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("images",))
    draw = make_draw(model, mesh, tau, eta, use_sigma_hat=use_sigma_hat, clip=clip, labels=labels)
    keys = jax.random.split(jax.random.key(seed))

    directory = pathlib.Path(directory)
    settings = {
        "format": FORMAT,
        "num_images": num_images,
        "shard_size": shard_size,
        "image_shape": list(model.image_shape),
        "seed": seed,
        "eta": eta,
        "tau": tau.tolist(),
        "use_sigma_hat": use_sigma_hat,
        "clip": clip,
        "labels": labels,
        "sha256": _digest({"params": model.params, "alpha_bar": model.schedule.alpha_bar}),
        "model": {
            **model.facts,
            "model": dataclasses.asdict(model.config),
            "prediction": model.prediction,
        },
        "versions": {"ddim_jax": ddim_jax.__version__, "jax": jax.__version__},
    }
    _claim(directory, settings)
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
    params, keys = jax.device_put((model.params, keys), whole)
    drawn = _batches(
        lambda batch: draw(params, keys, jax.device_put(batch, split)),
        numbers,
        batch_size * mesh.size,
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
    settings = _read_settings(directory)
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
    eta: float = 0.0,
    *,
    use_sigma_hat: bool = False,
    clip: bool = False,
    labels: str | None = None,
) -> Callable[[Any, Array, Array], tuple[Array, Array]]:
    """A jitted `(params, keys, numbers) → (images, finite)`, spread over a mesh.

    Each device draws its own slice of `numbers` from beginning to end: no collective.

    Args:
      model: the network and its schedule; its weights are not used.
      mesh: n devices on one axis, "images".
      tau, eta, use_sigma_hat: as in `sample`.
      clip, labels: as in `generate`.

    Returns:
      A function of the weights, keys (2,) for x_T and the noise, and numbers (n·b,) uint32,
      returning images (n·b, H, W, C) uint8, and whether each was finite (n·b,).

    Raises:
      ValueError: as `sample`, or the model has no classes to cycle through.
    """
    num_classes = model.config.num_classes
    if labels not in (None, "cycle") or (labels and num_classes is None):
        raise ValueError(f"labels must be None, or 'cycle' for a model of classes, got {labels!r}")

    def apply_fn(weights: Any, x: Array, t: Array) -> Array:
        params, classes = weights
        return model.apply_fn(params, x, t, **({} if classes is None else {"labels": classes}))

    x0_fn = clip_x0(1.0) if clip else None
    sampler = make_sampler(
        apply_fn,
        model.schedule,
        tau,
        eta,
        use_sigma_hat=use_sigma_hat,
        x0_fn=x0_fn,
        prediction=model.prediction,
    )

    def draw(params: Any, keys: Array, numbers: Array) -> tuple[Array, Array]:
        classes = (numbers % num_classes).astype(jnp.int32) if num_classes and labels else None
        x_T = initial_noise(keys[0], numbers, model.image_shape)
        key = keys[1] if eta > 0 else None
        x_0 = sampler((params, classes), x_T, key, indices=numbers)
        return to_uint8(x_0), jnp.isfinite(x_0).all((1, 2, 3))

    specs = (WHOLE, WHOLE, SPLIT)
    spread = jax.shard_map(draw, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)
    return jax.jit(spread, in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))


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
    draw: Callable[[np.ndarray], tuple[Array, Array]], numbers: np.ndarray, width: int
) -> Iterator[np.ndarray]:
    """The numbers' images, `width` at a time; each batch is fetched while the next is computed.

    `numbers` ascend. The last batch is filled up with the numbers that follow, then cut.
    """
    computing: deque[tuple[np.ndarray, Any]] = deque()

    def fetch() -> np.ndarray:
        batch, result = computing.popleft()
        images, finite = jax.device_get(result)
        wanted = batch <= numbers[-1]
        _check_finite(batch[wanted & ~finite])
        return images[wanted]

    padding = numbers[-1] + np.arange(1, 1 + -len(numbers) % width, dtype=np.uint32)
    for batch in np.concatenate([numbers, padding]).reshape(-1, width):
        computing.append((batch, draw(batch)))
        if len(computing) > 1:
            yield fetch()
    yield fetch()


def _shards(settings: dict[str, Any]) -> dict[str, range]:
    """File name → the numbers of its images."""
    total, size = settings["num_images"], settings["shard_size"]
    starts = range(0, total, size)
    return {
        f"images-{i:05d}-of-{len(starts):05d}.npy": range(start, min(start + size, total))
        for i, start in enumerate(starts)
    }


def _digest(arrays: Any) -> str:
    """SHA-256 of a tree's names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _claim(directory: pathlib.Path, settings: dict[str, Any]) -> None:
    """Makes the folder and its settings, or checks that they are the same."""
    text = json.dumps(settings, indent=2, allow_nan=False) + "\n"
    path = directory / SETTINGS
    directory.mkdir(parents=True, exist_ok=True)
    # Listed before looking for settings, which another process may be writing just now.
    names = {p.name for p in directory.iterdir() if p.suffix != ".tmp"}
    allowed = {SETTINGS, *_shards(settings)} if path.exists() else set()
    if path.exists():
        _check_same(directory, _read_settings(directory), json.loads(text))
    if foreign := sorted(names - allowed):
        raise ValueError(
            f"{directory} holds files that are not of these images: {reprlib.repr(foreign)}; "
            "choose an empty folder"
        )
    if not path.exists():
        write_whole(path, text.encode())


def _read_settings(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / SETTINGS
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


def _check_same(directory: pathlib.Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    if differ := differences(there, now):
        raise ValueError(
            "\n".join([f"{directory} holds images of other settings; choose another:", *differ])
        )


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
