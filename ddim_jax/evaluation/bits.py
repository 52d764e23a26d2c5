"""Bits per dimension of images under a model, over batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ddim_jax.arrays import Array, ArrayLike, image_keys
from ddim_jax.evaluation.figures import Figure
from ddim_jax.pictures.images import to_model
from ddim_jax.process.predictor import variance_of
from ddim_jax.process.schedule import Schedule
from ddim_jax.sampling import dequantise, ode_density, variational_bound
from ddim_jax.sampling.learned import with_variance
from ddim_jax.weights import Model

BY = ("bound", "ode")
# (denoiser, x_0, keys) → (nats, their standard error, parts, every term), each (B, ...) or None
_Step = Callable[[Any, Array, Array], Any]


class BitsPerDim(NamedTuple):
    """Bits per dimension: what a code by the model would spend on a channel of a pixel."""

    figure: Figure  # the mean over the images and its standard error
    per_image: np.ndarray  # (N,)
    per_image_se: np.ndarray | None  # (N,) of drawn t or probes; None where all t are summed
    parts: dict[str, float]  # the bound's: "prior", "chain" (all t but τ_1) and "decoder"
    by_t: np.ndarray | None  # (S,) the mean term of each t of τ, the decoder's first
    facts: dict[str, Any]  # what was asked for

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; the figure is {"name", "value", "se"}."""
        shown = {"bits": dict(self.figure._asdict()), "size": len(self.per_image), **self.facts}
        arrays = {"per_image": self.per_image, "per_image_se": self.per_image_se, "by_t": self.by_t}
        lists = {
            name: None if a is None else [float(f"{v:.6g}") for v in a]
            for name, a in arrays.items()
        }
        return shown | {"parts": self.parts} | lists

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in self.parts.items())
        return f"{self.figure} ({len(self.per_image):,} images)" + (parts and f": {parts}")


