"""The images of an explorer: every S, η, place on the path between two x_T, and t; and codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import Array, image_keys
from ddim_jax.data import Dataset
from ddim_jax.generation.condition import condition, name_of
from ddim_jax.pictures.explorer import SMALL, Codes, Exploration, Path, explorer_html
from ddim_jax.pictures.images import to_model, to_uint8
from ddim_jax.process.spacing import timesteps
from ddim_jax.sampling import ddim, encoder, initial_noise, reconstruction_error, slerp
from ddim_jax.sampling.plan import Method, Plan, run, single_rows, with_noise
from ddim_jax.weights import Model

STEPS = (5, 10, 20, 50)
ETAS = (0.0, 0.5, 1.0)
OWN = "These are samples of the model itself: no real images were at hand."


class Originals(NamedTuple):
    """Images to encode."""

    images: np.ndarray  # (M, H, W, C) uint8
    labels: np.ndarray | None  # (M,) int32 classes that the network is told; None for none
    names: Sequence[str]  # (M,) what stands under each
    origin: str  # a sentence: where they come from


def latents(key: Array, num_images: int, positions: Any, shape: Sequence[int]) -> Array:
    """x_T at places on the slerp paths of N pairs of latents (DDIM App. D.5): (P, N, *shape).

    Image n's pair is that of the numbers n and N + n.

    Example:
      >>> x_T = latents(jax.random.key(0), 3, [0.0, 0.5, 1.0], (8, 8, 1))
      >>> bool((x_T[0] == initial_noise(jax.random.key(0), 3, (8, 8, 1))).all()), x_T.shape
      (True, (3, 3, 8, 8, 1))
    """
    a, b = initial_noise(key, 2 * num_images, shape).reshape(2, num_images, *shape)
    return jnp.stack([slerp(a, b, position) for position in positions])


def num_calls(steps: Sequence[int], etas: Sequence[float], num_positions: int) -> int:
    """Calls of the network, each of a batch, that `explore` makes."""
    return sum(steps) * (len(etas) * num_positions + 2)


def explore(
    model: Model,
    names: Sequence[str],
    labels: np.ndarray | None = None,
    originals: Originals | None = None,
    *,
    steps: Sequence[int] = STEPS,
    etas: Sequence[float] = ETAS,
    num_positions: int = 9,
    num_frames: int = 8,
    seed: int = 0,
    update: Callable[[int], Any] = lambda calls: None,
) -> Exploration:
    """Draws every S with every η from every x_T of the paths, and encodes and decodes images.

    One step is compiled, for Eq. 12 and 13: S, τ and η are data (two, where x̂_0 is clipped). Image
    n's noise, where η > 0, is the same at all places of its path.

    Args:
      model: of `load_model`.
      names: (N,) what stands under each image.
      labels: (N,) int32 classes of the images; None for none.
      originals: images to encode; by default those that the model draws.
      steps: the values of S.
      etas: the values of η.
      num_positions: P, places on the path, its ends among them.
      num_frames: states kept of a path, at most, beside its end.
      seed: of x_T and the noise.
      update: told of the calls of the network made since it was told last.

    Returns:
      An `Exploration`.

    Raises:
      ValueError: the model is distilled and has one τ; S or η is out of range; or a number of
        places or frames is too small.
    """
    check(model, steps, etas, num_positions, num_frames)
    positions = np.linspace(0, 1, num_positions)
    key, noise_key = jax.random.split(jax.random.key(seed))
    x_T = latents(key, len(names), positions, model.image_shape)
    walk = walker(model, image_keys(noise_key, max(len(names), 1 << 6)), update)
    paths = []
    for count in steps:
        tau = timesteps(model.schedule.num_steps, count)
        kept = np.unique(np.linspace(0, count - 1, min(num_frames, count)).round().astype(int))
        cells = [[walk(x, tau, ddim(eta), labels, kept) for x in x_T] for eta in etas]
        x_t, x_0 = (
            np.stack([[np.stack(cell[i], 1) for cell in row] for row in cells]) for i in (1, 2)
        )
        paths.append(Path(np.append(tau[::-1][kept], 0), x_t, x_0))
    if originals is None:
        drawn = paths[-1].x_0[0, 0, :, -1]
        originals = Originals(drawn, labels, names, OWN)
    codes = _codes(model, walk, originals, steps)
    return Exploration(steps, etas, positions, names, paths, codes)


def check(
    model: Model, steps: Sequence[int], etas: Sequence[float], num_positions: int, num_frames: int
) -> None:
    """Raises ValueError where `explore` would, before long work."""
    if model.tau is not None:
        raise ValueError(
            f"the model is distilled to τ = {model.tau.tolist()}, and draws with no other S: "
            "explore its teacher"
        )
    most = model.schedule.num_steps
    if not steps or list(steps) != sorted(set(steps)) or not 1 <= steps[0] <= steps[-1] <= most:
        raise ValueError(f"steps must increase in 1..T = {most}, got {list(steps)}")
    if not etas or list(etas) != sorted(set(etas)) or not 0 <= etas[0] <= etas[-1] < np.inf:
        raise ValueError(f"etas must increase from 0 or above, and be finite, got {list(etas)}")
    for name, got in (("positions", num_positions), ("frames", num_frames)):
        if got < 2:
            raise ValueError(f"need at least 2 {name}, got {got}")


def walker(model: Model, keys: Array, update: Callable[[int], Any]) -> Callable[..., Any]:
    """Draws step by step from the host: one compiled step for all S, η and τ of a batch's size.

    Args:
      model: its network.
      keys: (N,) one for each image, of the noise.
      update: told of the calls of the network that each walk made.

    Returns:
      A function (x, τ, method, labels, kept, first=0) → (x at the end, [x_t …, x], [x̂_0 …, x]) of
      the images from number `first` on, the states at the steps `kept` as pixels.
    """

    @jax.jit
    def step(params: Any, inputs: Any, x: Array, row: Plan, keys: Array) -> Any:
        denoise = partial(model.apply_fn, params, **inputs)
        x, (x_t, x_0) = run(denoise, x, row, keys, np.ones(1, bool))
        return x, to_uint8(x_t[0]), to_uint8(x_0[0])

    plain = model.prediction.x0_fn is None

    def walk(
        x: Array,
        tau: np.ndarray,
        method: Method,
        labels: np.ndarray | None,
        kept: Sequence[int],
        first: int = 0,
    ) -> tuple[Array, list[np.ndarray], list[np.ndarray]]:
        inputs = {} if labels is None else {"labels": jnp.asarray(labels)}
        x_ts, x_0s = [], []
        for k, row in enumerate(_rows(method(model.schedule, tau), plain)):
            x, x_t, x_0 = step(model.params, inputs, x, row, keys[first : first + len(x)])
            if k in kept:
                x_ts.append(np.asarray(x_t))
                x_0s.append(np.asarray(x_0))
        pixels = np.asarray(to_uint8(x))
        update(len(tau))
        return x, [*x_ts, pixels], [*x_0s, pixels]

    return walk


def _rows(plan: Plan, plain: bool) -> Iterator[Plan]:
    """Each row as a plan of one step, with σ = 0 where there is none: one program for every η.

    Where x̂_0 is as predicted (`plain`), down is told the t of the state: the program of up too.
    """
    if plan.told is None and plain:
        plan = dataclasses.replace(plan, told=plan.steps._replace(sigma=None))
    return single_rows(with_noise(plan))


def _codes(
    model: Model, walk: Callable[..., Any], originals: Originals, steps: Sequence[int]
) -> Codes:
    """x_0 → x_T by Eq. 13, and back by Eq. 12 with η = 0, for each S."""
    x_0, parts = to_model(originals.images), []
    for count in steps:
        tau = timesteps(model.schedule.num_steps, count)
        x_T, ups, _ = walk(x_0, tau, encoder(), originals.labels, ())
        back, downs, _ = walk(x_T, tau, ddim(), originals.labels, ())
        parts.append((ups[-1], downs[-1], np.asarray(reconstruction_error(x_0, back))))
    x_Ts, decoded, errors = (np.stack(part) for part in zip(*parts))
    return Codes(originals.images, x_Ts, decoded, errors, originals.names, originals.origin)


class Usual(NamedTuple):
    """What a page of some megabytes has room for."""

    images: int
    positions: int
    frames: int


def usual_number(model: Model) -> Usual:
    """Of the model's size."""
    height, width, _ = model.image_shape
    return Usual(10, 9, 8) if height * width <= SMALL else Usual(5, 5, 5)


