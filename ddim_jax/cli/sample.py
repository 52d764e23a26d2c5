"""`ddim-jax sample`."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import tyro
from tqdm import tqdm

from ddim_jax.arrays import image_keys
from ddim_jax.cli.options import SamplingOptions, SourceOptions, check_writable
from ddim_jax.generation.drawing import check_condition, conditioned, label_of, wait
from ddim_jax.pictures.images import grid, save_png
from ddim_jax.sampling import initial_noise, make_sampler
from ddim_jax.storage.files import portable


def sample(
    model: tyro.conf.Positional[str],
    sampling: SamplingOptions,
    source: SourceOptions,
    num_images: int = 64,
    batch_size: int = 16,
    out: pathlib.Path | None = None,
    overwrite: bool = False,
) -> None:
    """Draw images with a trained model, and save them as one PNG.

    Args:
      model: "digits" (ships with the package), a run folder, a .safetensors file, a PyTorch
        checkpoint in the names of Ho et al. and the authors, or a diffusers folder.
      num_images: how many; image k is the same whatever their number.
      batch_size: images at a time.
      out: the file; by default named after model, steps, eta and seed, in the current folder.
      overwrite: replace the file if it exists.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"need at least one image, got {num_images} in batches of {batch_size}")
    method = sampling.check()
    out = out or pathlib.Path(f"{pathlib.Path(model).resolve().stem}{sampling.stem}.png")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, the format written, got {out}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another --out, or pass --overwrite")
    check_writable(out)
    loaded = source.load(model)
    if loaded.image_shape[2] not in (1, 3):
        raise ValueError(
            f"images of {loaded.image_shape[2]} channels are no PNG (1 or 3 are): ddim-jax "
            "generate writes them as arrays"
        )
    labels, guidance = check_condition(loaded, sampling.labels, sampling.guidance)
    tau = sampling.timesteps(loaded.schedule)
    sampler = make_sampler(conditioned(loaded, sampling.clip), tau, method=method)
    noisy = method(loaded.schedule, tau).steps.sigma is not None
    key, noise_key = jax.random.split(jax.random.key(sampling.seed))
    scale = None if guidance is None else np.float32(guidance)
    images = []
    with tqdm(total=num_images, unit="image", desc="compiling") as bar:
        for start in range(0, num_images, batch_size):
            # Whole batches, so that the last one does not compile anew.
            indices = np.arange(start, start + min(batch_size, num_images))
            x_T = initial_noise(key, indices, loaded.image_shape)
            keys = image_keys(noise_key, indices) if noisy else None
            label = label_of(loaded, labels, indices)
            drawn = sampler(x_T, keys, labels=label, guidance=scale)
            bar.set_description("drawing")
            wait(drawn, bar)
            if not np.isfinite(drawn).all():
                raise FloatingPointError("the samples are not finite: the model may be damaged")
            images.append(np.asarray(drawn))
            bar.update(min(len(indices), num_images - start))
    all_drawn = np.concatenate(images)[:num_images]
    shown = max(1, 64 // all_drawn.shape[1])
    facts = {"model": portable(model), **dataclasses.asdict(sampling), **source.given()}
    text = {"ddim_jax": json.dumps(facts)}
    save_png(out, grid(all_drawn, scale=shown), text=text, overwrite=overwrite)
    print(f"wrote {out}: {num_images} images, {sampling}")