def bits_per_dim(
    model: Model,
    images: np.ndarray,
    by: str = "bound",
    *,
    tau: ArrayLike | None = None,
    eta: float = 1.0,
    variance: str | None = None,
    num_terms: int | None = None,
    probes: Any = 1,
    tolerance: float = 1e-5,
    seed: int = 0,
    numbers: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> BitsPerDim:
    """Bits per dimension of uint8 images, by the variational bound or by the ODE's density.

    `"bound"`: `variational_bound`/(D log 2). `"ode"`: −log2 p(x_0 + u)/D + log2 127.5 with p of
    `ode_density` and u uniform over a bin (`dequantise`): a bin is 2/255 wide where pixels are
    2k/255 − 1, so P(x_0) is about p · (1/127.5)^D. (The 7 = log2 128 of some papers is for bins of
    1/128.) Both are above the truth in expectation. D = H·W·C; networks with classes are told
    none, unless `labels` says which.

    Args:
      model: of `load_model`, or your own.
      images: (N, H, W, C) uint8.
      by: `"bound"` or `"ode"`.
      tau, eta, variance, num_terms: of `variational_bound`; the variance is by default "learned" of
        a network that learned one, else "small".
      probes: of `ode_density`.
      tolerance: its rtol and atol.
      seed: of all noise; an image's depends on (seed, its number) alone.
      numbers: (N,) of the images, 0..N − 1 by default.
      labels: (N,) integers, the images' classes, told to the network.
      batch_size: images at a time; there is one compilation.
      progress: whether to show a bar.

    Returns:
      `BitsPerDim`; the standard error is that over images, with all noise in it, None of one image.

    Raises:
      TypeError: images are not uint8.
      ValueError: images are none, or not (N, H, W, C) of the model's; `by` is unknown; a number is
        out of range.
      ModuleNotFoundError: by the ODE without diffrax.
      FloatingPointError: a value is not finite.

    Example:
      >>> import ddim_jax as ddim
      >>> schedule = ddim.linear_schedule(1000)
      >>> exact = ddim.oracle.gaussian(schedule, mean=0.0, cov=0.1)
      >>> model = ddim.Model(lambda w, x, t: exact(x, t), (), schedule)
      >>> images = np.full((4, 2, 2, 1), 128, np.uint8)
      >>> bits = bits_per_dim(model, images, num_terms=32)
      >>> bits.per_image.shape, bits.figure.name, 6 < bits.figure.value < 9
      ((4,), 'bits/dim (bound)', True)
    """
    if by not in BY:
        raise ValueError(f"by must be one of {BY}, got {by!r}")
    if by == "bound" and (probes, tolerance) != (1, 1e-5):
        raise ValueError('probes and tolerance are of by="ode", got them with by="bound"')
    if by == "ode" and not (tau is num_terms is None and (eta, variance) == (1.0, None)):
        raise ValueError(
            'tau, eta, variance and num_terms are of by="bound", got some with by="ode"'
        )
    images = _checked(model, images, batch_size)
    size, shape = len(images), images.shape[1:]
    numbers = np.arange(size) if numbers is None else np.asarray(numbers)
    for name, given in (("numbers", numbers), ("labels", labels)):
        if given is not None and np.shape(given) != (size,):
            raise ValueError(
                f"{name} must be one per image, ({size},), got shape {np.shape(given)}"
            )
    if variance is None:
        variance = "small" if variance_of(model.apply_fn) is None else "learned"
    elif variance == "learned":
        with_variance(model.apply_fn)

    if by == "bound":
        step = _bound(model.schedule, tau, eta, variance, num_terms)
    else:
        step = _ode(model.schedule, probes, tolerance)

    @jax.jit
    def jitted(params: Any, pixels: Array, keys: Array, told: dict[str, Array]) -> Any:
        return step(partial(model.apply_fn, params, **told), to_model(pixels), keys)

    def run(rows: np.ndarray, keys: Array) -> Any:
        told = {} if labels is None else {"labels": jnp.asarray(labels)[rows]}
        return jitted(model.params, images[rows], keys, told)

    nats, se, parts, every = _over_batches(run, numbers, seed, batch_size, progress)
    if bad := numbers[~np.isfinite(nats)].tolist():
        raise FloatingPointError(
            f"the {by} is not finite for {len(bad)} of {size} images, such as number {bad[0]}: the "
            "model may be damaged, or the solver needs a larger tolerance"
        )
    unit = np.prod(shape) * np.log(2)
    bits = nats / unit
    asked = {"seed": seed, "bits_by": by}
    if by == "bound":
        asked |= {"eta": eta, "variance": variance, "num_terms": num_terms}
        asked |= {"steps": model.schedule.num_steps if tau is None else len(np.asarray(tau))}
    else:
        asked |= {"probes": probes, "tolerance": tolerance}
        asked |= {"network_calls": float(parts.pop("calls").mean())}
    return BitsPerDim(
        Figure(
            f"bits/dim ({'bound' if by == 'bound' else 'ODE'})",
            float(bits.mean()),
            float(bits.std(ddof=1) / np.sqrt(size)) if size > 1 else None,
        ),
        bits,
        None if se is None else se / unit,
        {name: float(part.mean() / unit) for name, part in parts.items()},
        None if every is None else every.mean(0) / unit,
        asked,
    )


def _bound(schedule: Schedule, tau: Any, eta: float, variance: str, num_terms: int | None) -> _Step:
    """By the variational bound."""

    def step(denoise: Any, x_0: Array, keys: Array) -> Any:
        how: dict[str, Any] = {"eta": eta, "variance": variance, "num_terms": num_terms}
        b = variational_bound(denoise, x_0, schedule, keys, tau, **how)
        every = None if num_terms else jnp.concatenate([b.decoder[None], b.terms]).T
        parts = {"prior": b.prior, "chain": b.nats - b.prior - b.decoder, "decoder": b.decoder}
        return b.nats, b.se, parts, every

    return step


def _ode(schedule: Schedule, probes: Any, tolerance: float) -> _Step:
    """By the density of the ODE at a point of the pixels' bins."""

    def step(denoise: Any, x_0: Array, keys: Array) -> Any:
        split = jax.vmap(jax.random.split)(keys)
        x = dequantise(x_0, split[:, 0])
        key = None if probes == "exact" else split[:, 1]
        d = ode_density(denoise, x, schedule, key, probes=probes, rtol=tolerance, atol=tolerance)
        calls = jnp.full(len(x), d.num_calls, jnp.float32)
        return x[0].size * np.log(127.5) - d.log_density, d.se, {"calls": calls}, None

    return step


def _checked(model: Model, images: np.ndarray, batch_size: int) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8 in 0..255, got {images.dtype}: bits are of pixels")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, H, W, C) and some, got shape {images.shape}")
    if model.config is not None and images.shape[1:] != model.image_shape:
        raise ValueError(f"the model has images {model.image_shape}, got {images.shape[1:]}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    return images


def _over_batches(
    run: Callable[[Any, Any], Any],
    numbers: np.ndarray,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Any:
    """`run(rows, keys)` over whole batches, the last filled up; the results joined."""
    size, key = len(numbers), jax.random.key(seed)
    batch_size = min(batch_size, size)
    results = []
    with tqdm(total=size, unit="image", desc="bits", delay=1, disable=not progress) as bar:
        for start in range(0, size, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), size - 1)
            results.append(jax.device_get(run(rows, image_keys(key, numbers[rows]))))
            bar.update(min(batch_size, size - start))
    return jax.tree.map(lambda *parts: np.float64(np.concatenate(parts)[:size]), *results)