def explore_page(
    model: Model,
    title: str,
    labels: np.ndarray | None,
    originals: Originals | None,
    *,
    num_images: int,
    **options: Any,
) -> str:
    """The page of what `explore` draws, with the names of the classes.

    Args:
      model, labels, originals, options: as in `explore`.
      title: what the model is called.
      num_images: N.
    """
    if model.image_shape[2] not in (1, 3):
        raise ValueError(f"images of {model.image_shape[2]} channels are no pictures (1 or 3 are)")
    numbers = [] if labels is None else labels.tolist()
    names = [name_of(model, label) for label in numbers] or [""] * num_images
    return page_of(model, title, explore(model, names, labels, originals, **options))


def page_of(model: Model, title: str, explored: Exploration) -> str:
    """The page of an `Exploration` of the model of that name."""
    height, width, _ = model.image_shape
    about = (
        f"{len(explored.names)} images of {height}×{width}, drawn beforehand by {title} with every "
        "setting of these sliders. Each slider moves the same images."
    )
    return explorer_html(f"DDIM explorer: {title}", about, explored)


def no_labels(model: Model, count: int) -> np.ndarray | None:
    """The class "none" for each, of a network with classes; an error where it knows no such."""
    classes = getattr(model.config, "num_classes", None)
    return condition(model, None if classes is None else "none").of(np.arange(count))


def of_dataset(model: Model, dataset: Dataset, count: int) -> Originals:
    """The first images, with their classes where the network's are the same."""
    taken = dataset.take(np.arange(min(count, len(dataset))))
    size = len(taken["image"])
    classes = getattr(model.config, "num_classes", None)
    if classes is None or classes != dataset.num_classes:
        labels, names = no_labels(model, size), [""] * size
    else:
        labels = np.asarray(taken["label"], np.int32)
        names = [name_of(model, label) for label in labels.tolist()]
    origin = f"The originals are the first images of {dataset.name}, {dataset.split}."
    return Originals(np.asarray(taken["image"]), labels, names, origin)
