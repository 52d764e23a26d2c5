"""`ddim-jax evaluate MODEL --bits …`: bits per dimension of real images under a model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Literal, TypeAlias

import numpy as np
import tyro

from ddim_jax.cli.options import Source, check_writable
from ddim_jax.data import Dataset
from ddim_jax.evaluation.bits import bits_per_dim
from ddim_jax.process import predicts
from ddim_jax.sampling import clip_x0
from ddim_jax.storage.files import portable, write_whole
from ddim_jax.training.presets import DataConfig
from ddim_jax.weights import Model


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits per dimension of real images under a model, in place of a comparison of drawn ones.

    Attributes:
      bits: "bound", the variational bound of the chain of all T steps, or "ode", the density of
        the ODE of Eq. 14 (needs diffrax). `images` is then the model.
      num_images: how many images of the data, drawn without replacement by --seed; by default 256,
        or all where there are fewer.
      num_terms: of the bound, draw so many t for each image; 0 sums over all.
      variance: of the bound, that of p: small is σ(η)², large is σ̂², and learned is the network's
        own; by default learned where the network learned it, else small.
      eta: of the bound, above 0; 1 is DDPM.
      clip: of the bound and the ODE, clip each predicted x_0 to [−1, 1].
      probes: of the ODE, random vectors an image; 0 takes the exact trace, one derivative a pixel.
      tolerance: of the ODE's solver.
      batch_size: images at a time.
      seed: of images and noise.
      out: a JSON file for all numbers, by image and by t.
      overwrite: replace it if it exists.
    """

    bits: Literal["bound", "ode"] | None = None
    num_images: int | None = None
    num_terms: int = 0
    variance: Literal["small", "large", "learned"] | None = None
    eta: float = 1.0
    clip: bool = False
    probes: int = 1
    tolerance: float = 1e-5
    batch_size: int = 64
    seed: int = 0
    out: pathlib.Path | None = None
    overwrite: bool = False

    def check(self) -> None:
        """All that can be checked without model and data."""
        for name, low in (("num_images", 1), ("batch_size", 1), ("num_terms", 0), ("probes", 0)):
            got = getattr(self, name)
            if got is not None and got < low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {got}")
        if self.num_terms == 1:
            raise ValueError("--num-terms must be at least 2, or 0 for all t, got 1")
        if not self.eta > 0:
            raise ValueError(f"--eta must be above 0, got {self.eta:g}: at 0 the bound is infinite")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"--tolerance must lie in (0, 1), got {self.tolerance:g}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be in 0..2**32 - 1, got {self.seed}")
        usual, other = Bits(), {"bound": ("probes", "tolerance"), "ode": _OF_BOUND}
        for name in other[self.bits or "bound"]:
            if getattr(self, name) != getattr(usual, name):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no meaning with --bits {self.bits}: leave it out")
        if self.out is not None:
            if self.out.exists() and not self.overwrite:
                raise FileExistsError(f"{self.out} exists; choose another, or pass --overwrite")
            check_writable(self.out)


_OF_BOUND = ("num_terms", "variance", "eta")
BitsOptions: TypeAlias = tyro.conf.OmitArgPrefixes[Bits]


def evaluate_bits(
    model: str, data: DataConfig, data_dir: pathlib.Path | None, options: Bits, source: Source
) -> None:
    """Prints the figure, and writes `options.out` if asked to."""
    options.check()
    loaded = source.load(model)
    dataset = data.load(data_dir)
    if dataset.image_shape != loaded.image_shape:
        raise ValueError(
            f"{model} has images {loaded.image_shape}, {data.name} {dataset.image_shape}: name the "
            "data that the model learned from, with --crop and --resize as in training"
        )
    count = min(256, len(dataset)) if options.num_images is None else options.num_images
    if count > len(dataset):
        raise ValueError(
            f"--num-images must be at most {len(dataset):,}, the images of {data.name} "
            f"{data.split}, got {count:,}"
        )
    classes = _classes(loaded, dataset)
    chosen = np.random.default_rng(options.seed).permutation(len(dataset))[:count]
    numbers = np.sort(chosen)
    taken = dataset.take(numbers)
    result = bits_per_dim(
        predicts(loaded, x0_fn=clip_x0(1.0)) if options.clip else loaded,
        taken["image"],
        options.bits or "bound",
        eta=options.eta,
        variance=options.variance,
        num_terms=options.num_terms or None,
        probes=options.probes or "exact",
        tolerance=options.tolerance,
        seed=options.seed,
        numbers=numbers,
        labels=taken["label"] if classes else None,
        batch_size=options.batch_size,
        progress=True,
    )
    if options.out is not None:
        facts: dict[str, Any] = {"model": portable(model), "clip": options.clip}
        facts |= {"data": dataset.provenance, **source.given()}
        text = json.dumps(result.to_json() | facts, indent=1, default=str, allow_nan=False)
        write_whole(options.out, text.encode())
    print(result)


def _classes(model: Model, dataset: Dataset) -> bool:
    """Whether the network is told the images' classes: where it does not work without."""
    wanted = getattr(model.config, "num_classes", None)
    if wanted is None or model.config.null_label:
        return False
    if dataset.num_classes != wanted:
        raise ValueError(
            f"the model must be told one of {wanted} classes of each image, and {dataset.name} has "
            f"{dataset.num_classes or 'none'}: name the data that it learned from"
        )
    return True
